"""An existing WebDataset, indexed where it lies: its tars are read and never written.

Everything is made in the hidden folder .index.partial. Once its manifest is there the index is complete, and its files
are moved up, the manifest last; a later command resumes that move if the tars are still the same.
"""

import collections
import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.common.errors import UserError, clipped, grouped
from pipelines.common.files import locked, read_json, sha256_of, sync_folder, write_synced
from pipelines.shards.manifest import FORMAT_VERSION, MANIFEST, Manifest, manifest_bytes, read_manifest
from tools.lib.common.process_pool import run_jobs
from tools.lib.shards.conversion import reporting_disk_errors
from tools.lib.shards.images import ImageOptions, RejectedImageError
from tools.lib.shards.listing import check_misplaced
from tools.lib.shards.manifest_builder import VERSION, Description, SourceDescription, assemble
from tools.lib.shards.shard import RecordBuilder, dali_index, read_record
from tools.lib.shards.sources.contents import contents_of, is_utf8, printable
from tools.lib.shards.sources.source import EXPECTED, HIDDEN, Unused
from tools.lib.shards.sources.tars import Parts
from tools.lib.shards.sources.webdataset import (
    INDEX_LOCK,
    INDEX_PARTIAL,
    find_tars,
    read_image,
    read_label,
    tar_members,
    used_parts,
)


def index_webdataset(
    root: Path,
    *,
    out: Path | None = None,
    audit: bool = True,
    skip_bad: bool = False,
    workers: int = 1,
    on_shard: Callable[[int, int], None] = lambda i, n: None,
) -> Manifest:
    """Write index, .idx files and manifest beside the tars of ROOT/{train,val}/*.tar.

    Images keep their bytes, so one that no pipeline can use is left out of the index, never repaired.

    Args:
      out: a folder that gets links to the tars, and the index; ROOT is not written to then.
      skip_bad: leave out samples that cannot be used, and what in ROOT is not understood, instead of failing.
    Returns:
      The manifest.
    Raises:
      UserError: there are no tars, ROOT is indexed already, or something in it cannot be used (all of that is named).
    """
    if out and root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: lies in {root} itself. Choose a folder outside of it")
    found, unused = find_tars(root)
    if "train" not in found:
        raise UserError(
            f"{root}: no train/*.tar below it. Expected uncompressed WebDataset tars (jpg, cls) in train/ and val/. "
            "Images in folders are converted with 'build'"
        )
    check_misplaced(root, unused, skip_bad)
    home = out or root
    with (
        reporting_disk_errors(home, "" if out else ". Or have the index elsewhere: --out DIR"),
        _alone(home) as partial,
    ):
        if not _is_of(read_json(partial / MANIFEST), found, audit, skip_bad):
            shutil.rmtree(partial)
            partial.mkdir()
            if out and contents_of(out).visible:
                raise UserError(f"--out {out}: holds something else. Choose a new folder")
            jobs = []
            for split, paths in found.items():
                records = partial / "records" / split
                (partial / split).mkdir()
                records.mkdir(parents=True)
                for path in paths:
                    if out:
                        (partial / split / path.name).symlink_to(path.resolve())
                    jobs.append((path, home / split, partial / split, records / f"{path.stem}.json", audit))
            for done, _ in enumerate(run_jobs(_read_shard, jobs, workers), 1):
                on_shard(done, len(jobs))
            _assemble(home, partial, found, unused, audit, skip_bad)
        _move_up(partial, home)
    return read_manifest(home)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[Path]:
    """A folder in `home` that no other process uses: it is empty, or holds a complete index.

    Raises:
      UserError: another process is at work there, or has finished.
    """
    is_new, partial = not home.exists(), home / INDEX_PARTIAL
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / INDEX_LOCK, f"another process is already indexing {home}"):
        try:
            if (home / MANIFEST).exists():
                raise UserError(f"{home / MANIFEST}: exists already. Move it away to index the folder again")
            if not (partial / MANIFEST).is_file():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            yield partial
        finally:
            if not (partial / MANIFEST).is_file():
                shutil.rmtree(partial, ignore_errors=True)
            (home / INDEX_LOCK).unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # It holds the index.
                    home.rmdir()


def _is_of(manifest: dict, found: dict[str, list[Path]], audit: bool, skip_bad: bool) -> bool:
    """Return whether a manifest is of these tars, by their names and bytes, and of these options; {} is of none."""
    splits = manifest.get("splits", {}).items()
    shards = {split: [(each["name"], each["bytes"]) for each in entry["shards"]] for split, entry in splits}
    return (
        shards == {split: [(path.name, path.stat().st_size) for path in paths] for split, paths in found.items()}
        and manifest["options"] == {"audit": audit}
        and (skip_bad or not manifest["audit"]["counts"]["rejected"])
    )


