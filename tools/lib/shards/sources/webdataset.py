"""A WebDataset of another writer: the tars of each split in a folder, and the parts of a sample in a tar.

Here everything is read as it lies; reindex.py makes a dataset of it.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from pipelines.common.errors import UserError, clipped, named
from pipelines.common.files import is_hidden
from pipelines.shards.manifest import AUDIT, INDEX, MANIFEST
from tools.lib.shards.images import MAX_BYTES, CheckedImage, ImageOptions, RejectedImageError, check_image
from tools.lib.shards.sources.contents import EXTENSIONS, Contents, contents_of, is_image, printable, unused_in
from tools.lib.shards.sources.source import EXPECTED, MISPLACED, SPLITS, VAL_NAMES, Unused
from tools.lib.shards.sources.split_names import missing_files, named_split, of_other_splits, sorting_commands
from tools.lib.shards.sources.tars import COMPRESSED, Parts, tar_entries, why_not_a_file

_DOCUMENTS = ("README*", "LICENSE*", "*.md", "MD5SUMS", "SHA256SUMS", "_info.json")
LABEL_PARTS = ("cls", "class", "label")  # usual names of class numbers, the preferred one first
INDEX_RECORDS, INDEX_LOCK = ".index.partial", ".index.lock"
# pipelines.common.files.replacing makes these names, and leaves the file when its process is killed. The pattern
# repeats the spelling, so that no file of a person is taken for such a leftover.
_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.partial")
_IMAGE_PARTS = frozenset(extension[1:] for extension in EXTENSIONS)
_MAX_LABEL_BYTES = 32  # A class number may have spaces around it.
_MAX_DIGITS = 18  # Larger class numbers need not fit into 64 bits.


def find_tars(root: Path) -> tuple[dict[str, list[Path]], list[Unused]]:
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
        own = name in (MANIFEST, AUDIT) or is_leftover(root / name)
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
        if name in shards.files and (name.endswith(".tar") or name in (*idx, INDEX) or is_leftover(Path(name))):
            continue
        yield Unused(MISPLACED, printable(f"{split}/{name}"), _why_no_shard(name, name in shards.folders))


def _why_no_shard(name: str, is_folder: bool) -> str:
    if is_folder:
        return "a folder among the tars: move tars that it holds up, or move it away"
    for suffix, tool in COMPRESSED.values():
        if name.endswith(suffix) or (name.endswith(".tgz") and suffix == ".gz"):
            tool += " --rm" if suffix == ".zst" else ""  # Otherwise it keeps the compressed file.
            return f"compressed, so nothing in it can be read alone: unpack it with {tool}"
    if name.endswith(".idx"):
        return "describes a tar that is not there: move it away"
    if name.lower().endswith(".tar"):
        return "rename it to end in .tar"
    return "not an uncompressed tar: move it away"


def _without_our_own(unused: Iterator[Unused]) -> Iterator[Unused]:
    return (each for each in unused if each.source not in (INDEX_RECORDS, INDEX_LOCK))


def is_leftover(path: Path) -> bool:
    """True if a file was left by an `index` that was killed."""
    target = path.name.rpartition(".partial")[0].rpartition(".")[0]
    ours = target in (MANIFEST, AUDIT, INDEX) or target.endswith(".idx")
    return ours and _LEFTOVER.fullmatch(path.name) is not None


def advice_without_train(root: Path) -> str:
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


@dataclasses.dataclass
class TarMembers:
    """The members of a WebDataset tar, from its headers.

    Attributes:
      samples: key -> extension in lower case -> (offset, bytes) of the content.
      unusable: key -> why one of its members has no content in the tar.
      hidden: names that `is_hidden` passes over.
    """

    samples: dict[str, Parts] = dataclasses.field(default_factory=dict)
    unusable: dict[str, str] = dataclasses.field(default_factory=dict)
    hidden: list[str] = dataclasses.field(default_factory=list)


def tar_members(path: Path) -> TarMembers:
    """The members of a WebDataset tar by sample.

    Raises:
      UserError: as `tar_entries`, or a name occurs twice.
    """
    found = TarMembers()
    with open(path, "rb") as file:
        for member in tar_entries(path, file):
            if is_hidden(member.name):
                found.hidden.append(printable(member.name))
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if reason := why_not_a_file(member):
                found.unusable[key] = reason
                continue
            parts = found.samples.setdefault(key, {})
            if extension.lower() in parts:
                name = clipped(printable(member.name))
                raise UserError(f"{path}: {name} occurs twice. Write the tar again with names of their own")
            parts[extension.lower()] = (member.offset_data, member.size)
    return found


@dataclasses.dataclass(frozen=True)
class TarSample:
    """One sample of a tar.

    Attributes:
      label: its class number.
      offset: where its image begins in the tar.
      image: the image.
      unread: extensions of its other parts.
    """

    label: int
    offset: int
    image: CheckedImage
    unread: list[str]


def read_sample(file: BinaryIO, parts: Parts, options: ImageOptions, in_class: bool) -> TarSample:
    """Read one sample.

    Args:
      parts: extension -> (offset, bytes).
      in_class: whether its folder may be its class.
    Raises:
      RejectedImageError: it has no image or no class number, or the image cannot be used unchanged.
    """
    images = [extension for extension in parts if extension in _IMAGE_PARTS]
    labels = [extension for extension in LABEL_PARTS if extension in parts]
    if reason := _misnamed(parts, images, labels, in_class):
        raise RejectedImageError(reason)
    offset, size = parts[labels[0]]
    number = _class_number(labels[0], _slice(file, offset, min(size, _MAX_LABEL_BYTES + 1)))
    offset, size = parts[images[0]]
    if size > MAX_BYTES:
        raise RejectedImageError(f"its {images[0]} has {size:,} bytes; no image has more than {MAX_BYTES:,}")
    image = check_image(_slice(file, offset, size), options)
    if image.repaired:
        raise RejectedImageError(
            f"{image.repaired}: unpack the tars into train/CLASS/ and run 'build', which converts it"
        )
    return TarSample(number, offset, image, [name for name in parts if name not in (images[0], labels[0])])


def _misnamed(parts: Collection[str], images: list[str], labels: list[str], in_class: bool) -> str:
    """Why a sample's parts are not one image and one class number, and what helps; "" where they are.

    Args:
      in_class: whether its folder may be its class.
      images, labels: those of the parts that are usual names of an image and of a class number.
    """
    seen = [name for name in parts if is_image(f".{name}")]
    if in_class and len(seen) == len(parts):
        return (
            f"has '{clipped(named(seen, 3), 30)}', no cls. If its folder is its class, unpack each with "
            "tar -kxf TAR -C SRC/train (val: SRC/val), and run 'build SRC OUT'"
        )
    dotted_labels = [name for name in parts if "." in name and is_label(name)]
    if dotted := dotted_labels or ([] if images or labels else seen):
        dot = "names end at their first dot. Pack the tar again with _ for those dots"
        return f"it has '.{clipped(dotted[0], 30)}': {dot}"
    if len(images or seen) > 1:
        return f"several images, '{clipped(named(images or seen, 3))}': pack the tar again with one of them, as KEY.jpg"
    if seen and not images:
        return f"its image is '{clipped(seen[0], 30)}': pack the tar again with it as KEY.jpg"
    has = clipped(named(filter(None, parts), 5)) or "no extension"
    if not images:
        return f"has {has}; expected an image, jpg, and its class number as text, cls"
    if not labels:
        return f"has {has}; expected a cls, too: pack the tar again with the class number as text in KEY.cls"
    return ""


def is_label(part: str) -> bool:
    """Return whether a part of a sample is a class number, perhaps of a sample whose name has a dot."""
    return part.rpartition(".")[2] in LABEL_PARTS


def _class_number(part: str, content: bytes) -> int:
    text = content.strip()
    if text.removeprefix(b"+").isdigit() and len(text) <= _MAX_DIGITS:
        return int(text)
    shown = clipped(text[:20].decode(errors="backslashreplace"), 20).replace("'", '"')
    raise RejectedImageError(f"its {part} is '{shown}', not a class number: number the classes from 0 on")


def _slice(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    return file.read(nbytes)
