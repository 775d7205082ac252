"""A whole conversion: listed once, shard by shard in parallel, finished atomically, resumable at any moment.

Until it is finished, everything lies in OUT.partial; a shard is complete when its record is there. At the end the
records become the index and the manifest, and OUT.partial is renamed to OUT. Every step may be repeated. Where an empty
OUT is there already, such as a mount point or the present folder, OUT/.partial takes the place of OUT.partial, and its
files are moved up, the manifest last.

    OUT.partial/job.json              what is being converted, and how; another command finds itself refused
    OUT.partial/listing/SPLIT.jsonl   the samples; SPLIT.starts: where each line starts; SPLIT.json: number and hash;
                                      SPLIT.unused.jsonl: what of the source is no sample
    OUT.partial/records/SPLIT/*.json  one for each finished shard
    OUT.partial/SPLIT/*.tar, *.idx    the shards
"""

import collections
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines import rng
from pipelines.errors import UserError, clipped, grouped, named
from pipelines.files import locked, read_json, replacing, sha256_of, sync_folder, write_synced
from pipelines.index import (
    AUDIT,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    class_order,
    manifest_bytes,
    read_manifest,
    sample_dtype,
    split_digest,
)
from tools.sharding.class_notes import class_notes
from tools.sharding.entries import (
    HIDDEN,
    MISPLACED,
    RECOGNISE,
    Entry,
    Source,
    SourceOptions,
    Unused,
    contents_of,
)
from tools.sharding.images import ImageOptions
from tools.sharding.shards import HASH_BYTES, read_record, write_shard
from tools.sharding.sources import open_source
from tools.sharding.workers import LostWorkerError, run_jobs

TOOL, VERSION = "tools/shard_imagenet.py", "0.1.0"
GO_ON = "Run the same command again to go on: finished shards are kept"
_JOB = "job.json"
_HASHES_AT_A_TIME = 1 << 20  # of the search for duplicates, which never holds more
_NAMED = 5  # rejected images in an error; a longer list goes into a file
_EXAMPLES = 1000  # of each kind of remark in the manifest; all of them are in audit.jsonl


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

    def __post_init__(self):
        if not 0 <= self.seed < 1 << 64 or self.samples_per_shard < 1:
            raise UserError(f"seed {self.seed}, samples_per_shard {self.samples_per_shard}: out of range")


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
    source_options: SourceOptions = RECOGNISE,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    skip_bad: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> dict | None:
    """Convert a source, from wherever an earlier call with the same arguments was interrupted.

    Args:
      part: (i, n): write every n-th shard, beginning with i. With n > 1 `merge` finishes the dataset.
      skip_bad: leave out images that cannot be used, and what of the source is not understood, instead of failing.
      on_progress: called a few times a second.
      on_note: called with what is worth knowing before the conversion takes its time.
    Returns:
      The manifest, or None where parts remain to be merged.
    Raises:
      UserError: the source, OUT or images are not as they must be; OUT does not exist then, finished shards are kept.
    """
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out}: lies inside its own source. Choose a folder outside {src}")
    with _reporting_disk_errors():
        partial = _partial(out)
        source = open_source(src, source_options, partial / "scratch")
        job = _describe(source, options)
        for note in class_notes(job):
            on_note(note)
        if (out / MANIFEST).exists():
            return _already_there(out, job, source)
        _claim(partial, out, job)
        busy = f"another process is already working on {partial}, part {part[0] + 1}"
        with locked(partial / f".lock-{part[0]}-{part[1]}", busy):
            if not (partial / MANIFEST).is_file():  # else it was interrupted at the very end
                with locked(partial / ".lock-listing", "", wait=True), _nothing_left_behind(partial):
                    _list(partial, source, skip_bad)
                _write_shards(partial, source, source_options, options, workers, part, on_progress)
                if part[1] > 1:
                    return None
                _refuse_rejected(partial, skip_bad)
            return _finish(partial, out, job)


def merge(out: Path, skip_bad: bool = False) -> dict:
    """Finish a conversion whose parts are done.

    Raises:
      UserError: there is none, or shards are missing; they are named.
    """
    with _reporting_disk_errors():
        partial = _partial(out)
        if (out / MANIFEST).exists():
            _remove_leftovers(out)
            return read_manifest(out)
        if not (partial / _JOB).is_file():
            raise UserError(f"{partial}: not found. Run 'build' with --part 1/N to --part N/N first")
        job = _read_job(partial)
        with locked(partial / ".lock-merge", f"another process is already merging {partial}"):
            if not (partial / MANIFEST).is_file():
                _refuse_missing(partial, job)
                _refuse_rejected(partial, skip_bad)
            return _finish(partial, out, job)


