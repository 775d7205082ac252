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

import contextlib
import ctypes
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError, clipped, named, system_error_text
from pipelines.common.files import locked, move_entries, read_json, sync_folder, write_synced
from pipelines.plan import rng
from pipelines.shards.manifest import FORMAT_VERSION, MANIFEST, class_order, manifest_bytes, read_manifest
from tools.lib.common.process_pool import LostWorkerError, run_jobs
from tools.lib.shards.assembly import VERSION, assemble
from tools.lib.shards.class_notes import class_notes
from tools.lib.shards.entries import (
    RECOGNISE,
    Entry,
    Source,
    SourceOptions,
    contents_of,
)
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.listing import (
    Listing,
    digest_of,
    list_source,
    listed,
    nothing_left_behind,
    num_listed,
    path_of,
    read_unused,
)
from tools.lib.shards.shards import read_record, write_shard
from tools.lib.shards.sources import open_source

KEPT = "Finished shards are kept, and the same command resumes"
_JOB = "job.json"
_NAMED = 5  # rejected images in an error; a longer list goes into a file


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
    with reporting_disk_errors(out, f". {KEPT}"):
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
                with locked(partial / ".lock-listing", "", wait=True), nothing_left_behind(partial):
                    list_source(partial, source, skip_bad)
                _write_shards(partial, source, source_options, options, workers, part, on_progress)
                if part[1] > 1:
                    return None
                _check_rejected(partial, skip_bad)
            return _finish(partial, out, job)


def merge(out: Path, skip_bad: bool = False) -> dict:
    """Finish a conversion whose parts are done.

    Raises:
      UserError: there is none, or shards are missing; they are named.
    """
    with reporting_disk_errors(out, f". {KEPT}"):
        partial = _partial(out)
        if (out / MANIFEST).exists():
            _remove_leftovers(out)
            return read_manifest(out)
        if not (partial / _JOB).is_file():
            raise UserError(f"{partial}: not found. Run 'build' with --part 1/N to --part N/N first")
        job = _read_job(partial)
        with locked(partial / ".lock-merge", f"another process is already merging {partial}"):
            if not (partial / MANIFEST).is_file():
                _check_complete(partial, job)
                _check_rejected(partial, skip_bad)
            return _finish(partial, out, job)


def _check_complete(partial: Path, job: dict) -> None:
    unlisted = [split for split in job["splits"] if not path_of(partial, split).is_file()]
    shards = [shard for split in job["splits"] if split not in unlisted for shard in _shards(partial, split, job)]
    missing = [name for split, name in shards if not _is_done(partial, (split, name))]
    if missing or unlisted:
        raise UserError(
            f"{partial}: {len(missing) or 'all'} shards are missing ({named([*unlisted, *missing])}). Run the parts "
            "that should write them"
        )


@contextlib.contextmanager
def reporting_disk_errors(place: Path, more: str = "") -> Iterator[None]:
    """Turns errors of disks that are full, read-only or failing into one line, wherever they happen.

    Args:
      place: named where the error names no file itself, as those of writing do.
      more: added to the line.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename else f"{place}: "
        raise UserError(f"{where}{system_error_text(error)}{more}") from error


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
    if not out.is_dir():
        return beside
    if beside.is_dir() and beside.stat().st_dev != out.stat().st_dev and (beside / _JOB).is_file():
        raise UserError(
            f"{beside}: the conversion began there, and {out} is a folder of another file system now. Move it to "
            f"{out / '.partial'} and run the same command again"
        )
    return beside if beside.is_dir() else out / ".partial"


def _already_there(out: Path, job: dict, source: Source) -> dict:
    manifest = read_manifest(out)
    _remove_leftovers(out)
    orders = class_order(manifest), job["class_order"]
    there = {**{key: manifest.get(key) for key in job}, "splits": list(manifest["splits"]), "class_order": orders[0]}
    if {*orders} <= {"text", "unstated"}:  # the same order, whether somebody has stated it or not
        there["class_order"] = job["class_order"]
    different = _difference(there, job)
    for split, entry in manifest["splits"].items() if not different and not source.copies else ():
        if digest_of(source.splits[split]()) != entry.get("listing_sha256"):
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
        (out / _JOB).unlink(missing_ok=True)
    if _is_job_of(inside / _JOB, manifest) and not contents_of(inside).folders:
        shutil.rmtree(inside)


def _is_job_of(path: Path, manifest: dict) -> bool:
    """Return whether a file is the description of the conversion that made a dataset."""
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
        _check_free(partial, out)
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


def _check_free(partial: Path, out: Path) -> None:
    """Raise a UserError if OUT or OUT.partial is there and holds somebody's files."""
    if out.exists() and (not out.is_dir() or contents_of(out).visible):
        raise UserError(f"{out}: exists already and is not a dataset. Choose a folder that is empty or not there")
    if partial.is_dir() and any(not name.endswith(".partial") for name in contents_of(partial).visible):
        raise UserError(f"{partial}: exists and was not left by this tool. Move it away, or choose another folder")


