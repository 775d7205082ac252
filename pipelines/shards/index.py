"""The index of a sharded split: where every sample lies, its label and its size. And the manifest that names it.

A dataset folder looks like this (`tools/shard_imagenet.py` writes it):

    OUT/manifest.json            classes, and for each split: shards with bytes, samples and sha256; digest
    OUT/audit.jsonl              what was remarked on single images when they were converted
    OUT/train/train-00000.tar    WebDataset: KEY.cls, KEY.jpg
    OUT/train/train-00000.idx    the same for DALI's own webdataset reader
    OUT/train/index.npy          one row a sample: the plan reads it
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.common.errors import UserError, clipped
from pipelines.shards.jpeg import MAX_PIXELS

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
AUDIT = "audit.jsonl"
_MAX_MANIFEST = 1 << 28  # bytes; that of ImageNet has 0.2 MB
_MAX_ROW = 1 << 16  # bytes; most of a row is its key
_CHECKED_TOGETHER = 1 << 15  # rows, which stay in the processor's cache meanwhile: that is faster than all at once
_MOST_COUNT = 1 << 48  # of bytes, too
_HEADER_BYTES = 4096  # more than the header of an index file has
CLASS_ORDERS = ("text", "numeric")  # how names of classes can be sorted
# The commands read these fields of a manifest. [X] is a list of X, {str: X} an object of any keys; a key in brackets,
# as in "[left_out]", may be missing: older versions did not write it.
_COUNTS = {name: int for name in ("repaired", "rejected", "duplicates", "tiny", "oriented", "resized")}
_REMARKS = {"repaired": [{"sample": str, "reason": str}], "rejected": [{"sample": str, "reason": str}]}
_SHARD = {"name": str, "samples": int, "bytes": int, "sha256": str, "idx_sha256": str}
_SPLIT = {
    **{"samples": int, "bytes": int, "class_counts": [int], "index_sha256": str, "digest": str},
    **{"[listing_sha256]": str, "shards": [_SHARD]},
}
_MANIFEST = {
    "source": {"kind": str, "name": str},
    "options": {"audit": bool},
    "classes": [str],
    "[class_order]": str,
    "splits": {str: _SPLIT},
    "audit": {
        "sha256": str,
        "counts": {**_COUNTS, "[hidden]": int, "[left_out]": int},
        **_REMARKS,
        "duplicates": [[str]],
        "[left_out]": [{"source": str, "reason": str}],
    },
}
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


def split_digest(index_sha256: str, shard_sha256: list[str]) -> str:
    """The digest of a split, from the hash of its index file and of each shard in order."""
    return hashlib.sha256("\n".join([index_sha256, *shard_sha256]).encode()).hexdigest()


def manifest_bytes(manifest: dict) -> bytes:
    """The manifest's file content, with a hash of itself: any bit that flips in the file is noticed."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def read_manifest(root: Path) -> dict:
    """The manifest of a dataset folder.

    Raises:
      UserError: there is none, or it is damaged, or of another format version.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{path}: not found, so {root} is not a finished dataset. Make one with "
            "'python tools/shard_imagenet.py build IMAGE_FOLDER OUT', and give OUT"
        )
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            raise ValueError(f"more than {_MAX_MANIFEST:,} bytes")
        content = path.read_bytes()
        manifest = json.loads(content)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}). Restore it, or build the dataset again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}. Build it again")
    if manifest_bytes(manifest) != content:
        raise UserError(f"{path}: damaged (its hash is another). Restore it, or build the dataset again")
    try:
        _check_manifest(manifest)
    except ValueError as error:
        raise UserError(f"{path}: not of this program ({clipped(error, 120)}). Build the dataset again") from error
    return manifest


def _check_manifest(manifest: dict) -> None:
    """Raise a ValueError unless it has all that a command reads, and names files in the folders of its splits."""
    _check_shape(manifest, _MANIFEST, "")
    for split, entry in manifest["splits"].items():
        if not entry["shards"]:
            raise ValueError(f"{split} has no shards")
        if len(entry["class_counts"]) != len(manifest["classes"]) or not entry["class_counts"]:
            raise ValueError(f"{split} counts {len(entry['class_counts'])} of {len(manifest['classes'])} classes")
        for name in (split, *(shard["name"] for shard in entry["shards"])):
            raw = os.fsencode(name)  # a ValueError where it cannot be
            if raw in (b"", b".", b"..") or {*raw} & {*b"/\0"}:
                raise ValueError(f"{ascii(name)} is no name of a file")


def _check_shape(value: object, shape: object, where: str) -> None:
    """Raise a ValueError that names the first part that is not as `_MANIFEST` has it; numbers are counts."""
    kind = shape if isinstance(shape, type) else type(shape)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_COUNT
    if not (is_count if kind is int else isinstance(value, kind)):
        raise ValueError(f"{where} is {clipped(ascii(value), 40)}")
    if isinstance(shape, list):
        for i, item in enumerate(value):
            _check_shape(item, shape[0], f"{where}[{i}]")
    elif kind is dict and str in shape:
        for key, item in value.items():
            _check_shape(item, shape[str], f"{where}.{key}")
    elif kind is dict:
        for key, inner in shape.items():
            name = key.strip("[]")
            if name in value:
                _check_shape(value[name], inner, f"{where}.{name}".lstrip("."))
            elif name == key:
                raise ValueError(f"{where}.{name} is missing".lstrip("."))


def sorted_classes(names: list[str], order: str) -> list[str]:
    """Class names in one of CLASS_ORDERS.

    `text` compares them character by character, as torchvision's ImageFolder does. `numeric` compares digits as numbers
    and letters without case, as timm's readers do.
    Source: timm.utils.natural_key, timm.data.readers.reader_image_folder.
    """
    if order == "text":
        return sorted(names)
    return sorted(sorted(names), key=_numeric_key)


def _numeric_key(name: str) -> list[str | int]:
    # re.split puts what the group matches, the digits, at the odd places.
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]


def class_order(manifest: dict) -> str:
    """Say what decided the order of a dataset's classes.

    Returns:
      "given" where the source numbers its classes, "text" or "numeric" where the person who built the dataset chose,
      and "unstated" where names were sorted as text because nobody chose.
    """
    from_names = manifest["source"]["kind"] in ("folder", "kaggle")  # older manifests do not say it
    return manifest.get("class_order") or ("unstated" if from_names else "given")


def class_order_doubt(manifest: dict) -> str:
    """One sentence where nobody chose the order of the classes and common tools disagree on it; "" elsewhere.

    Weights whose outputs have no names may then be in either order.
    """
    if class_order(manifest) != "unstated":
        return ""
    text, numeric = (sorted_classes(manifest["classes"], order) for order in CLASS_ORDERS)
    differing = [place for place, pair in enumerate(zip(text, numeric, strict=True)) if pair[0] != pair[1]]
    if not differing:
        return ""
    place = differing[0]
    return (
        f"the order of the classes was not stated: class {place} is '{clipped(text[place], 30)}' in text order "
        f"(torchvision's, taken here) and '{clipped(numeric[place], 30)}' in numeric order (timm's); "
        f"{len(differing)} of {len(text)} classes differ"
    )


def read_index(root: Path, split: str) -> ShardIndex:
    """Read the index of one split of a dataset folder, and check it against the manifest and the shards.

    It is read and not memory-mapped: a mapped file that shrinks in mid-run would end the process with SIGBUS.

    Raises:
      UserError: the split, its index or a shard is missing, truncated, stale or empty, or a row makes no sense.
    """
    root = Path(root)
    manifest = read_manifest(root)
    if split not in manifest["splits"]:
        raise UserError(f"{root / MANIFEST}: has no split '{split}', only {', '.join(manifest['splits'])}")
    entry = manifest["splits"][split]
    path = root / split / INDEX
    samples = _read_samples(path, entry["index_sha256"], entry["samples"])
    paths = tuple(root / split / shard["name"] for shard in entry["shards"])
    for shard_path, shard in zip(paths, entry["shards"], strict=True):
        _check_size(shard_path, shard["bytes"])
    _check_rows(path, samples, np.array([shard["bytes"] for shard in entry["shards"]]), len(manifest["classes"]))
    return ShardIndex(paths, samples, len(manifest["classes"]), entry["digest"], manifest["options"]["audit"])


_REBUILD = "Build the dataset again, or restore the file"


def _read_samples(path: Path, sha256: str, num_samples: int) -> np.ndarray:
    """Read all rows of an index file that has the manifest's hash and number of samples."""
    if path.exists() and not path.is_file():  # reading from a pipe would wait for ever
        raise UserError(f"{path}: not a regular file. {_REBUILD}")
    try:
        if (nbytes := path.stat().st_size) > _HEADER_BYTES + _MAX_ROW * num_samples:
            raise UserError(f"{path}: {nbytes:,} bytes are too many for {num_samples:,} samples. {_REBUILD}")
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {_REBUILD}") from error
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(
            f"{path}: truncated, damaged or stale (sha256 {digest[:12]}..., the manifest says {sha256[:12]}...). "
            f"{_REBUILD}"
        )
    content.flags.writeable = False
    try:
        samples = _rows_of(content)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not an index ({clipped(error, 120)}). {_REBUILD}") from error
    if not len(samples):
        raise UserError(f"{path}: holds no samples. Build the dataset again from a folder with images")
    return samples