def _refuse_missing(partial: Path, job: dict) -> None:
    unlisted = [split for split in job["splits"] if not _listing(partial, split).is_file()]
    shards = [shard for split in job["splits"] if split not in unlisted for shard in _shards(partial, split, job)]
    missing = [name for split, name in shards if not _is_done(partial, (split, name))]
    if missing or unlisted:
        raise UserError(
            f"{partial}: {len(missing)} shards are missing ({named([*unlisted, *missing])}). Run the parts that should "
            "write them"
        )


@contextlib.contextmanager
def _reporting_disk_errors() -> Iterator[None]:
    """Turns errors of disks that are full, read-only or failing into one line, wherever they happen."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}. {_help_with(error)}. {GO_ON}") from error


def _help_with(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Allow it, or choose another folder"
    return "Look at that file or disk"


# --- what is being converted ---


def _describe(source: Source, options: BuildOptions) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "made_with": {"tool": VERSION, "pillow": version("pillow"), "webdataset": version("webdataset")},
        "source": {
            "kind": source.kind,
            "name": source.root.resolve().name,
            "files": source.files,
            **({"columns": source.columns} if source.columns else {}),
        },
        "options": {
            "seed": options.seed,
            "samples_per_shard": options.samples_per_shard,
            **dataclasses.asdict(options.image),
        },
        "classes": source.classes,
        "class_names": source.class_names,
        "class_order": source.class_order,
        "splits": list(source.splits),
    }


def _partial(out: Path) -> Path:
    """Where a conversion lies until it is finished."""
    beside = out.parent / f"{out.name}.partial"
    return out / ".partial" if out.is_dir() and not beside.is_dir() else beside


def _already_there(out: Path, job: dict, source: Source) -> dict:
    manifest = read_manifest(out)
    _remove_leftovers(out)
    there = {**{key: manifest.get(key) for key in job}, "splits": list(manifest["splits"])}
    orders = class_order(manifest), job["class_order"]
    if {*orders} <= {"text", "unstated"}:  # the same order, whether somebody has stated it or not
        there["class_order"] = job["class_order"]
    different = _difference(there, job)
    for split, entry in manifest["splits"].items() if not different and not source.copies else ():
        if _digest(source.splits[split]()) != entry["listing_sha256"]:
            different = f"the source's {split} images are others by now"
    if different:
        raise UserError(f"{out}: exists already, made differently: {different}. Move it away, or choose another folder")
    if orders == ("unstated", "text"):
        write_synced(out / MANIFEST, manifest_bytes({**manifest, "class_order": "text"}))
    return read_manifest(out)


def _remove_leftovers(out: Path) -> None:
    """Remove what a process leaves of its own that was killed between its last two actions."""
    manifest, inside = read_manifest(out), out / ".partial"
    if _is_job_of(out / _JOB, manifest):
        (out / _JOB).unlink()
    if _is_job_of(inside / _JOB, manifest) and not contents_of(inside).folders:
        shutil.rmtree(inside)


def _is_job_of(path: Path, manifest: dict) -> bool:
    """Whether a file is the description of the conversion that made a dataset."""
    job = read_json(path)
    return all(job.get(key) == manifest[key] for key in ("source", "options", "classes"))


def _difference(there: dict, wanted: dict) -> str:
    """The first thing in which two jobs differ, in words; '' where they agree."""
    for key in there:
        if there[key] != wanted.get(key):
            if isinstance(there[key], dict) and isinstance(wanted.get(key), dict):
                return _difference({k: there[key].get(k) for k in {**there[key], **wanted[key]}}, wanted[key])
            return f"{key} was {clipped(there[key])}, now it is {clipped(wanted.get(key))}"
    return ""


def _claim(partial: Path, out: Path, job: dict) -> None:
    """Make OUT.partial ours, or make sure that it is."""
    path = partial / _JOB
    if not path.is_file():
        _refuse_occupied(partial, out)
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / ".lock-claim", "", wait=True):
            if not path.is_file():  # of several machines the first one says what the job is
                write_synced(path, json.dumps(job).encode())
    if different := _difference(_read_job(partial), job):
        raise UserError(
            f"{partial}: holds an unfinished conversion that is another one: {different}. Finish that one, "
            "move the folder away, or choose another"
        )


def _read_job(partial: Path) -> dict:
    path = partial / _JOB
    try:
        job = json.loads(path.read_text())
        assert {*job} >= {"source", "options", "classes", "splits"}
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"{path}: damaged, or not of this tool, so {partial} cannot be finished. Move that folder away"
        ) from error
    return job


def _refuse_occupied(partial: Path, out: Path) -> None:
    """Raise a UserError if OUT or OUT.partial is there and holds somebody's files."""
    if out.exists() and (not out.is_dir() or contents_of(out).visible):
        raise UserError(f"{out}: exists already and is not a dataset. Choose a folder that is empty or not there")
    if partial.is_dir() and any(not name.endswith(".partial") for name in contents_of(partial).visible):
        raise UserError(f"{partial}: exists and was not left by this tool. Move it away, or choose another folder")


