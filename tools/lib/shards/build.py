"""A whole conversion: listed once, written shard by shard in parallel, finished atomically, resumable at any moment.

conversion.py says what lies where until it is finished.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError, named
from pipelines.common.files import locked, move_entries, sync_folder, write_synced
from pipelines.plan import rng
from pipelines.shards.manifest import MANIFEST, Manifest, manifest_bytes, read_manifest
from tools.lib.common.process_pool import LostWorkerError, run_jobs
from tools.lib.shards.conversion import (
    JOB,
    BuildOptions,
    Conversion,
    Shard,
    check_same,
    claim,
    describe,
    finished,
    partial_folder,
    read_job,
    reporting_disk_errors,
)
from tools.lib.shards.listing import list_source, listed, path_of, read_entries, read_unused
from tools.lib.shards.manifest_builder import assemble
from tools.lib.shards.shard import read_record, write_shard
from tools.lib.shards.sources import RECOGNISE, SourceOptions, open_source
from tools.lib.shards.summary import class_notes

KEPT = "Finished shards are kept, and the same command resumes"
_NAMED = 5  # An error names this many rejected images; a longer list goes into a file.


def build(
    src: Path,
    out: Path,
    options: BuildOptions,
    *,
    source_options: SourceOptions = RECOGNISE,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    skip_bad: bool = False,
    on_shard: Callable[[int, int], None] = lambda i, n: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Manifest | None:
    """Convert a source, from wherever an earlier call with the same arguments was interrupted.

    Args:
      part: (i, n): write every n-th shard, beginning with i. With n > 1 `merge` finishes the dataset.
      skip_bad: leave out images that cannot be used, and what of the source is not understood, instead of failing.
      on_shard: called with the number of shards that this command has written, and that it has to write.
      on_note: called with remarks about the source before the conversion begins.
    Returns:
      The manifest, or None where parts remain to be merged.
    Raises:
      UserError: the source, OUT or images cannot be used. OUT does not exist then, and finished shards are kept.
    """
    if src.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out}: lies inside its own source. Choose a folder outside {src}")
    with reporting_disk_errors(out, f". {KEPT}"):
        partial = partial_folder(out)
        source = open_source(src, source_options, partial / "scratch")
        conversion = Conversion(out, partial, describe(source, options))
        for note in class_notes(conversion.job):
            on_note(note)
        if (out / MANIFEST).exists():
            return check_same(conversion, source)
        claim(conversion)
        busy = f"another process is already working on {partial}, part {part[0] + 1}"
        with locked(partial / f".lock-{part[0]}-{part[1]}", busy):
            if not conversion.is_assembled:  # Otherwise an earlier command was interrupted at its very end.
                with locked(partial / ".lock-listing", "", wait=True):
                    list_source(partial, source, skip_bad)
                mine = [shard for split in source.splits for shard in conversion.shards(split)][part[0] :: part[1]]
                jobs = [(partial, source.read, options, shard) for shard in mine if not conversion.is_done(shard)]
                for split in source.splits:
                    (partial / split).mkdir(exist_ok=True)
                    (partial / "records" / split).mkdir(parents=True, exist_ok=True)
                results = run_jobs(_write_one, jobs, workers, preload=["webdataset"]) if jobs else ()
                try:
                    for done, _ in enumerate(results, 1):
                        on_shard(done, len(jobs))
                except LostWorkerError as error:
                    raise LostWorkerError(f"{error}. {KEPT}") from error
                if part[1] > 1:
                    return None
                _check_rejected(partial, skip_bad)
            return _finish(conversion)


def merge(out: Path, skip_bad: bool = False) -> Manifest:
    """Finish a conversion whose parts are done.

    Raises:
      UserError: there is none, or shards are missing; they are named.
    """
    with reporting_disk_errors(out, f". {KEPT}"):
        partial = partial_folder(out)
        if (out / MANIFEST).exists():
            return finished(out)
        if not partial.is_dir():
            raise UserError(f"{partial}: not found. Run 'build' with --part 1/N to --part N/N first")
        conversion = Conversion(out, partial, read_job(partial))
        with locked(partial / ".lock-merge", f"another process is already merging {partial}"):
            if not conversion.is_assembled:
                _check_complete(conversion)
                _check_rejected(partial, skip_bad)
            return _finish(conversion)


def _check_complete(conversion: Conversion) -> None:
    """Raise a UserError that names the shards that no part has written."""
    splits = conversion.job["splits"]
    unlisted = [split for split in splits if not path_of(conversion.partial, split).is_file()]
    shards = [shard for split in splits if split not in unlisted for shard in conversion.shards(split)]
    missing = [shard.name for shard in shards if not conversion.is_done(shard)]
    if missing or unlisted:
        raise UserError(
            f"{conversion.partial}: {len(missing) or 'all'} shards are missing ({named([*unlisted, *missing])}). Run "
            "the parts that should write them"
        )


def _write_one(partial: Path, read: Callable[[str], bytes], options: BuildOptions, shard: Shard) -> None:
    """Write a shard: training samples in the seed's order, others as listed."""
    samples, start = listed(partial, shard.split)["samples"], shard.number * options.samples_per_shard
    rows = np.arange(start, min(start + options.samples_per_shard, samples))
    if shard.split == "train":
        rows = rng.permute(options.seed, rng.Stream.SHARDS, 0, samples, rows)
    entries = read_entries(partial, shard.split, rows.tolist())
    records = partial / "records" / shard.split
    write_shard(partial / shard.split / f"{shard.name}.tar", records, entries, read, options.image)


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


def _finish(conversion: Conversion) -> Manifest:
    """Write index and manifest, and give the dataset its final name."""
    partial, out, splits = conversion.partial, conversion.out, conversion.job["splits"]
    if not conversion.is_assembled:
        description = {key: value for key, value in conversion.job.items() if key != "splits"}
        shards = {split: [shard.name for shard in conversion.shards(split)] for split in splits}
        unused = [each for split in splits for each in read_unused(partial, split)]
        manifest = assemble(partial, partial / "records", description, shards, unused)
        for split, entry in manifest["splits"].items():
            entry["listing_sha256"] = listed(partial, split)["sha256"]
        write_synced(partial / MANIFEST, manifest_bytes(manifest))
    for leftover in ("listing", "records", "scratch"):
        if (partial / leftover).exists():  # If this fails, the same command removes the rest.
            shutil.rmtree(partial / leftover)
    for path in [*partial.glob(".lock-*"), *partial.rglob("*.partial"), partial / JOB]:
        path.unlink(missing_ok=True)
    if out.is_dir():  # The folder was there, empty; the manifest makes it a dataset.
        try:
            move_entries(partial, out, (MANIFEST,))
        except FileExistsError as error:
            raise UserError(f"{error.filename}: was put there meanwhile. Move it away, and run this again") from error
    else:
        partial.rename(out)
    sync_folder(out)
    sync_folder(out.parent)
    return read_manifest(out)
