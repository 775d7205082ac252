"""The index of a split: where every sample lies, its label and its size."""

import dataclasses
import errno
import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.common.errors import UserError, clipped
from pipelines.shards.jpeg import MAX_PIXELS
from pipelines.shards.manifest import INDEX, MANIFEST, read_manifest

_MAX_ROW = 1 << 16  # bytes; most of a row is its key
_FIELDS = {
    "shard": "<i4",
    "offset": "<i8",
    "nbytes": "<i4",
    "label": "<i8",
    "height": "<i4",
    "width": "<i4",
    "crc32": "<u4",
    "orientation": "u1",
}


def sample_dtype(key_bytes: int) -> np.dtype:
    """The row of an index; `key_bytes` is the length of the longest key in UTF-8."""
    return np.dtype([*_FIELDS.items(), ("key", f"S{max(1, key_bytes)}")])


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one split lie.

    Attributes:
      paths: the shards, in order.
      samples: structured array [n] of `sample_dtype`: shard (index into paths), offset and nbytes of the JPEG within
        the shard, label, height and width in pixels as stored (EXIF orientation is recorded, not applied), crc32 of the
        JPEG, orientation (1 is upright), key.
      num_classes: labels are 0 <= label < num_classes.
      digest: hex sha256 over the index and the shards' hashes; two datasets with the same digest are the same data.
      audited: whether every image was decoded in full when the dataset was made.
    """

    paths: tuple[Path, ...]
    samples: np.ndarray
    num_classes: int
    digest: str
    audited: bool = True

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, sample: int) -> str:
        """How an error names a sample: shard, key and byte."""
        row = self.samples[sample]
        return f"{self.paths[row['shard']].name}: sample {row['key'].decode()} at byte {row['offset']}"


def synthetic_index(num_samples: int, num_classes: int, height: int = 375, width: int = 500) -> ShardIndex:
    """An index of images that do not exist, of one size (by default the most frequent one of ImageNet).

    A sample's label is its row modulo num_classes.
    """
    samples = np.zeros(num_samples, dtype=sample_dtype(1))
    samples["label"] = np.arange(num_samples) % num_classes
    samples["height"], samples["width"] = height, width
    return ShardIndex((Path("synthetic"),), samples, num_classes, f"synthetic-{num_samples}-{num_classes}")


def read_index(root: Path, split: str) -> ShardIndex:
    """Read the index of one split of a dataset folder, and check it against the manifest and the shards.

    It is read and not memory-mapped: a mapped file that shrinks in mid-run would end the process with SIGBUS.

    Raises:
      UserError: the split, its index or a shard is missing, truncated, stale or empty, or a row makes no sense.
    """
    manifest = read_manifest(root)
    if split not in manifest["splits"]:
        raise UserError(f"{root / MANIFEST}: has no split '{split}', only {', '.join(manifest['splits'])}")
    entry = manifest["splits"][split]
    path = root / split / INDEX
    samples = _read_samples(path, entry["index_sha256"], entry["samples"])
    paths = tuple(root / split / shard["name"] for shard in entry["shards"])
    shard_bytes = [shard["bytes"] for shard in entry["shards"]]
    for shard_path, expected in zip(paths, shard_bytes, strict=True):
        found = shard_path.stat().st_size if shard_path.is_file() else "no"
        if found != expected:
            raise UserError(f"{shard_path}: {found} bytes, the manifest says {expected}. {_REBUILD}")
    _check_rows(path, samples, np.array(shard_bytes), len(manifest["classes"]))
    return ShardIndex(paths, samples, len(manifest["classes"]), entry["digest"], manifest["options"]["audit"])


_REBUILD = "Build the dataset again, or restore the file"


def _read_samples(path: Path, sha256: str, num_samples: int) -> np.ndarray:
    """Read all rows of an index file that has the manifest's hash and number of samples."""
    try:
        is_special = path.exists() and not path.is_file()  # Reading from a pipe would wait for ever.
        if is_special or path.stat().st_size > _MAX_ROW * (num_samples + 1):
            raise UserError(f"{path}: not an index of {num_samples:,} samples. {_REBUILD}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {_REBUILD}") from error
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(
            f"{path}: truncated, damaged or stale (sha256 {digest[:12]}..., the manifest says {sha256[:12]}...). "
            f"{_REBUILD}"
        )
    try:
        file = io.BytesIO(content)
        shape, dtype = _read_header(file)
        if len(shape) != 1 or dtype != sample_dtype(dtype["key"].itemsize):
            raise ValueError("rows of another kind")
        samples = np.frombuffer(content, dtype, shape[0], file.tell())  # It reads `content`, and copies nothing.
    except Exception as error:  # Bytes that are no array bring NumPy to raise nearly anything.
        raise UserError(f"{path}: not an index ({clipped(error, 120)}). {_REBUILD}") from error
    if not len(samples):
        raise UserError(f"{path}: holds no samples. Build the dataset again from a folder with images")
    return samples


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of NumPy's file format: the array's shape and dtype. Its values follow in the file."""
    is_first_version = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first_version else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def read_rows(path: Path, start: int, stop: int) -> np.ndarray:
    """Read the rows [start, stop) of an index file whose content has been checked; no others are read.

    Raises:
      OSError: it cannot be read, or has changed since.
    """
    with open(path, "rb") as file:
        _, dtype = _read_header(file)
        file.seek(start * dtype.itemsize, os.SEEK_CUR)
        rows = np.fromfile(file, dtype, stop - start)
    if len(rows) != stop - start:
        raise OSError(errno.EIO, "has become shorter", str(path))
    return rows


def _check_rows(path: Path, samples: np.ndarray, shard_bytes: np.ndarray, num_classes: int) -> None:
    """Raise a UserError that names the first sample that is not in its shard, or has an impossible label or size."""
    for what, is_fine in _fine(samples, shard_bytes, num_classes).items():
        if not is_fine.all():
            row = int(np.argmin(is_fine))
            key = clipped(samples["key"][row].decode(errors="backslashreplace"))
            raise UserError(f"{path}: sample {key} (row {row}) has an impossible {what}. {_REBUILD}")


def _fine(rows: np.ndarray, shard_bytes: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """The rows that make sense, in each respect: bool [n]."""
    shard, offset, nbytes = rows["shard"], rows["offset"], rows["nbytes"]
    in_range = (shard >= 0) & (shard < len(shard_bytes))
    ends = shard_bytes[np.where(in_range, shard, 0)]
    pixels = rows["height"].astype(np.int64) * rows["width"]
    return {
        "place in its shard": in_range & (offset >= 0) & (nbytes > 0) & (offset <= ends - nbytes),
        "label": (rows["label"] >= 0) & (rows["label"] < num_classes),
        "size": (rows["height"] > 0) & (rows["width"] > 0) & (pixels <= MAX_PIXELS),
    }