# --- the listing ---


def _list(partial: Path, source: Source, skip_bad: bool) -> None:
    """Write the listing of each split, or make sure that it is still what the source holds.

    Raises:
      UserError: it is not, or something in the source is not understood and `skip_bad` is off; all of that is named.
    """
    new = [split for split in source.splits if not _listing(partial, split).is_file()]
    try:
        for split in source.splits:
            if split in new:
                _write_listing(partial, split, source)
            elif not source.copies and _digest(source.splits[split]()) != _listed(partial, split)["sha256"]:
                raise UserError(
                    f"{source.root}: its {split} images have changed since the conversion began. Put them back, or "
                    f"remove {partial} to begin again"
                )
        refuse_misplaced(
            source.root, (each for split in source.splits for each in read_unused(partial, split)), skip_bad
        )
        for split in source.splits:
            if not _num_listed(partial, split):
                raise UserError(f"{source.root}: no images in split {split}. Add some, or move the empty split away")
    except UserError:
        for split in new:  # no shard was written from it, and the person may now change the source
            _listing(partial, split).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _nothing_left_behind(partial: Path) -> Iterator[None]:
    """After an error, remove OUT.partial if nothing was listed before: the next command may be another one."""
    try:
        yield
    except UserError:
        if not any((partial / "listing").glob("*.json")):
            shutil.rmtree(partial)
        raise


def _write_listing(partial: Path, split: str, source: Source) -> None:
    about = _listing(partial, split)
    about.parent.mkdir(exist_ok=True)
    digest, position, count = hashlib.sha256(), 0, 0
    with (
        replacing(about.with_suffix(".jsonl")) as file,
        replacing(about.with_suffix(".starts")) as starts,
        replacing(about.with_suffix(".unused.jsonl")) as unused,
    ):
        for entry in source.splits[split]():
            line = _line(entry)
            digest.update(line)
            if isinstance(entry, Unused):
                unused.write(json.dumps(dataclasses.astuple(entry)).encode() + b"\n")
                continue
            starts.write(position.to_bytes(8, "little"))
            position, count = position + len(line), count + 1
            file.write(line)
    write_synced(about, json.dumps({"samples": count, "sha256": digest.hexdigest()}).encode())


def _listing(partial: Path, split: str) -> Path:
    return partial / "listing" / f"{split}.json"


def _listed(partial: Path, split: str) -> dict:
    return json.loads(_listing(partial, split).read_text())