def _rows_of(content: np.ndarray) -> np.ndarray:
    """View the bytes of an .npy file as the rows of an index. Raises a ValueError, TypeError or KeyError otherwise."""
    start, shape, dtype = _npy_header(io.BytesIO(content[:_HEADER_BYTES].tobytes()))
    samples = content[start:].view(dtype)
    if samples.shape != shape or dtype != sample_dtype(dtype["key"].itemsize):
        raise ValueError("rows of another kind or number")
    return samples


def _npy_header(file: BinaryIO) -> tuple[int, tuple[int, ...], np.dtype]:
    """Read where the rows of an .npy file begin, how many there are, and their type."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read(file)
    return file.tell(), shape, dtype


def read_rows(path: Path, start: int, stop: int) -> np.ndarray:
    """Read the rows [start, stop) of an index file whose content has been checked; no others are read.

    Raises:
      OSError: it cannot be read, or has changed since.
    """
    with open(path, "rb") as file:
        first, _, dtype = _npy_header(file)
        begin, end = (first + row * dtype.itemsize for row in (start, stop))
        content = b""
        if end <= os.fstat(file.fileno()).st_size:  # else as much memory would be asked for
            file.seek(begin)
            content = file.read(end - begin)
    if len(content) != end - begin:
        raise OSError(errno.EIO, "has become shorter", str(path))
    return np.frombuffer(content, dtype)


def _check_rows(path: Path, samples: np.ndarray, shard_bytes: np.ndarray, num_classes: int) -> None:
    """Raise a UserError that names the first sample that is not in its shard, or has an impossible label or size."""
    for start in range(0, len(samples), _CHECKED_TOGETHER):
        rows = samples[start : start + _CHECKED_TOGETHER]
        for what, is_fine in _fine(rows, shard_bytes, num_classes).items():
            if not is_fine.all():
                row = int(np.argmin(is_fine))
                key = clipped(rows["key"][row].decode(errors="backslashreplace"))
                raise UserError(f"{path}: sample {key} (row {start + row}) has an impossible {what}. {_REBUILD}")


def _fine(rows: np.ndarray, shard_bytes: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Which rows make sense in each respect: bool [n]."""
    shard, offset, nbytes = rows["shard"], rows["offset"], rows["nbytes"]
    in_range = (shard >= 0) & (shard < len(shard_bytes))
    ends = shard_bytes[np.where(in_range, shard, 0)]
    pixels = rows["height"].astype(np.int64) * rows["width"]
    return {
        "place in its shard": in_range & (offset >= 0) & (nbytes > 0) & (offset <= ends - nbytes),
        "label": (rows["label"] >= 0) & (rows["label"] < num_classes),
        "size": (rows["height"] > 0) & (rows["width"] > 0) & (pixels <= MAX_PIXELS),
    }


def _check_size(path: Path, num_bytes: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Restore the shard, or build again") from error
    if found != num_bytes:
        raise UserError(f"{path}: {found} bytes, the manifest says {num_bytes}. Restore the shard, or build again")
