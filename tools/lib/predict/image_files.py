"""Images that are in no dataset: files, folders and shards, and what evaluation shows a model of them."""

import collections
import dataclasses
import itertools
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden
from pipelines.common.machine import num_cores
from pipelines.ops.pil_ops import crop_resize, decode
from pipelines.prefetch import look_ahead
from pipelines.shards.index import synthetic_index
from pipelines.shards.jpeg import check_scans
from tools.lib.shards.images import (
    MAX_BYTES,
    RejectedImageError,
    check_dimensions,
    is_plain,
    opened,
    plain_image,
    read_jpeg_header,
    rejecting,
)
from tools.lib.shards.sources.contents import EXTENSIONS, is_image, printable, walk
from tools.lib.shards.sources.source import HIDDEN, Unused
from tools.lib.shards.sources.tars import tar_files
from trainer.evaluation.trained import EvalTransform

_IMAGE, _SHARD, _OTHER = "image", "shard", "other"


@dataclasses.dataclass(frozen=True)
class Item:
    """Where an encoded image lies.

    Attributes:
      name: how its row calls it.
      path: file in which `nbytes` from `offset` on are the image, all of them where nbytes is None.
      error: why there is none, "" if there is one.
    """

    name: str
    path: str
    offset: int = 0
    nbytes: int | None = None
    error: str = ""


def survey(paths: list[Path]) -> tuple[int | None, list[str]]:
    """Look through all folders.

    Returns:
      how many images there are, None if shards are among them, which would have to be read; and the files in folders
      that are neither images nor shards by their names.
    Raises:
      UserError: a path is not there, or has no images.
    """
    counts, others = collections.Counter(), []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not found. Give images, shards (.tar), or folders with some")
        if next(items_of(path), None) is None:
            raise UserError(f"{path}: no images in it ({', '.join(EXTENSIONS)}). Give images, shards, or their folder")
        for kind, file, _ in _files_of(path):
            counts[kind] += 1
            others += [printable(file)] if kind == _OTHER else []
    return None if counts[_SHARD] else counts[_IMAGE], others


def items_of(path: Path) -> Iterator[Item]:
    """The images that a path stands for, one after the other; of a damaged shard those before the damage.

    Images and shards of a folder, at any depth, are sorted by the parts of their paths. Links that lead nowhere or in a
    circle, and everything else that is neither file nor folder, are items with an error.
    """
    for kind, file, error in _files_of(path):
        if kind == _SHARD:
            yield from _members(file)
        elif kind == _IMAGE:
            yield Item(printable(file), file, error=error)


def _files_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """The kind of each visible file that a path stands for, by its name; its path; and why it cannot be read, or ""."""
    if not path.is_dir():
        yield _SHARD if _is_shard(path.name) else _IMAGE, str(path), ""
        return
    for name in walk(path):
        if not isinstance(name, Unused):
            yield _SHARD if _is_shard(name) else _IMAGE if is_image(name) else _OTHER, os.path.join(path, name), ""
        elif name.kind != HIDDEN:
            yield _IMAGE, os.path.join(path, name.source), name.reason


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".tar")


def _members(path: str) -> Iterator[Item]:
    """The images in a shard. Their names are shown and nothing else."""
    if not os.path.isfile(path):  # reading from a pipe would wait for ever
        yield Item(printable(path), path, error="not a regular file")
        return
    try:
        with open(path, "rb") as file:
            for member in tar_files(Path(path), file):
                if is_image(member.name) and not is_hidden(member.name):
                    name = f"{path}/{os.path.splitext(member.name)[0]}"
                    yield Item(printable(name), path, member.offset_data, member.size)
    except (UserError, OSError) as error:  # the other files do not suffer from it
        yield Item(printable(path), path, error=f"something in the shard cannot be read ({error})")


# --- their pixels ---


def decoded_batches(
    items: Iterator[Item], transform: EvalTransform, size: int
) -> Iterator[list[tuple[str, np.ndarray | None, str]]]:
    """The result of `decoded` for each image, in order, `size` at a time; a pool of threads works so far ahead."""
    with ThreadPoolExecutor(num_cores(), thread_name_prefix="decode") as pool:
        try:
            futures = (pool.submit(decoded, item, transform) for item in items)
            looked = (future.result() for future in look_ahead(futures, size, lambda _: None))
            while batch := list(itertools.islice(looked, size)):
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def decoded(item: Item, transform: EvalTransform) -> tuple[str, np.ndarray | None, str]:
    """An image's name, its pixels, uint8 [S, S, 3], and why there are none, "" if there are some. Raises nothing."""
    try:
        if item.error:
            raise RejectedImageError(item.error)
        return item.name, shown(pixels_of(read(item)), transform), ""
    except RejectedImageError as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    except Exception as error:  # such as memory that is not there
        reason = f"cannot be decoded ({type(error).__name__}: {error})"
    return item.name, None, " ".join(reason.split())


def read(item: Item) -> bytes:
    """An image as it is stored.

    Raises:
      RejectedImageError: it is none by its kind or size, or cut off.
      OSError: the system cannot read it.
    """
    status = os.stat(item.path)
    if not stat.S_ISREG(status.st_mode):  # reading from a pipe would wait for ever
        raise RejectedImageError("not a regular file")
    nbytes = status.st_size if item.nbytes is None else item.nbytes
    if nbytes > MAX_BYTES:
        raise RejectedImageError(f"{nbytes:,} bytes; no image has more than {MAX_BYTES:,}")
    with open(item.path, "rb") as file:
        file.seek(item.offset)
        content = file.read(nbytes)
    if len(content) < nbytes:
        raise RejectedImageError(f"cut off: {len(content):,} of {nbytes:,} bytes are there")
    return content


def pixels_of(content: bytes) -> np.ndarray:
    """RGB as tools/shard_imagenet.py and the pipelines see it: uint8 [height, width, 3], EXIF orientation not applied.

    Raises:
      RejectedImageError: it cannot be decoded, or would be absurdly large.
    """
    if not content:
        raise RejectedImageError("empty file")
    header = read_jpeg_header(content)
    with rejecting():
        if header is not None and is_plain(header):
            check_dimensions(header.width, header.height)
            check_scans(content)
            return decode(np.frombuffer(content, dtype=np.uint8))
        return np.asarray(plain_image(opened(content)).convert("RGB"))


def shown(pixels: np.ndarray, transform: EvalTransform) -> np.ndarray:
    """The pixels that evaluation shows the model: uint8 [S, S, 3]."""
    height, width = pixels.shape[:2]
    plan = transform.plan(synthetic_index(1, 1, height, width)).rows(0, 1)
    return crop_resize(pixels, plan, 0)
