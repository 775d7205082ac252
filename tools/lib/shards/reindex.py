"""An existing WebDataset, indexed where it lies: its tars are read and never written."""

import collections
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.common.errors import UserError, clipped, grouped, named
from pipelines.common.files import locked, sha256_of, write_synced
from pipelines.shards.manifest import FORMAT_VERSION, MANIFEST, Manifest, manifest_bytes, read_manifest
from tools.lib.common.process_pool import run_jobs
from tools.lib.shards.conversion import reporting_disk_errors
from tools.lib.shards.images import ImageOptions, RejectedImageError
from tools.lib.shards.listing import check_misplaced
from tools.lib.shards.manifest_builder import VERSION, Description, SourceDescription, assemble
from tools.lib.shards.shard import RecordBuilder, Rejection, dali_index, describes, read_record
from tools.lib.shards.sources.contents import contents_of, is_utf8, printable
from tools.lib.shards.sources.source import EXPECTED, HIDDEN, MISPLACED, SPLITS, Unused
from tools.lib.shards.sources.tars import Parts, check_compressed
from tools.lib.shards.sources.webdataset import (
    INDEX_LOCK,
    INDEX_RECORDS,
    advice_without_train,
    find_tars,
    is_label,
    is_leftover,
    read_sample,
    tar_members,
)

_MAX_IDX_LINE = 1 << 16  # No line of an .idx file, which describes a sample, has more bytes.
_VALUE = re.compile(r"'[^']*'")  # A reason for rejecting a sample quotes first what was found.


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
    home = out or root
    _check_new(home)
    found, unused = find_tars(root)
    for split in SPLITS:
        if (root / split).is_dir() and not contents_of(root / split).visible:
            raise UserError(f"{root / split}: an empty folder. Put the tars of the split there, or remove it")
    has_train = (root / "train").is_dir()
    if "train" in found or (has_train and contents_of(root / "train").files):
        check_misplaced(root, unused, skip_bad)
    if "train" not in found:
        raise UserError(f"{root}: no train/*.tar below it. {advice_without_train(root)}")
    check_compressed(root, [path for paths in found.values() for path in paths])
    with reporting_disk_errors(home), _removed_if_empty(home):
        if out:
            links = _links(root, found, out)
            out.mkdir(parents=True, exist_ok=True)
            _check_writable([out], "Choose another folder")
        else:
            helps = f"Have the index in a new folder: index {root} --out DIR"
            links = {}
            _check_writable([root, *(root / split for split in found)], helps)
        with _alone(home):
            return _index(home, found, links, unused, ImageOptions(audit=audit), skip_bad, workers, on_shard)


