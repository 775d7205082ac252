"""An existing WebDataset, indexed where it lies: its tars are read and never written."""

import collections
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from pipelines.common.errors import UserError, clipped, grouped, named
from pipelines.common.files import locked, sha256_of, write_synced
from pipelines.shards.manifest import AUDIT, FORMAT_VERSION, INDEX, MANIFEST, manifest_bytes, read_manifest
from tools.lib.common.process_pool import run_jobs
from tools.lib.shards.assembly import VERSION, assemble
from tools.lib.shards.entries import (
    EXPECTED,
    HIDDEN,
    MISPLACED,
    SPLITS,
    VAL_NAMES,
    Contents,
    Unused,
    contents_of,
    is_utf8,
    printable,
    unused_in,
)
from tools.lib.shards.images import ImageOptions, RejectedImageError
from tools.lib.shards.job import reporting_disk_errors
from tools.lib.shards.listing import check_misplaced
from tools.lib.shards.members import is_label, read_sample
from tools.lib.shards.shards import (
    ShardRecord,
    dali_index,
    describes,
    read_record,
    source_hash,
    write_record,
)
from tools.lib.shards.split_names import missing_files, named_split, of_other_splits, sorting_commands
from tools.lib.shards.tars import COMPRESSED, check_compressed, tar_members

_MAX_IDX_LINE = 1 << 16  # of a sample in an .idx file
_VALUE = re.compile(r"'[^']*'")  # the reason why a sample is rejected quotes what was found first
_RECORDS, _LOCK = ".index.partial", ".index.lock"
# pipelines.common.files.replacing makes these names, and leaves the file when its process is killed. The pattern
# repeats the spelling, so that no file of a person is taken for such a leftover.
_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.partial")
_DOCUMENTS = ("README*", "LICENSE*", "*.md", "MD5SUMS", "SHA256SUMS", "_info.json")


def index_webdataset(
    root: Path,
    *,
    out: Path | None = None,
    audit: bool = True,
    skip_bad: bool = False,
    workers: int = 1,
    on_shard: Callable[[int, int], None] = lambda i, n: None,
) -> dict:
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
    found, unused = _find_tars(root)
    for split in SPLITS:
        if (root / split).is_dir() and not contents_of(root / split).visible:
            raise UserError(f"{root / split}: an empty folder. Put the tars of the split there, or remove it")
    has_train = (root / "train").is_dir()
    if "train" in found or (has_train and contents_of(root / "train").files):
        check_misplaced(root, unused, skip_bad)
    if "train" not in found:
        raise UserError(f"{root}: no train/*.tar below it. {_nearest(root)}")
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
    """Keep others from indexing into the same folder meanwhile. Raises a UserError if somebody does, or has done so."""
    with locked(home / _LOCK, f"another process is already indexing {home}"):
        try:
            _check_new(home)
            yield
        finally:
            (home / _LOCK).unlink(missing_ok=True)


def _index(
    home: Path,
    found: dict[str, list[Path]],
    links: dict[Path, Path],
    unused: list[Unused],
    options: ImageOptions,
    skip_bad: bool,
    workers: int,
    on_shard: Callable[[int, int], None],
) -> dict:
    records = home / _RECORDS
    if records.exists():  # an earlier call was killed
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
        for _, idx, record, _ in jobs:  # not before all tars are accepted: they may still be packed again
            if not os.path.lexists(idx):
                write_synced(idx, record.with_suffix(".idx").read_bytes())
    finally:
        shutil.rmtree(records)
    _remove_leftovers([home, *(home / split for split in found)])
    write_synced(home / MANIFEST, manifest_bytes(manifest))
    return read_manifest(home)


def _remove_leftovers(folders: list[Path]) -> None:
    for folder in folders:
        for path in filter(_is_leftover, folder.glob("*.partial")):
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


# --- the folder ---


