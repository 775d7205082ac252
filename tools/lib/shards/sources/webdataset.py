"""A WebDataset of another writer: the tars of each split in a folder, and the parts of a sample in a tar.

Here everything is read as it lies; reindex.py makes a dataset of it.
"""

from pathlib import Path
from typing import BinaryIO

from pipelines.common.errors import UserError, clipped, named
from pipelines.common.files import is_hidden, is_leftover
from pipelines.shards.manifest import AUDIT, INDEX, MANIFEST
from tools.lib.shards.images import CheckedImage, ImageOptions, RejectedImageError, check_image
from tools.lib.shards.sources.contents import EXTENSIONS, contents_of, printable, unused_in
from tools.lib.shards.sources.source import MISPLACED, SPLITS, Unused, check_size
from tools.lib.shards.sources.split_names import missing_files, of_other_splits
from tools.lib.shards.sources.tars import Parts, tar_files

INDEX_PARTIAL, INDEX_LOCK = ".index.partial", ".index.lock"
_DOCUMENTS = ("README*", "LICENSE*", "*.md", "MD5SUMS", "SHA256SUMS", "_info.json")
_LABEL_PARTS = ("cls", "class", "label")  # usual names of class numbers, the preferred one first
_MAX_DIGITS = 18  # Larger class numbers need not fit into 64 bits.
_STRANGER = (
    "only uncompressed train/*.tar and val/*.tar are indexed: move it there, unpack it, rename it, or move it away"
)


def find_tars(root: Path) -> tuple[dict[str, list[Path]], list[Unused]]:
    """The shards of each split that has some, and everything else in the folder.

    Raises:
      UserError: a folder cannot be listed.
    """
    inside, found = contents_of(root), {}
    inside.hidden = [name for name in inside.hidden if name not in (INDEX_PARTIAL, INDEX_LOCK)]
    splits = [split for split in SPLITS if split in inside.folders]
    unused = list(unused_in(inside, "", (*splits, MANIFEST, AUDIT), _STRANGER, _DOCUMENTS))
    for split in splits:
        shards = contents_of(root / split)
        tars = [name for name in shards.files if name.endswith(".tar")]
        indices = [Path(name).with_suffix(".idx").name for name in tars]
        leftovers = filter(is_leftover, shards.files)
        unused += unused_in(shards, split, {*tars, *indices, *leftovers, INDEX}, _STRANGER)
        unused += missing_files(f"{split}/{name}" for name in tars)
        others = of_other_splits(tars, split)
        for name in others:
            reason = "its name says another split: move it there, or away, or rename it"
            unused.append(Unused(MISPLACED, printable(f"{split}/{name}"), reason))
        if tars:
            found[split] = [root / split / name for name in tars if name not in others]
        else:
            unused.append(Unused(MISPLACED, split, "a folder without tars: put them there, or move it away"))
    return found, unused


def tar_members(path: Path) -> tuple[dict[str, Parts], list[str]]:
    """The members of a WebDataset tar, from its headers.

    Returns:
      samples: key -> extension in lower case -> (offset, bytes) of the content.
      hidden: names that `is_hidden` passes over.
    Raises:
      UserError: as `tar_files`, or a name occurs twice.
    """
    samples: dict[str, Parts] = {}
    hidden = []
    with open(path, "rb") as file:
        for member in tar_files(path, file):
            if is_hidden(member.name):
                hidden.append(printable(member.name))
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            parts = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if extension.lower() in parts:
                name = clipped(printable(member.name))
                raise UserError(f"{path}: {name} occurs twice. Write the tar again with names of their own")
            parts[extension.lower()] = (member.offset_data, member.size)
    return samples, hidden


def used_parts(parts: Parts) -> tuple[str, str]:
    """The parts of a sample that are its image and its class number.

    Raises:
      RejectedImageError: there is not one image, or no class number.
    """
    images = [name for name in parts if f".{name}" in EXTENSIONS]
    labels = [name for name in _LABEL_PARTS if name in parts]
    if len(images) != 1 or not labels:
        has = clipped(named(filter(None, parts), 5)) or "no extension"
        raise RejectedImageError(
            f"has {has}; expected an image, KEY.jpg, and its class number as text, KEY.cls; a KEY ends at its first dot"
        )
    return images[0], labels[0]


def read_label(file: BinaryIO, offset: int, nbytes: int) -> int:
    """The class number of a sample. Raises RejectedImageError if it is none."""
    file.seek(offset)
    text = file.read(min(nbytes, 2 * _MAX_DIGITS)).strip()
    if nbytes > 2 * _MAX_DIGITS or not text.removeprefix(b"+").isdigit() or len(text) > _MAX_DIGITS:
        shown = clipped(text.decode(errors="backslashreplace"), 20)
        raise RejectedImageError(f"its label is '{shown}', not a class number: number the classes from 0 on")
    return int(text)


def read_image(file: BinaryIO, offset: int, nbytes: int, options: ImageOptions) -> CheckedImage:
    """The image of a sample. Raises RejectedImageError if it cannot be used unchanged."""
    check_size(nbytes)
    file.seek(offset)
    image = check_image(file.read(nbytes), options)
    if image.repaired:
        raise RejectedImageError(
            f"{image.repaired}: unpack the tars into train/CLASS and run 'build', which converts it"
        )
    return image
