"""The entries of a folder, sorted by what they are; and what becomes of those that are no samples."""

import dataclasses
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from pipelines.common.errors import UserError, named
from pipelines.common.files import is_hidden
from pipelines.shards.manifest import sorted_classes
from tools.lib.shards.sources.source import (
    EXPECTED,
    HIDDEN,
    MISPLACED,
    SPLITS,
    Entry,
    SourceOptions,
    Unused,
    sample_key,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Sources of all kinds consist of these.
_PARTS_OF_SOURCES = (*SPLITS, "ILSVRC2012_*", "meta.bin", "ILSVRC", "LOC_*", "imagenet*.tar.gz", "data", "*.parquet")
_NO_IMAGE = (
    "a folder inside a class, or a name that is not UTF-8. Rename it, or move the images in it up with mv -n, which "
    "replaces nothing"
)
T = TypeVar("T")


def is_image(name: str) -> bool:
    """Return whether a file's name is an image's."""
    return name.lower().endswith(EXTENSIONS)


def printable(name: str) -> str:
    """A file's name, which may be any bytes, as UTF-8 that a terminal shows; other bytes and characters are escaped."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def is_utf8(name: str) -> bool:
    """Return whether a file's name is UTF-8; Python keeps other bytes as lone surrogates."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): systems store the same letters in two forms, which look alike."""
    return unicodedata.normalize("NFC", name)


def by_unique(items: Iterable[T], key: Callable[[T], str]) -> tuple[dict[str, T], list[tuple[T, T]]]:
    """Items by their key.

    Returns:
      the first item of each key; and each later one, with the first one of its key.
    """
    found: dict[str, T] = {}
    later = []
    for item in items:
        first = found.setdefault(key(item), item)
        if first is not item:
            later.append((item, first))
    return found, later


@dataclasses.dataclass
class Contents:
    """The entries of a folder, each list sorted by name; links are followed.

    Attributes:
      folders, files: names of visible entries.
      hidden: names that `is_hidden` passes over.
      others: visible entries that are neither folder nor regular file, and what they are.
    """

    folders: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    hidden: list[str] = dataclasses.field(default_factory=list)
    others: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def visible(self) -> list[str]:
        """Names of all visible entries."""
        return sorted([*self.folders, *self.files, *self.others])


def contents_of(folder: Path) -> Contents:
    """Look into a folder.

    Raises:
      UserError: it cannot be listed.
    """
    found = Contents()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}). Allow reading it, or move it away") from error
    for entry in entries:
        if is_hidden(entry.name):
            found.hidden.append(entry.name)
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # Links in a circle are one cause.
            found.others[entry.name] = f"{error.strerror}: move it away"
            continue
        if is_folder:
            found.folders.append(entry.name)
        elif is_file:
            found.files.append(entry.name)
        else:
            is_link = entry.is_symlink() and not os.path.exists(entry.path)
            target = f"a link to {printable(os.readlink(entry.path))}, which is not there" if is_link else ""
            found.others[entry.name] = f"{target or 'neither a file nor a folder'}: restore it, or move it away"
    return found


def walk(root: Path, folder: str = "", above: frozenset[str] = frozenset()) -> Iterator[str | Unused]:
    """Yield visible files at any depth, as paths relative to `root` sorted by their parts; all else is an Unused.

    A link to a folder that it lies in is an Unused, too, whether it leads there at once or through other links.

    Args:
      folder: where to begin, relative to `root`.
      above: resolved paths of the folders that lead to it.
    Raises:
      UserError: a folder cannot be listed.
    """
    real = os.path.realpath(root / folder)
    if real in above:
        yield Unused(MISPLACED, printable(folder), "a link to a folder above it: remove the link")
        return
    inside = contents_of(root / folder)
    for name in inside.hidden:
        yield Unused(HIDDEN, printable(os.path.join(folder, name)))
    folders = set(inside.folders)
    for name in inside.visible:
        path = os.path.join(folder, name)
        if name in folders:
            yield from walk(root, path, above | {real})
        elif reason := inside.others.get(name):
            yield Unused(MISPLACED, printable(path), reason)
        else:
            yield path


def unused_in(
    inside: Contents, folder: str, used: Collection[str], reason: str, expected: Iterable[str] = ()
) -> Iterator[Unused]:
    """The entries of a folder that do not become samples.

    Args:
      folder: how messages name it, "" for the source itself.
      used: names that are read.
      reason: what is wrong with the other visible ones.
      expected: patterns of names that usually lie there for other purposes.
    """
    for name in inside.hidden:
        yield Unused(HIDDEN, below(folder, name))
    for name in inside.visible:
        if name in inside.others:
            yield Unused(MISPLACED, below(folder, name), inside.others[name])
        elif name not in used and any(fnmatch(name, pattern) for pattern in expected):
            yield Unused(EXPECTED, below(folder, name), "part of the download, not of train or val")
        elif name not in used:
            yield Unused(MISPLACED, below(folder, name), reason)


def beside_source(
    root: Path, options: SourceOptions, used: Collection[str], expected: tuple[str, ...] = ()
) -> Iterator[Unused]:
    """The entries of a source's own folder that are not read.

    What sources of other kinds consist of may lie there as well, if the person said which of them is meant.
    """
    expected += _PARTS_OF_SOURCES if options.kind != "auto" else ()
    reason = "not part of the layout: move it away, or say with --source which kind of source is meant"
    return unused_in(contents_of(root), "", used, reason, expected)


def below(folder: str, name: str) -> str:
    """How messages name an entry of a folder."""
    return printable(f"{folder}/{name}" if folder else name)


def class_folders(folder: Path, order: str = "") -> list[str]:
    """The classes in the given order, one of pipelines.shards.index.CLASS_ORDERS; "" is text.

    Raises:
      UserError: two of them would have samples of the same names, or look alike; all such are named.
    """
    names = sorted_classes(contents_of(folder).folders, order or "text")
    if broken := [printable(name) for name in names if not is_utf8(name)]:
        raise UserError(f"{folder}: folders whose names are not UTF-8: {named(broken)}. Rename them")
    _, alike = by_unique(names, lambda name: sample_key(composed(name), ""))
    if alike:
        pairs = [f"{first} and {name}" for name, first in alike]
        raise UserError(f"{folder}: folders that would be one class: {named(pairs)}. Rename all but one of each")
    return names


def list_class(root: Path, folder: Path, class_id: str, label: int) -> Iterator[Entry | Unused]:
    """The images of one class.

    Args:
      folder: relative to `root`.
    """
    inside = contents_of(root / folder)
    names = list(filter(is_utf8, inside.files))
    yield from unused_in(inside, str(folder), set(names), _NO_IMAGE)
    if not inside.visible:
        yield Unused(MISPLACED, printable(str(folder)), "no images: add some, or move the folder away")
    # A file whose name is no image's is read as well, and rejected by its name.
    files, alike = by_unique(names, lambda file: sample_key(class_id, Path(file).stem if is_image(file) else file))
    for file, first in alike:
        yield Unused(MISPLACED, below(str(folder), file), f"would be the same sample as {first}: rename one")
    for key, file in files.items():
        location = f"{folder}/{file}"
        yield Entry(key, label, location, location)