def _check_new(home: Path) -> None:
    if (home / MANIFEST).exists():
        raise UserError(f"{home / MANIFEST}: exists already. Move it away to index the folder again")


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Lock a folder against other indexing processes. Raises a UserError if one is at work there, or has finished."""
    with locked(home / INDEX_LOCK, f"another process is already indexing {home}"):
        try:
            _check_new(home)
            yield
        finally:
            (home / INDEX_LOCK).unlink(missing_ok=True)


def _index(
    home: Path,
    found: dict[str, list[Path]],
    links: dict[Path, Path],
    unused: list[Unused],
    options: ImageOptions,
    skip_bad: bool,
    workers: int,
    on_shard: Callable[[int, int], None],
) -> Manifest:
    records = home / INDEX_RECORDS
    if records.exists():  # An earlier call was killed.
        shutil.rmtree(records)
    for split in found:
        (records / split).mkdir(parents=True)
    try:
        jobs = [
            (path, home / split / f"{path.stem}.idx", records / split / f"{path.stem}.json", options)
            for split, paths in found.items()
            for path in paths
        ]
        for done, _ in enumerate(run_jobs(_read_shard, jobs, workers)):
            on_shard(done + 1, len(jobs))
        paths = [path for _, _, path, _ in jobs]
        description = _describe(home, paths, options.audit, skip_bad)
        shards = {split: [path.stem for path in paths] for split, paths in found.items()}
        _make_links(links)
        manifest = assemble(home, records, description, shards, [*unused, *_unused_members(paths)])
        for _, idx, record, _ in jobs:  # Until all tars are accepted they may still be packed again.
            if not os.path.lexists(idx):
                write_synced(idx, record.with_suffix(".idx").read_bytes())
    finally:
        shutil.rmtree(records)
    _remove_leftovers([home, *(home / split for split in found)])
    write_synced(home / MANIFEST, manifest_bytes(manifest))
    return read_manifest(home)


def _remove_leftovers(folders: list[Path]) -> None:
    for folder in folders:
        for path in filter(is_leftover, folder.glob("*.partial")):
            path.unlink()


def _check_writable(folders: list[Path], helps: str) -> None:
    """Raise a UserError now, rather than after all images have been looked at, if files cannot be made in a folder."""
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({error.strerror}). {helps}") from error


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder after an error that was not there before and that holds nothing."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


# --- an index elsewhere ---


def _links(root: Path, found: dict[str, list[Path]], out: Path) -> dict[Path, Path]:
    """The links OUT/SPLIT/NAME.tar that an index elsewhere needs, and the shards that they lead to.

    Raises:
      UserError: OUT holds something else.
    """
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise UserError(f"--out {out}: lies in {root} itself. Choose a folder outside of it")
    links = {out / split / path.name: path.resolve() for split, paths in found.items() for path in paths}
    if out.exists():
        there, others = find_tars(out) if out.is_dir() and contents_of(out).visible else ({}, [])
        strange = [each.source for each in others if each.kind == MISPLACED]
        strange += [path for paths in there.values() for path in paths if path.resolve() != links.get(path)]
        if strange or not out.is_dir():
            raise UserError(
                f"--out {out}: holds something else ({named(strange or ['a file'], 3)}). Choose a new folder"
            )
    return links


def _make_links(links: dict[Path, Path]) -> None:
    """Make the links that an earlier call has not made."""
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)


# --- the tars ---


def _describe(root: Path, records: list[Path], audit: bool, skip_bad: bool) -> Description:
    """Return what the manifest says about the dataset as a whole.

    Raises:
      UserError: samples cannot be used and `skip_bad` is off, or the class numbers make no sense.
    """
    rejected, samples, top, where = [], 0, -1, ""
    for path in records:
        record = read_record(path)
        rejected += record.notes["rejected"]
        samples += len(record.rows)
        largest = max([row["label"] for row in record.rows], default=-1)
        if largest > top:
            top, where = largest, f"{path.parent.name}/{path.stem}.tar"
    if rejected and not skip_bad:
        number = "1 sample" if len(rejected) == 1 else f"{len(rejected):,} samples"
        raise UserError(
            f"{number} cannot be used: {_grouped_by_cause(rejected)}. Or leave out what cannot: --on-bad skip"
        )
    if top >= max(1000, 100 * samples):
        raise UserError(f"{where}: class numbers up to {top} for {samples} samples. Look at the cls files")
    return {
        "format_version": FORMAT_VERSION,
        "made_with": {"tool": VERSION},
        "source": SourceDescription(kind="webdataset", name=root.resolve().name, files={}),
        "options": {"audit": audit},
        "classes": [str(label) for label in range(top + 1)],
        "class_names": [],
        "class_order": "given",
    }


def _grouped_by_cause(rejected: list[Rejection]) -> str:
    """Rejected samples by cause: a few names, and values found, of each of the first causes."""
    values: dict[str, list[str]] = collections.defaultdict(
        list
    )  # The keys are causes with VALUE in place of the value.
    names: dict[str, list[str]] = collections.defaultdict(list)
    for item in rejected:
        value = _VALUE.search(item["reason"])
        cause = _VALUE.sub("VALUE", item["reason"], count=1)
        values[cause].append(value[0] if value else "")
        names[cause].append(f"{item['source']}: {clipped(item['sample'], 30)}")
    said = {cause: cause.replace("VALUE", named(dict.fromkeys(values[cause]), 2), 1) for cause in names}
    return grouped({said[cause]: found for cause, found in names.items()}, 3)


def _unused_members(records: list[Path]) -> Iterator[Unused]:
    """Yield what in the tars is not read: hidden members by name, parts of samples by number and extension."""
    parts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for path in records:
        notes = read_record(path).notes
        yield from (Unused(HIDDEN, name) for name in notes["hidden"])
        parts[path.parent.name].update(notes["parts"])
    for split, counts in parts.items():
        for extension, count in sorted(counts.items()):
            yield Unused(EXPECTED, f"{split}: {count:,} parts .{extension}", "training reads images and class numbers")


def _read_shard(path: Path, idx_path: Path, record: Path, options: ImageOptions) -> None:
    """Record what a tar holds; misfits are rejected, since they cannot be repaired without rewriting it.

    Args:
      idx_path: where its .idx file is or will be.
      record: the file to write.
    """
    found, unread = RecordBuilder(), collections.Counter()
    members, source = tar_members(path), f"{path.parent.name}/{path.name}"
    labelled = any(map(is_label, (part for parts in members.samples.values() for part in parts)))
    for key, reason in members.unusable.items():
        found.reject(printable(key), source, RejectedImageError(reason))
    with open(path, "rb") as file:
        for key, parts in members.samples.items():
            if key in members.unusable:
                continue
            try:
                if not is_utf8(key):
                    raise RejectedImageError("its name is not UTF-8: pack the tar again with another name")
                in_class = not labelled and key.removeprefix("./").count("/") == 1
                sample = read_sample(file, parts, options, in_class)
            except RejectedImageError as error:
                found.reject(printable(key), source, error)
                continue
            found.add(key, sample.label, sample.offset, sample.image, sample.image.jpeg)
            unread.update(sample.unread)
    found.notes["hidden"] = [f"{source}: {name}" for name in members.hidden]
    found.notes["parts"] = unread
    idx = _idx_of(idx_path, members.samples)
    write_synced(record.with_suffix(".idx"), idx)
    found.write(record, path.name, path.stat().st_size, sha256_of(path), idx)


def _idx_of(there: Path, samples: dict[str, Parts]) -> bytes:
    """The content of a tar's .idx file: of the one that is there, if it describes the tar.

    Raises:
      UserError: it describes another tar, or is no file.
    """
    if not os.path.lexists(there):
        return dali_index(samples)
    if not there.is_file():  # Reading from a pipe would wait for ever.
        raise UserError(f"{there}: not a regular file. Move it away to have it written")
    is_far_too_long = there.stat().st_size > _MAX_IDX_LINE * (len(samples) + 1)
    if is_far_too_long or not describes(there.read_bytes(), samples):
        raise UserError(f"{there}: describes another tar. Move it away to have it written")
    return there.read_bytes()