def _find_tars(root: Path) -> tuple[dict[str, list[Path]], list[Unused]]:
    """The shards of each split, and everything else in the folder.

    Raises:
      UserError: a folder cannot be listed.
    """
    if not root.is_dir():
        raise UserError(
            f"{root}: {'a file, not a folder' if root.exists() else 'not found'}. Give a folder with train/*.tar"
        )
    inside, found = contents_of(root), {}
    unused = list(_beside_splits(root, inside))
    for split in SPLITS:
        if split not in inside.folders:
            continue
        shards = contents_of(root / split)
        tars = [name for name in shards.files if name.endswith(".tar")]
        others = of_other_splits(tars, split)
        found[split] = [root / split / name for name in tars if name not in others]
        unused += _beside_shards(split, shards)
        unused += missing_files((f"{split}/{name}" for name in tars), (f"{split}/{name}" for name in shards.visible))
        for name, stated in others.items():
            helps = f"move it into {stated}" if stated in SPLITS else "move it away"
            reason = f"its name says {stated}: {helps}, or rename it"
            unused.append(Unused(MISPLACED, printable(f"{split}/{name}"), reason))
    found = {split: paths for split, paths in found.items() if paths}
    return found, unused


def _beside_splits(root: Path, inside: Contents) -> Iterator[Unused]:
    """Yields the entries of ROOT beside train/ and val/, except our own files."""
    yield from _without_our_own(unused_in(inside, ""))
    for name in inside.visible:
        own = name in (MANIFEST, AUDIT) or _is_leftover(root / name)
        own = name in SPLITS if name in inside.folders else own
        if own or name in inside.others:
            continue
        if name in inside.files and any(fnmatch(name, pattern) for pattern in _DOCUMENTS):
            yield Unused(EXPECTED, name, "a document")
            continue
        reason = "not part of a dataset of train/*.tar and val/*.tar: move it away"
        if name in inside.folders and name.lower() in (*VAL_NAMES, "test"):
            rename = "" if "val" in inside.visible else "rename it to val, or "
            reason = f"only train and val are indexed: {rename}move it away"
        elif name in inside.files and name.endswith(".tar"):
            stated = named_split(name) or "one of them"
            helps = "move it away" if stated == "test" else f"move it into {stated}"
            reason = f"a tar outside of train and val: {helps}"
        yield Unused(MISPLACED, printable(name), reason)


def _beside_shards(split: str, shards: Contents) -> Iterator[Unused]:
    """Yields the entries of a split's folder beside its tars, except .idx files and our own."""
    yield from _without_our_own(unused_in(shards, split))
    idx = {Path(name).with_suffix(".idx").name for name in shards.files if name.endswith(".tar")}
    for name in (*shards.folders, *shards.files):
        if name in shards.files and (name.endswith(".tar") or name in (*idx, INDEX) or _is_leftover(Path(name))):
            continue
        yield Unused(MISPLACED, printable(f"{split}/{name}"), _why_no_shard(name, name in shards.folders))


def _why_no_shard(name: str, is_folder: bool) -> str:
    if is_folder:
        return "a folder among the tars: move tars that it holds up, or move it away"
    for suffix, tool in COMPRESSED.values():
        if name.endswith(suffix) or (name.endswith(".tgz") and suffix == ".gz"):
            tool += " --rm" if suffix == ".zst" else ""  # it keeps the compressed file otherwise
            return f"compressed, so nothing in it can be read alone: unpack it with {tool}"
    if name.endswith(".idx"):
        return "describes a tar that is not there: move it away"
    if name.lower().endswith(".tar"):
        return "rename it to end in .tar"
    return "not an uncompressed tar: move it away"


def _is_leftover(path: Path) -> bool:
    """True if a file was left by an `index` that was killed."""
    target = path.name.rpartition(".partial")[0].rpartition(".")[0]
    ours = target in (MANIFEST, AUDIT, INDEX) or target.endswith(".idx")
    return ours and _LEFTOVER.fullmatch(path.name) is not None


def _without_our_own(unused: Iterator[Unused]) -> Iterator[Unused]:
    return (each for each in unused if each.source not in (_RECORDS, _LOCK))


def _nearest(root: Path) -> str:
    """Say what probably helps where there is no train/*.tar."""
    inside = contents_of(root)
    if tars := [name for name in inside.files if name.endswith(".tar")]:
        if root.name.lower() in ("train", *VAL_NAMES):
            return f"Give the folder above it, {root.resolve().parent}"
        return _advice_by_names(root, tars)
    similar = [name for name in inside.folders if name.lower() in ("train", "training") and name != "train"]
    if similar and "train" not in inside.folders:
        return f"Rename {similar[0]} to train"
    return "Expected WebDataset tars (jpg, cls) in train/ and val/; images in folders are converted with 'build'"