def _move_up(partial: Path, home: Path) -> None:
    """Move the files of a complete index to their places, which may be folders of another file system."""
    paths = [path for path in partial.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in sorted(paths, key=lambda path: (path.name == MANIFEST, path)):
        target = home / path.relative_to(partial)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            if path.is_symlink():
                shutil.move(path, target)
            else:  # The copy is on the disk before the manifest is there.
                write_synced(target, path.read_bytes())
                path.unlink()
        sync_folder(target.parent)


def _assemble(
    home: Path, partial: Path, found: dict[str, list[Path]], unused: list[Unused], audit: bool, skip_bad: bool
) -> None:
    """Make index, audit and manifest from the records of all tars.

    Raises:
      UserError: samples cannot be used and `skip_bad` is off, or the class numbers make no sense.
    """
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    parts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    unused, samples, top, where = list(unused), 0, -1, ""
    for split, path in ((split, path) for split, paths in found.items() for path in paths):
        record = read_record(partial / "records" / split / f"{path.stem}.json")
        for item in record.notes["rejected"]:
            reasons[item["reason"]].append(f"{item['source']}: {clipped(item['sample'], 30)}")
        unused += [Unused(HIDDEN, name) for name in record.notes["hidden"]]
        parts[split].update(record.notes["parts"])
        samples += len(record.rows)
        largest = max([row["label"] for row in record.rows], default=-1)
        if largest > top:
            top, where = largest, f"{split}/{path.name}"
    if reasons and not skip_bad:
        raise UserError(f"samples cannot be used: {grouped(reasons, 3)}. Or leave out what cannot: --on-bad skip")
    if top >= max(1000, 100 * samples):
        raise UserError(f"{where}: class numbers up to {top} for {samples} samples. Look at the cls files")
    for split, counts in parts.items():
        for extension, count in sorted(counts.items()):
            reason = "training reads images and class numbers"
            unused.append(Unused(EXPECTED, f"{split}: {count:,} parts .{extension}", reason))
    description: Description = {
        "format_version": FORMAT_VERSION,
        "made_with": {"tool": VERSION},
        "source": SourceDescription(kind="webdataset", name=home.resolve().name, files={}),
        "options": {"audit": audit},
        "classes": [str(label) for label in range(top + 1)],
        "class_names": [],
        "class_order": "given",
    }
    shards = {split: [path.stem for path in paths] for split, paths in found.items()}
    manifest = assemble(partial, partial / "records", description, shards, unused)
    shutil.rmtree(partial / "records")
    write_synced(partial / MANIFEST, manifest_bytes(manifest))


def _read_shard(path: Path, home: Path, partial: Path, record: Path, audit: bool) -> None:
    """Record what a tar holds; misfits are rejected, since they cannot be repaired without rewriting it.

    Args:
      home: the folder in which its .idx file may be already; if not, it is written to `partial`.
      record: the file to write.
    """
    found, unread = RecordBuilder(), collections.Counter()
    (samples, hidden), source = tar_members(path), f"{path.parent.name}/{path.name}"
    with open(path, "rb") as file:
        for key, parts in samples.items():
            try:
                if not is_utf8(key):
                    raise RejectedImageError("its name is not UTF-8: pack the tar again with another name")
                image_part, label_part = used_parts(parts)
                label = read_label(file, *parts[label_part])
                image = read_image(file, *parts[image_part], ImageOptions(audit=audit))
            except RejectedImageError as error:
                found.reject(printable(key), source, str(error))
                continue
            found.add(key, label, parts[image_part][0], image, image.jpeg)
            unread.update(set(parts) - {image_part, label_part})
    found.notes["hidden"] = [f"{source}: {name}" for name in hidden]
    found.notes["parts"] = unread
    there = home / f"{path.stem}.idx"
    idx = _idx_of(there, samples)
    if not there.exists():
        write_synced(partial / there.name, idx)
    found.write(record, path, sha256_of(path), idx)


def _idx_of(there: Path, samples: dict[str, Parts]) -> bytes:
    """The content of a tar's .idx file: of the one that is there, if it describes the tar in either version.

    Raises:
      UserError: it describes another tar, or is no file.
    """
    expected = dali_index(samples)
    if not os.path.lexists(there):
        return expected
    if there.is_file() and there.stat().st_size <= 2 * len(expected):  # Nothing is read from a pipe, or without end.
        content = there.read_bytes()
        # DALI's own wds2idx keeps upper-case extensions.
        older = dali_index(samples, "v1.1")
        if content.lower().split() in (expected.lower().split(), older.lower().split()):
            return content
    raise UserError(f"{there}: describes another tar. Move it away to have it written")
