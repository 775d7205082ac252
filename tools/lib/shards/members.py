"""The parts of one sample in somebody else's WebDataset tar: its image and its class number."""

from collections.abc import Collection
from typing import BinaryIO

from pipelines.common.errors import clipped, named
from tools.lib.shards.entries import EXTENSIONS, is_image
from tools.lib.shards.images import MAX_BYTES, CheckedImage, ImageOptions, RejectedImageError, check_image
from tools.lib.shards.shards import LABEL_PARTS

_IMAGE_PARTS = frozenset(extension[1:] for extension in EXTENSIONS)
_MAX_LABEL_BYTES = 32  # a class number may have spaces around it
_MAX_DIGITS = 18  # larger class numbers need not fit into 64 bits


def read_sample(
    file: BinaryIO, parts: dict[str, tuple[int, int]], options: ImageOptions, in_class: bool
) -> tuple[int, int, CheckedImage, list[str]]:
    """The class number, the image's offset, the image, and the extensions that are not read, of one sample.

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
    return number, offset, image, [name for name in parts if name not in (images[0], labels[0])]


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