def _advice_by_names(root: Path, tars: list[str]) -> str:
    """Say what helps where all tars lie in one folder: their names may state a split."""
    stated = {named_split(name) for name in tars}
    if stated <= {"", "train"}:
        return f"Move its tars into {root / 'train'}"
    if "train" not in stated and len(stated) == 1:
        return (
            f"The names of its tars say {stated.pop()}: move them into {root / 'train'} only if they are for training"
        )
    by = "Sort its tars into train and val by their names"
    commands = sorting_commands(tars)
    return f"{by}. In that folder: {commands}" if commands and "train" in stated else by


def _links(root: Path, found: dict[str, list[Path]], out: Path) -> dict[Path, Path]:
    """The links OUT/SPLIT/NAME.tar that an index elsewhere needs, and the shards that they lead to.

    Raises:
      UserError: OUT holds something else.
    """
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise UserError(f"--out {out}: lies in {root} itself. Choose a folder outside of it")
    links = {out / split / path.name: path.resolve() for split, paths in found.items() for path in paths}
    if out.exists():
        there, others = _find_tars(out) if out.is_dir() and contents_of(out).visible else ({}, [])
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


def _describe(root: Path, records: list[Path], audit: bool, skip_bad: bool) -> dict:
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
        raise UserError(f"{number} cannot be used: {_said(rejected)}. Or leave out what cannot: --on-bad skip")
    if top >= max(1000, 100 * samples):
        raise UserError(f"{where}: class numbers up to {top} for {samples} samples. Look at the cls files")
    return {
        "format_version": FORMAT_VERSION,
        "made_with": {"tool": VERSION},
        "source": {"kind": "webdataset", "name": root.resolve().name, "files": {}},
        "options": {"audit": audit},
        "classes": [str(label) for label in range(top + 1)],
        "class_names": [],
        "class_order": "given",
    }


def _said(rejected: list[dict]) -> str:
    """Rejected samples by cause: a few names, and values found, of each of the first causes."""
    values: dict[str, list[str]] = collections.defaultdict(list)  # cause, with VALUE for the value -> values
    names: dict[str, list[str]] = collections.defaultdict(list)
    for item in rejected:
        value = _VALUE.search(item["reason"])
        cause = _VALUE.sub("VALUE", item["reason"], count=1)
        values[cause].append(value[0] if value else "")
        names[cause].append(f"{item['source']}: {clipped(item['sample'], 30)}")
    said = {cause: cause.replace("VALUE", named(dict.fromkeys(values[cause]), 2), 1) for cause in names}
    return grouped({said[cause]: found for cause, found in names.items()}, 3)


def _unused_members(records: list[Path]) -> Iterator[Unused]:
    """Yields what in the tars is not read: hidden members by name, parts of samples by number and extension."""
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
    found, hashes, unread = ShardRecord(), [], collections.Counter()
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
                label, offset, image, others = read_sample(file, parts, options, in_class)
            except RejectedImageError as error:
                found.reject(printable(key), source, error)
                continue
            found.add(key, label, offset, image)
            hashes.append(source_hash(image.jpeg))
            if others:
                unread.update(others)
    found.notes |= {"hidden": [f"{source}: {name}" for name in members.hidden], "parts": unread}
    idx = _idx_of(idx_path, members.samples)
    write_synced(record.with_suffix(".idx"), idx)
    found.describe(path.name, path.stat().st_size, sha256_of(path), idx)
    write_record(record, found, hashes)


def _idx_of(there: Path, samples: dict[str, dict[str, tuple[int, int]]]) -> bytes:
    """The content of a tar's .idx file: of the one that is there, if it describes the tar.

    Raises:
      UserError: it describes another tar, or is no file.
    """
    if not os.path.lexists(there):
        return dali_index(samples)
    if not there.is_file():  # reading from a pipe would wait for ever
        raise UserError(f"{there}: not a regular file. Move it away to have it written")
    is_far_too_long = there.stat().st_size > _MAX_IDX_LINE * (len(samples) + 1)
    if is_far_too_long or not describes(there.read_bytes(), samples):
        raise UserError(f"{there}: describes another tar. Move it away to have it written")
    return there.read_bytes()
