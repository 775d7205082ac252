"""A whole conversion: listed once, shard by shard in parallel, finished atomically, resumable at any moment.

While it goes on, everything lies in OUT.partial; a shard is complete when its record is there. At the end the records
become the index and the manifest, and OUT.partial is renamed to OUT. Every step may be repeated.

    OUT.partial/job.json              what is being converted, and how; another command finds itself refused
    OUT.partial/listing/SPLIT.jsonl   the samples; SPLIT.npy: where each line starts
    OUT.partial/records/SPLIT/*.json  one for each finished shard
    OUT.partial/SPLIT/*.tar, *.idx    the shards
"""

import collections
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_handles
from pathlib import Path

import numpy as np

from pipelines import rng
from pipelines.errors import UserError
from pipelines.files import locked, sha256_of, sync_folder, write_synced
from pipelines.index import FORMAT_VERSION, INDEX, MANIFEST, manifest_bytes, read_manifest, sample_dtype, split_digest
from tools.sharding.images import ImageOptions
from tools.sharding.shards import HASH_BYTES, read_record, write_shard
from tools.sharding.sources import Entry, Source, open_source

TOOL = "tools/shard_imagenet.py"
GO_ON = "Run the same command again to go on: finished shards are kept"
_JOB = "job.json"
_HASHES_AT_A_TIME = 1 << 20  # of the search for duplicates, which never holds more
_EXAMPLES = 20  # tiny images named in the manifest


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What a conversion is; the same options and source give the same bytes.

    Attributes:
      seed: of the order of the training samples.
      samples_per_shard: the last shard of a split may have fewer.
      image: what is done to each image.
    """

    seed: int = 0
    samples_per_shard: int = 5000
    image: ImageOptions = dataclasses.field(default_factory=ImageOptions)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the shards are: images and source bytes of this process's share, done and in all."""

    images: int
    nbytes: int
    total_images: int


def build(
    src: Path,
    out: Path,
    options: BuildOptions,
    *,
    kind: str = "auto",
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    skip_bad: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict | None:
    """Convert a source, from wherever an earlier call with the same arguments was interrupted.

    Args:
      part: (i, n): write every n-th shard, beginning with i. With n > 1 `merge` finishes the dataset.
      skip_bad: leave images that cannot be used out, instead of failing once all have been looked at.
      on_progress: called a few times a second.
    Returns:
      The manifest, or None where parts remain to be merged.
    Raises:
      UserError: the source, OUT or images are not as they must be; OUT does not exist then, finished shards are kept.
    """
    source = open_source(src, kind)
    job = _describe(source, options)
    if out.exists():
        return _already_there(out, job)
    partial = _partial(out)
    _claim(partial, job)
    if (partial / MANIFEST).is_file():  # interrupted at the very end
        return _finish(partial, out, job)
    with locked(partial / f".lock-{part[0]}", f"another process is already working on {partial}, part {part[0]}"):
        with locked(partial / ".lock-listing", "", wait=True):
            for split, samples in source.splits.items():
                _list(partial, split, samples)
        _write_shards(partial, source, options, workers, part, on_progress)
        if part[1] > 1:
            return None
        _refuse_rejected(partial, skip_bad)
        return _finish(partial, out, job)


def merge(out: Path, skip_bad: bool = False) -> dict:
    """Finish a conversion whose parts are done.

    Raises:
      UserError: there is none, or shards are missing; they are named.
    """
    partial = _partial(out)
    if out.exists():
        return read_manifest(out)
    if not (partial / _JOB).is_file():
        raise UserError(f"{partial}: not found. Run 'build' with --part 1/N to --part N/N first")
    job = json.loads((partial / _JOB).read_text())
    splits = [path.stem for path in sorted((partial / "listing").glob("*.npy"))]
    missing = [shard for split in splits for shard in _shards(partial, split, job) if not _is_done(partial, shard)]
    if missing or not splits:
        named = ", ".join(name for _, name in missing[:10]) + (" ..." if len(missing) > 10 else "")
        raise UserError(f"{partial}: {len(missing)} shards are missing ({named}). Run the parts that should write them")
    _refuse_rejected(partial, skip_bad)
    return _finish(partial, out, job)


# --- what is being converted ---


def _describe(source: Source, options: BuildOptions) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "source": {"kind": source.kind, "name": source.root.resolve().name, "files": source.files},
        "options": {
            "seed": options.seed,
            "samples_per_shard": options.samples_per_shard,
            **dataclasses.asdict(options.image),
        },
        "classes": source.classes,
        "class_names": source.class_names,
        "splits": list(source.splits),
    }


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _already_there(out: Path, job: dict) -> dict:
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out}: exists already and is not a dataset. Remove it, or choose another folder")
    manifest = read_manifest(out)
    (out / _JOB).unlink(missing_ok=True)  # left by a process that was killed between its last two actions
    if different := _difference({key: manifest[key] for key in job if key != "splits"}, job):
        raise UserError(f"{out}: exists already, made differently: {different}. Remove it, or choose another folder")
    return manifest