def read_unused(partial: Path, split: str) -> list[Unused]:
    """What the listing of a split found that is no sample."""
    path = _listing(partial, split).with_suffix(".unused.jsonl")  # older conversions have none
    return [Unused(*json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def refuse_misplaced(root: Path, unused: Iterable[Unused], skip_bad: bool) -> None:
    """Raise a UserError that names, by reason, what would be left out, unless the person has decided to skip it."""
    reasons: dict[str, list[str]] = {}
    for each in unused:
        if each.kind == MISPLACED:
            reasons.setdefault(each.reason, []).append(each.source)
    if not reasons or skip_bad:
        return
    total = sum(map(len, reasons.values()))
    raise UserError(
        f"{root}: {total} {'entry' if total == 1 else 'entries'} would be left out. {grouped(reasons)}. Or leave "
        f"{'it' if total == 1 else 'them'} out with --on-bad skip"
    )


def _line(entry: Entry | Unused) -> bytes:
    """What the listing's hash covers: samples, and what a person may have decided to leave out."""
    if isinstance(entry, Unused):
        return json.dumps([entry.kind, entry.source]).encode() + b"\n" if entry.kind == MISPLACED else b""
    return json.dumps([entry.key, entry.label, entry.location, entry.source]).encode() + b"\n"


def _digest(entries: Iterator[Entry | Unused]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(_line(entry))
    return digest.hexdigest()


class Listing:
    """The samples of a split, any of them read on its own from the listing on disk."""

    def __init__(self, partial: Path, split: str):
        self._starts = np.memmap(partial / "listing" / f"{split}.starts", dtype="<u8", mode="r")
        self._lines = open(partial / "listing" / f"{split}.jsonl", "rb")  # noqa: SIM115 (open as long as the worker)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Entry:
        self._lines.seek(int(self._starts[i]))
        return Entry(*json.loads(self._lines.readline()))


def _num_listed(partial: Path, split: str) -> int:
    return _listed(partial, split)["samples"]


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
    source_options: SourceOptions,
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
    counters = RawArray("Q", 2 * workers)  # images and bytes, a pair for each worker: nothing is locked
    start = functools.partial(_start_worker, partial, source.root, source_options, options, counters)

    def tell() -> None:
        on_progress(Progress(sum(counters[0::2]), sum(counters[1::2]), total))

    try:
        for _ in run_jobs(_write_one, missing, workers, start=start, on_wait=tell):
            pass
    except LostWorkerError as error:
        message = f"a worker was killed, perhaps for want of memory; use fewer --workers then. {GO_ON}"
        raise UserError(message) from error


def _rows(shard: tuple[str, str], samples: int, samples_per_shard: int) -> range:
    """Which of a split's samples, in the order in which they are written, are a shard's."""
    number = int(shard[1].rpartition("-")[2])
    return range(number * samples_per_shard, min((number + 1) * samples_per_shard, samples))


class _Worker:
    """What a worker process opens once."""

    def __init__(
        self,
        partial: Path,
        root: Path,
        source_options: SourceOptions,
        options: BuildOptions,
        counters: ctypes.Array,
        number: int,
    ):
        self.partial = partial
        self.options = options
        self.counters = counters
        self.number = number
        self.read = open_source(root, source_options, partial / "scratch").read
        self.listings = {path.stem: Listing(partial, path.stem) for path in (partial / "listing").glob("*.json")}

    def count(self, nbytes: int) -> None:
        self.counters[2 * self.number] += 1
        self.counters[2 * self.number + 1] += nbytes

    def entries(self, shard: tuple[str, str]) -> Iterator[Entry]:
        """The samples of a shard: training samples in the seed's order, others as listed."""
        listing = self.listings[shard[0]]
        rows = np.array(_rows(shard, len(listing), self.options.samples_per_shard))
        if shard[0] == "train":
            rows = rng.permute(self.options.seed, rng.Stream.SHARDS, 0, len(listing), rows)
        return (listing[i] for i in rows.tolist())


_worker: _Worker | None = None


def _start_worker(
    partial: Path,
    root: Path,
    source_options: SourceOptions,
    options: BuildOptions,
    counters: ctypes.Array,
    number: int,
) -> None:
    global _worker
    _worker = _Worker(partial, root, source_options, options, counters, number)


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
        where = ""
        if len(rejected) > _NAMED:
            write_synced(partial / "rejected.txt.partial", "\n".join(rejected).encode())
            where = f", all of them in {partial}/rejected.txt.partial"
        raise UserError(
            f"{len(rejected)} images cannot be used: {named(rejected, _NAMED)}{where}. "
            "Repair them and run the same command again, or leave them out with --on-bad skip"
        )


def _finish(partial: Path, out: Path, job: dict) -> dict:
    """Index, manifest, and the final name."""
    if not (partial / MANIFEST).is_file():
        description = {key: value for key, value in job.items() if key != "splits"}
        shards = {split: [name for _, name in _shards(partial, split, job)] for split in job["splits"]}
        unused = [each for split in job["splits"] for each in read_unused(partial, split)]
        manifest = assemble(partial, partial / "records", description, shards, unused)
        for split, entry in manifest["splits"].items():
            entry["listing_sha256"] = _listed(partial, split)["sha256"]
        write_synced(partial / MANIFEST, manifest_bytes(manifest))
    for leftover in ("listing", "records", "scratch"):
        shutil.rmtree(partial / leftover, ignore_errors=True)
    for path in [*partial.glob(".lock-*"), *partial.rglob("*.partial")]:
        path.unlink(missing_ok=True)
    if out.is_dir():
        _move_up(partial, out)
    else:
        partial.rename(out)
    _remove_leftovers(out)
    sync_folder(out.parent)
    return read_manifest(out)


def _move_up(partial: Path, out: Path) -> None:
    """Move what is finished into an OUT that was there; with the manifest, which comes last, it is a dataset."""
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        if path.name != _JOB:
            path.rename(out / path.name)
    sync_folder(out)
    shutil.rmtree(partial)


def assemble(
    root: Path, records: Path, description: dict, shards: dict[str, list[str]], unused: Iterable[Unused] = ()
) -> dict:
    """Make the index of each split and the audit's file from the records of all shards.

    Args:
      root: the dataset folder.
      records: folder with SPLIT/NAME.json.
      description: the manifest's part that says what the dataset is.
      shards: split -> names of its shards, in order.
      unused: what of the source is no sample.
    Returns:
      The manifest, not yet written.
    """
    paths = {split: [records / split / f"{name}.json" for name in names] for split, names in shards.items()}
    num_classes = len(description["classes"])
    splits = {split: _write_index(root / split / INDEX, found, num_classes) for split, found in paths.items()}
    with replacing(root / AUDIT) as file:
        audit = _write_audit(file, paths, unused)
    return {**description, "tool": TOOL, "splits": splits, "audit": {**audit, "sha256": sha256_of(root / AUDIT)}}


def _write_audit(file: BinaryIO, records: dict[str, list[Path]], unused: Iterable[Unused]) -> dict:
    """Write every remark, a line of JSON each. Returns how many of each kind there are, and the first few."""
    kinds = ("repaired", "rejected", "tiny", "oriented", "duplicates", "hidden", "left_out")
    counts, examples, resized = dict.fromkeys(kinds, 0), {kind: [] for kind in kinds}, 0

    def remark(kind: str, item) -> None:
        counts[kind] += 1
        if len(examples[kind]) < _EXAMPLES:
            examples[kind].append(item)
        file.write(json.dumps({"kind": kind, "what": item}).encode() + b"\n")

    for split, paths in records.items():
        for record in map(read_record, paths):
            resized += record.notes["resized"]
            for kind in ("repaired", "rejected"):
                for item in record.notes[kind]:
                    remark(kind, {**item, "sample": f"{split}/{item['sample']}"})
            for key in record.notes["tiny"]:
                remark("tiny", f"{split}/{key}")
            for row in record.rows:
                if row["orientation"] != 1:
                    remark("oriented", f"{split}/{row['key']}")
    for group in find_duplicates([path for paths in records.values() for path in paths]):
        remark("duplicates", group)
    for each in unused:
        if each.kind == HIDDEN:
            remark("hidden", each.source)
        else:
            remark("left_out", {"source": each.source, "reason": each.reason})
    return {"counts": {**counts, "resized": resized}, **examples}


def _write_index(path: Path, records: list[Path], num_classes: int) -> dict:
    """Write a split's index from its shards' records, one after the other. Returns its entry in the manifest."""
    key_bytes = samples = 0
    for record in map(read_record, records):
        samples += len(record.rows)
        key_bytes = max([key_bytes, *(len(row["key"].encode()) for row in record.rows)])
    if not samples:
        raise UserError(f"{path.parent.name}: no image of this split can be used. Look at the source")
    dtype = sample_dtype(key_bytes)
    entries, counts = [], np.zeros(num_classes, dtype=np.int64)
    with replacing(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_2_0(file, header)
        for number, record in enumerate(map(read_record, records)):
            entries.append(record.entry)
            rows = np.zeros(len(record.rows), dtype=dtype)
            for field in dtype.names:
                rows[field] = number if field == "shard" else [_encoded(row[field]) for row in record.rows]
            file.write(rows.tobytes())
            counts += np.bincount(rows["label"], minlength=num_classes)
    index_sha256 = sha256_of(path)
    return {
        "samples": samples,
        "bytes": sum(entry["bytes"] for entry in entries),
        "class_counts": counts.tolist(),
        "index_sha256": index_sha256,
        "digest": split_digest(index_sha256, [entry["sha256"] for entry in entries]),
        "shards": entries,
    }


def _encoded(value: int | str) -> int | bytes:
    return value.encode() if isinstance(value, str) else value


def find_duplicates(records: list[Path]) -> list[list[str]]:
    """Groups of samples, as SPLIT/KEY, whose sources have the same content, within a split and across splits.

    The hashes are gone through several times, each time for another share of them, so that memory does not grow with
    the dataset.
    """
    paths = [path.with_suffix(".sha256") for path in records]
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
