"""Sources are made of these: samples, entries that are not used, and one rule about which names count.

Nothing that a person can see is left out in silence. Every visible entry of a source becomes a sample or an `Unused`,
and hidden and system files are passed over and counted, by the same rule in every source.
"""

import dataclasses
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden
from tools.lib.shards.images import MAX_BYTES, RejectedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "val")
VAL_NAMES = ("val", "valid", "validation")  # usual names of the validation split's folder or files
# Sources of all kinds consist of these.
_PARTS_OF_SOURCES = (*SPLITS, "ILSVRC2012_*", "meta.bin", "ILSVRC", "LOC_*", "imagenet*.tar.gz", "data", "*.parquet")
_STRANGER = "not part of the layout: move it away"
T = TypeVar("T")
HIDDEN, EXPECTED, MISPLACED = "hidden", "expected", "misplaced"  # kinds of Unused


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sample of a listing.

    Attributes:
      key: its name in the dataset, CLASS/STEM, without dots (WebDataset ends a key at the first).
      label: class number.
      location: where `Source.read` finds it.
      source: how messages name it.
    """

    key: str
    label: int
    location: str
    source: str


@dataclasses.dataclass(frozen=True)
class Unused:
    """Something in a source that does not become a sample.

    Attributes:
      kind: HIDDEN: passed over by the rule of pipelines.common.files.is_hidden, and counted; EXPECTED: belongs to the
        layout and is for something else, such as test images without labels; MISPLACED: visible and not understood,
        which ends the command unless the person decides to leave it out.
      source: how messages name it.
      reason: what it is, and what helps.
    """

    kind: str
    source: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A recognised source.

    Attributes:
      kind: one of sources.KINDS.
      root: the folder that the user named.
      classes: ids of the classes in the order of their numbers.
      class_names: for people, as many; empty where the source has none.
      splits: for each split a function that lists its samples, and what of the source is not used.
      read: location -> the file's bytes.
      files: what identifies the source besides its kind: relative path and bytes of each container file.
      copies: whether listing copies the images first, so that it is not repeated to see whether the source has changed.
      class_order: who decided the order of the classes, as pipelines.shards.index.class_order returns it.
      columns: names of a table's columns that were read, where they are not the usual ones.
    """

    kind: str
    root: Path
    classes: list[str]
    class_names: list[str]
    splits: dict[str, Callable[[], Iterator[Entry | Unused]]]
    read: Callable[[str], bytes]
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    copies: bool = False
    class_order: str = "given"
    columns: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read.

    Attributes:
      kind: one of sources.KINDS, or auto to recognise it.
      class_order: text or numeric, where names of classes decide their order; "" leaves it unstated, which is text.
      image_column, label_column: of parquet files.
    """

    kind: str = "auto"
    class_order: str = ""
    image_column: str = "image"
    label_column: str = "label"


RECOGNISE = SourceOptions()


def sample_key(class_id: str, stem: str) -> str:
    """The key of a sample, without the dots and spaces that tar, WebDataset and DALI's .idx files cannot have."""
    return re.sub(r"[.\s]", "_", f"{class_id}/{stem}")


def file_reader(root: Path) -> Callable[[str], bytes]:
    """Read locations that are paths relative to `root`.

    Raises, when it reads:
      RejectedImageError: a file is larger than any image; no more than that is read into memory. Or it has become
        something else than a file since it was listed.
    """

    def read(location: str) -> bytes:
        with open(f"{root}/{location}", "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RejectedImageError("not a regular file")
            if status.st_size > MAX_BYTES:
                raise RejectedImageError(f"{status.st_size:,} bytes; no image has more than {MAX_BYTES:,}")
            return file.readall()

    return read


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


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
        except OSError as error:  # links in a circle, for one
            found.others[entry.name] = f"{error.strerror}: move it away"
            continue
        if is_folder:
            found.folders.append(entry.name)
        elif is_file:
            found.files.append(entry.name)
        else:
            found.others[entry.name] = _kind_of(entry)
    return found


def _kind_of(entry: os.DirEntry) -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        target = printable(os.readlink(entry.path))
        return f"a link to {target}, which is not there: mount or restore it"
    return "neither a file nor a folder: move it away"


def unused_in(contents: Contents, folder: str) -> Iterator[Unused]:
    """The hidden entries of a folder, and those that are neither file nor folder; `folder` is how messages name it."""
    for name in contents.hidden:
        yield Unused(HIDDEN, _below(folder, name))
    for name, reason in contents.others.items():
        yield Unused(MISPLACED, _below(folder, name), reason)


def misplaced(folder: str, names: list[str], reason: str) -> Iterator[Unused]:
    """Entries of a folder that nothing is known to do with, for one reason."""
    return (Unused(MISPLACED, _below(folder, name), reason) for name in names)


def beside(inside: Contents, folder: str, used: tuple[str, ...], others: tuple[str, ...]) -> Iterator[Unused]:
    """The entries of a folder of a known layout that are not read.

    Args:
      folder: how messages name it, "" for the source itself.
      used: names that are read.
      others: patterns of what usually lies there for other purposes.
    """
    yield from unused_in(inside, folder)
    for name in inside.visible:
        if name in used or name in inside.others:
            continue
        if any(fnmatch(name, pattern) for pattern in others):
            yield Unused(EXPECTED, _below(folder, name), "part of the download, not of train or val")
        else:
            yield from misplaced(folder, [name], _STRANGER)


def beside_source(
    root: Path, options: SourceOptions, used: tuple[str, ...], others: tuple[str, ...]
) -> Iterator[Unused]:
    """The entries of a source's own folder that are not read, as `beside`.

    What sources of other kinds consist of may lie there as well, if the person said which of them is meant.
    """
    for each in beside(contents_of(root), "", used, others):
        if each.reason == _STRANGER and any(fnmatch(each.source, pattern) for pattern in _PARTS_OF_SOURCES):
            said = "another source, and --source chose this one"
            asked = "part of another source: say with --source which one is meant, or move it away"
            each = (
                Unused(MISPLACED, each.source, asked) if options.kind == "auto" else Unused(EXPECTED, each.source, said)
            )
        yield each


def _below(folder: str, name: str) -> str:
    return printable(f"{folder}/{name}" if folder else name)
