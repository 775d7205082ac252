"""Tars and images written by hand for tests, and what the readers make of them."""

import io
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.shards.index import read_index
from pipelines.shards.reader import ShardReader
from tools.lib.shards.sources.tars import tar_files


def jpeg(number: int = 0, kind: str = "JPEG") -> bytes:
    """A small image of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def samples(count: int, name: str = "{:04d}", start: int = 0) -> dict[str, bytes]:
    """Members of a shard: images and class numbers 0, 1, 2 in turn."""
    return {
        f"{name.format(i)}.{part}": content
        for i in range(start, start + count)
        for part, content in (("jpg", jpeg(i)), ("cls", str(i % 3).encode()))
    }


def tar_of(members: dict[str, bytes | tarfile.TarInfo], **options) -> bytes:
    """An uncompressed tar, written by tarfile with the options."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def put(path: Path, content: bytes = b"") -> Path:
    """Write a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listed(path: Path) -> list[str]:
    """The names of a tar's files, as the readers of sources see them."""
    with open(path, "rb") as file:
        return [member.name for member in tar_files(path, file)]


def refused(function, *arguments, **options) -> str:
    """The message of a UserError, which is short and one line."""
    with pytest.raises(UserError) as found:
        function(*arguments, **options)
    message = " ".join(str(found.value).split())
    assert len(re.sub(r"/tmp/\S*/", "", message)) <= 320, message
    return message


def images_of(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """The samples of a dataset: key -> (image, class number)."""
    index = read_index(root, split)
    rows = zip(index.samples, ShardReader(index).read(np.arange(len(index))), strict=True)
    return {row["key"].decode(): (content.tobytes(), int(row["label"])) for row, content in rows}


def keys(root: Path, split: str = "train") -> list[str]:
    """The names of a dataset's samples."""
    return sorted(images_of(root, split))


def run(command: str, folder: Path) -> None:
    """Run a command of the shell in a folder."""
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
