"""The parts of every source: samples, entries that are no samples, and functions that read the bytes of a sample.

Nothing that a person can see is left out in silence. Every visible entry of a source becomes a sample or an `Unused`,
and hidden and system files are passed over and counted, by the same rule in every source.
"""

import dataclasses
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

from tools.lib.shards.images import MAX_BYTES, RejectedImageError

SPLITS = ("train", "val")
UnusedKind = Literal["hidden", "expected", "misplaced"]
HIDDEN: Final = "hidden"
EXPECTED: Final = "expected"
MISPLACED: Final = "misplaced"


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

    kind: UnusedKind
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
      read: location -> the file's bytes; workers get a pickled copy of it.
      files: what identifies the source besides its kind: relative path and bytes of each container file.
      copies: whether listing copies the images first, so that it is not repeated to see whether the source has changed.
      class_order: who decided the order of the classes, as pipelines.shards.manifest.class_order returns it.
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


def read_file(root: Path, location: str) -> bytes:
    """Read a file whose location is its path relative to `root`.

    Raises:
      RejectedImageError: it is larger than any image; no more than that is read into memory. Or it has become something
        else than a file since it was listed.
    """
    with open(f"{root}/{location}", "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RejectedImageError("not a regular file")
        check_size(status.st_size)
        return file.readall()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def slice_location(file: str, offset: int, nbytes: int) -> str:
    """The location of a sample that is a range of a larger file."""
    return f"{file}\n{offset}\n{nbytes}"


def read_slice(root: Path, location: str) -> bytes:
    """Read a range that `slice_location` has named in a file relative to `root`.

    Raises:
      RejectedImageError: it is larger than any image; it is not read into memory.
    """
    name, offset, size = location.split("\n")
    check_size(int(size))
    with open(root / name, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), int(size), int(offset))
    if len(content) != int(size):
        raise OSError(f"{root / name} ends at byte {int(offset) + len(content)}")
    return content


def check_size(nbytes: int) -> None:
    """Raise a RejectedImageError if an encoded image would be larger than any is."""
    if nbytes > MAX_BYTES:
        raise RejectedImageError(f"{nbytes:,} bytes; no image has more than {MAX_BYTES:,}")