def _shards(partial: Path, split: str, job: dict) -> list[tuple[str, str]]:
    """(split, name) of a split's shards."""
    count = -(-num_listed(partial, split) // job["options"]["samples_per_shard"])
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
    total = sum(len(_rows(shard, num_listed(partial, shard[0]), options.samples_per_shard)) for shard in missing)
    counters = RawArray("Q", 2 * workers)  # images and bytes, a pair for each worker: nothing is locked
    start = functools.partial(_start_worker, _WorkerTask(partial, source.root, source_options, options, counters))

    def tell() -> None:
        on_progress(Progress(sum(counters[0::2]), sum(counters[1::2]), total))

    try:
        for _ in run_jobs(_write_one, missing, workers, start=start, on_wait=tell, preload=["webdataset"]):
            pass
    except LostWorkerError as error:
        message = f"a worker was killed, perhaps for want of memory; use fewer --workers then. {KEPT}"
        raise UserError(message) from error


def _rows(shard: tuple[str, str], samples: int, samples_per_shard: int) -> range:
    """Which of a split's samples, in the order in which they are written, are a shard's."""
    number = int(shard[1].rpartition("-")[2])
    return range(number * samples_per_shard, min((number + 1) * samples_per_shard, samples))


@dataclasses.dataclass(frozen=True)
class _WorkerTask:
    """A conversion as every worker process needs it; `counters` are those of all workers."""

    partial: Path
    root: Path
    source_options: SourceOptions
    options: BuildOptions
    counters: ctypes.Array


class _Worker:
    """Opens once what a worker process reads again and again."""

    def __init__(self, task: _WorkerTask, number: int):
        self.partial, self.options, self.counters = task.partial, task.options, task.counters
        self.number = number
        self.read = open_source(task.root, task.source_options, task.partial / "scratch").read
        self.listings = {
            path.stem: Listing(self.partial, path.stem) for path in (self.partial / "listing").glob("*.json")
        }

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


def _start_worker(task: _WorkerTask, number: int) -> None:
    global _worker
    _worker = _Worker(task, number)


def _write_one(split: str, name: str) -> None:
    path, records = _worker.partial / split / f"{name}.tar", _worker.partial / "records" / split
    write_shard(path, records, _worker.entries((split, name)), _worker.read, _worker.options.image, _worker.count)


# --- the end ---


def _check_rejected(partial: Path, skip_bad: bool) -> None:
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
            entry["listing_sha256"] = listed(partial, split)["sha256"]
        write_synced(partial / MANIFEST, manifest_bytes(manifest))
    for leftover in ("listing", "records", "scratch"):
        if (partial / leftover).exists():  # an error ends the command here, and the same command removes the rest
            shutil.rmtree(partial / leftover)
    for path in [*partial.glob(".lock-*"), *partial.rglob("*.partial")]:
        path.unlink(missing_ok=True)
    if out.is_dir():  # it was there, empty; with the manifest it is a dataset
        try:
            move_entries(partial, out, (MANIFEST, _JOB))
        except FileExistsError as error:
            raise UserError(f"{error.filename}: was put there meanwhile. Move it away, and run this again") from error
    else:
        partial.rename(out)
    _remove_leftovers(out)
    sync_folder(out)
    sync_folder(out.parent)
    return read_manifest(out)
