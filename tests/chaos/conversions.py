"""What the faults of conversions share: commands in this process, small images, and what lies in a folder."""

import functools
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from support.processes import without_workers
from tools import shard_imagenet


@functools.cache
def jpeg(number: int = 0, side: int = 16) -> bytes:
    """A small image of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def shard(*arguments: object) -> Callable[[], None]:
    """A call of tools/shard_imagenet.py, all of it in the process that calls it: for `isolated`."""

    def call() -> None:
        with without_workers():
            shard_imagenet.main([str(argument) for argument in arguments])

    return call


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: path -> hash of a file's content, target of a link, or what it is."""
    return {str(path.relative_to(folder)): _content_of(path) for path in sorted(folder.rglob("*"))}


def _content_of(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "special"