def _difference(there: dict, wanted: dict) -> str:
    """The first thing in which two jobs differ, in words; '' where they agree."""
    for key in there:
        if there[key] != wanted.get(key):
            if isinstance(there[key], dict) and isinstance(wanted.get(key), dict):
                return _difference({k: there[key].get(k) for k in {**there[key], **wanted[key]}}, wanted[key])
            return f"{key} was {_shorten(there[key])}, now it is {_shorten(wanted.get(key))}"
    return ""


def _shorten(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _claim(partial: Path, job: dict) -> None:
    """Make OUT.partial ours, or make sure that it is."""
    path = partial / _JOB
    if not path.is_file():
        if partial.exists() and any(entry.suffix != ".partial" for entry in partial.iterdir()):
            raise UserError(f"{partial}: exists and was not left by this tool. Remove it, or choose another folder")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            write_synced(path, json.dumps(job).encode())
        except OSError as error:
            raise UserError(f"{partial}: cannot be made ({error.strerror}). Choose another folder") from error
    if different := _difference(json.loads(path.read_text()), job):
        raise UserError(
            f"{partial}: holds an unfinished conversion that is another one: {different}. Finish that one, "
            "remove the folder, or choose another"
        )


# --- the listing ---


def _list(partial: Path, split: str, samples: Callable[[Path], Iterator[Entry]]) -> None:
    """Write the listing of a split, once."""
    starts_path = partial / "listing" / f"{split}.npy"
    if starts_path.is_file():
        return
    starts_path.parent.mkdir(exist_ok=True)
    lines, starts = starts_path.with_suffix(".jsonl"), starts_path.with_suffix(".starts")
    position = count = 0
    with open(lines, "wb") as file, open(starts, "wb") as starts_file:
        for entry in samples(partial / "scratch" / split):
            line = json.dumps([entry.key, entry.label, entry.location]).encode() + b"\n"
            starts_file.write(position.to_bytes(8, "little"))
            position, count = position + len(line), count + 1
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if not count:
        starts.unlink()
        raise UserError(f"{split}: the source has no images in this split. Add some, or remove it")
    starts.rename(starts_path)
    sync_folder(starts_path.parent)


class Listing:
    """The samples of a split, any of them read on its own from the listing on disk."""

    def __init__(self, partial: Path, split: str):
        self._starts = np.memmap(partial / "listing" / f"{split}.npy", dtype="<u8", mode="r")
        self._lines = open(partial / "listing" / f"{split}.jsonl", "rb")  # noqa: SIM115 (open as long as the worker)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Entry:
        self._lines.seek(int(self._starts[i]))
        return Entry(*json.loads(self._lines.readline()))


def _num_listed(partial: Path, split: str) -> int:
    return (partial / "listing" / f"{split}.npy").stat().st_size // 8


def _shards(partial: Path, split: str, job: dict) -> list[tuple[str, str]]:
    """(split, name) of a split's shards."""
    count = -(-_num_listed(partial, split) // job["options"]["samples_per_shard"])
    return [(split, f"{split}-{number:05d}") for number in range(count)]


def _is_done(partial: Path, shard: tuple[str, str]) -> bool:
    return (partial / "records" / shard[0] / f"{shard[1]}.json").is_file()


# --- the shards ---


def _write_shards(
    partial: Path,
    source: Source,
    options: BuildOptions,
    workers: int,
    part: tuple[int, int],
    on_progress: Callable[[Progress], None],
) -> None:
    """Write what is missing of this process's share."""
    job = _describe(source, options)
    mine = [shard for split in source.splits for shard in _shards(partial, split, job)][part[0] :: part[1]]
    missing = [shard for shard in mine if not _is_done(partial, shard)]
    for split in source.splits:
        (partial / split).mkdir(exist_ok=True)
        (partial / "records" / split).mkdir(parents=True, exist_ok=True)
    if not missing:
        return
    total = sum(len(_rows(shard, _num_listed(partial, shard[0]), options.samples_per_shard)) for shard in missing)
    context = _context()
    counters = context.Value("Q", 0), context.Value("Q", 0)
    setup = (partial, source.root, source.kind, options, counters)
    with ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, setup) as pool:
        try:
            jobs: set[Future] = {pool.submit(_write_one, *shard) for shard in missing}
            while jobs:
                done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_COMPLETED)
                on_progress(Progress(counters[0].value, counters[1].value, total))
                for finished in done:
                    finished.result()
        except BrokenProcessPool as error:
            message = f"a worker was killed, perhaps for want of memory; use fewer --workers then. {GO_ON}"
            raise UserError(message) from error
        except OSError as error:
            raise UserError(f"{error.filename or partial}: {error.strerror or error}. Mend that. {GO_ON}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server process that has imported this module once, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _rows(shard: tuple[str, str], samples: int, samples_per_shard: int) -> range:
    """Which of a split's samples, in the order in which they are written, are a shard's."""
    number = int(shard[1].rpartition("-")[2])
    return range(number * samples_per_shard, min((number + 1) * samples_per_shard, samples))


class _Worker:
    """What a worker process opens once."""

    def __init__(self, partial: Path, root: Path, kind: str, options: BuildOptions, counters: tuple):
        self.partial = partial
        self.options = options
        self.counters = counters
        self.read = open_source(root, kind).read
        self.listings = {path.stem: Listing(partial, path.stem) for path in (partial / "listing").glob("*.npy")}

    def count(self, nbytes: int) -> None:
        for counter, amount in zip(self.counters, (1, nbytes), strict=True):
            with counter.get_lock():
                counter.value += amount

    def entries(self, shard: tuple[str, str]) -> Iterator[Entry]:
        """The samples of a shard: training samples in the seed's order, others as listed."""
        listing = self.listings[shard[0]]
        rows = np.array(_rows(shard, len(listing), self.options.samples_per_shard))
        if shard[0] == "train":
            rows = rng.permute(self.options.seed, rng.Stream.SHARDS, 0, len(listing), rows)
        return (listing[i] for i in rows.tolist())


_worker: _Worker | None = None


def _start_worker(partial: Path, root: Path, kind: str, options: BuildOptions, counters: tuple) -> None:
    # A worker whose parent was killed must not go on writing beside the next attempt.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for_handles([parent.sentinel]), os._exit(1)), daemon=True).start()
    global _worker
    _worker = _Worker(partial, root, kind, options, counters)


def _write_one(split: str, name: str) -> None:
    path, records = _worker.partial / split / f"{name}.tar", _worker.partial / "records" / split
    write_shard(path, records, _worker.entries((split, name)), _worker.read, _worker.options.image, _worker.count)


# --- the end ---


def _refuse_rejected(partial: Path, skip_bad: bool) -> None:
    """Without skip_bad, name all images that cannot be used, and forget their shards so that they are tried again."""
    if skip_bad:
        return
    rejected = []
    for path in sorted((partial / "records").rglob("*.json")):
        if found := read_record(path).notes["rejected"]:
            rejected += [f"{item['source']} ({item['reason']})" for item in found]
            path.unlink()
    if rejected:
        raise UserError(
            f"{len(rejected)} images cannot be used: {'; '.join(rejected)}. "
            "Repair them and run the same command again, or leave them out with --on-bad skip"
        )


def _finish(partial: Path, out: Path, job: dict) -> dict:
    """Index, manifest, and the final name."""
    if not (partial / MANIFEST).is_file():
        description = {key: value for key, value in job.items() if key != "splits"}
        names = {split: [name for _, name in _shards(partial, split, job)] for split in job["splits"]}
        assemble(partial, partial / "records", description, names)
    for leftover in ("listing", "records", "scratch"):
        shutil.rmtree(partial / leftover, ignore_errors=True)
    for path in [*partial.glob(".lock-*"), *partial.rglob("*.partial")]:
        path.unlink(missing_ok=True)
    partial.rename(out)
    (out / _JOB).unlink()
    sync_folder(out.parent)
    return read_manifest(out)


def assemble(root: Path, records: Path, description: dict, shards: dict[str, list[str]]) -> None:
    """Make the index of each split and the manifest from the records of all shards.

    Args:
      root: the dataset folder.
      records: folder with SPLIT/NAME.json.
      description: the manifest's part that says what the dataset is.
      shards: split -> names of its shards, in order.
    """
    audit = {"repaired": [], "rejected": [], "resized": 0, "tiny": {"count": 0, "examples": []}, "oriented": 0}
    splits = {}
    for split, names in shards.items():
        paths = [records / split / f"{name}.json" for name in names]
        splits[split] = _write_index(root / split / INDEX, paths, len(description["classes"]), audit)
    audit["duplicates"] = find_duplicates(records)
    manifest = {**description, "tool": TOOL, "splits": splits, "audit": audit}
    write_synced(root / MANIFEST, manifest_bytes(manifest))


def _write_index(path: Path, records: list[Path], num_classes: int, audit: dict) -> dict:
    """Write a split's index from its shards' records, one after the other. Returns its entry in the manifest."""
    split = path.parent.name
    key_bytes = samples = 0
    for record_path in records:
        record = read_record(record_path)
        samples += len(record.rows)
        key_bytes = max([key_bytes, *(len(row["key"].encode()) for row in record.rows)])
    if not samples:
        raise UserError(f"{split}: no image of this split can be used. Look at the source")
    index = np.lib.format.open_memmap(path, mode="w+", dtype=sample_dtype(key_bytes), shape=(samples,))
    entries, start = [], 0
    for number, record_path in enumerate(records):
        record = read_record(record_path)
        entries.append(record.entry)
        rows = index[start : start + len(record.rows)]
        rows["shard"] = number
        for field in ("offset", "nbytes", "label", "height", "width", "crc32", "orientation"):
            rows[field] = [row[field] for row in record.rows]
        rows["key"] = [row["key"].encode() for row in record.rows]
        audit["oriented"] += int((rows["orientation"] != 1).sum())
        start += len(record.rows)
        for note, found in record.notes.items():
            _add_note(audit, note, found, split)
    index.flush()
    counts = np.bincount(index["label"], minlength=num_classes).tolist()
    index_sha256 = sha256_of(path)
    return {
        "samples": samples,
        "bytes": sum(entry["bytes"] for entry in entries),
        "class_counts": counts,
        "index_sha256": index_sha256,
        "digest": split_digest(index_sha256, [entry["sha256"] for entry in entries]),
        "shards": entries,
    }


def _add_note(audit: dict, note: str, found, split: str) -> None:
    if note == "resized":
        audit[note] += found
    elif note == "tiny":
        audit[note]["count"] += len(found)
        missing = _EXAMPLES - len(audit[note]["examples"])
        audit[note]["examples"] += [f"{split}/{key}" for key in found[:missing]]
    else:
        audit[note] += [{**item, "sample": f"{split}/{item['sample']}"} for item in found]


def find_duplicates(records: Path) -> list[list[str]]:
    """Groups of samples, as SPLIT/KEY, whose sources have the same content, within a split and across splits.

    The hashes are gone through several times, each time for another share of them, so that memory does not grow with
    the dataset.
    """
    paths = sorted(records.rglob("*.sha256"))
    total = sum(path.stat().st_size for path in paths) // HASH_BYTES
    passes = max(1, -(-total // _HASHES_AT_A_TIME))
    groups = []
    for share in range(passes):
        # found: [hashes of this share] with the two halves of the hash, the file and the row
        found = np.concatenate([_hashes(path, number, share, passes) for number, path in enumerate(paths)])
        found.sort(order=("high", "low", "file", "row"))
        same = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
        for start, stop in _runs(same):
            groups.append([(int(row["file"]), int(row["row"])) for row in found[start:stop]])
    return sorted(_named(paths, groups))


def _hashes(path: Path, number: int, share: int, passes: int) -> np.ndarray:
    halves = np.frombuffer(path.read_bytes(), dtype=[("high", "<u8"), ("low", "<u8")])
    rows = np.flatnonzero(halves["high"] % np.uint64(passes) == share)
    found = np.empty(len(rows), dtype=[("high", "<u8"), ("low", "<u8"), ("file", "<i4"), ("row", "<i4")])
    found["high"], found["low"], found["file"], found["row"] = halves["high"][rows], halves["low"][rows], number, rows
    return found


def _runs(same: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of equal neighbours; same[i] says that i and i + 1 are equal."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield start, stop + 1


def _named(paths: list[Path], groups: list[list[tuple[int, int]]]) -> list[list[str]]:
    wanted = collections.defaultdict(dict)
    for group in groups:
        for file, row in group:
            wanted[file][row] = ""
    for file, rows in wanted.items():
        record = read_record(paths[file].with_suffix(".json"))
        for row in rows:
            rows[row] = f"{paths[file].parent.name}/{record.rows[row]['key']}"
    return [sorted(wanted[file][row] for file, row in group) for group in groups]
