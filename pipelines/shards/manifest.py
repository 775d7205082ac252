"""The manifest of a dataset folder: its classes, its splits and their shards, each with a hash.

A dataset folder looks like this:

    OUT/manifest.json            classes, and for each split: shards with bytes, samples and sha256; digest
    OUT/audit.jsonl              what was remarked on single images when they were converted
    OUT/train/train-00000.tar    WebDataset: KEY.cls, KEY.jpg
    OUT/train/train-00000.idx    the same for DALI's own webdataset reader
    OUT/train/index.npy          one row a sample: the plan reads it
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from pipelines.common.errors import UserError, clipped
from pipelines.common.settings import misfit

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
AUDIT = "audit.jsonl"
CLASS_ORDERS = ("text", "numeric")  # how names of classes can be sorted
_MAX_MANIFEST = 1 << 28  # bytes; that of ImageNet has 0.2 MB

# These types are the parts of a manifest that are read, and a file is checked against them. Keys that are not
# required may be missing, because older versions did not write them.


class ShardEntry(TypedDict):
    """A shard: its file's name, samples and bytes, and the hashes of the tar and of its DALI index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str


class SplitEntry(TypedDict):
    """A split: its samples, its images of each class, the hash of its index, its digest and its shards in order."""

    samples: int
    bytes: int
    class_counts: list[int]
    index_sha256: str
    digest: str
    shards: list[ShardEntry]
    listing_sha256: NotRequired[str]


class SourceEntry(TypedDict):
    """Where the images came from: the kind of source, and its name."""

    kind: str
    name: str


class OptionsEntry(TypedDict):
    """How the dataset was made; `audit` says whether every image was decoded in full."""

    audit: bool


class Remark(TypedDict):
    """A sample that was repaired or rejected, and why."""

    sample: str
    reason: str


class LeftOut(TypedDict):
    """A file of the source that is no sample, and why."""

    source: str
    reason: str


class AuditCounts(TypedDict):
    """How many images each remark was made about."""

    repaired: int
    rejected: int
    duplicates: int
    tiny: int
    oriented: int
    resized: int
    hidden: NotRequired[int]
    left_out: NotRequired[int]


class AuditEntry(TypedDict):
    """What was remarked on single images: counts, the first ones of each kind, and the hash of the whole list."""

    sha256: str
    counts: AuditCounts
    repaired: list[Remark]
    rejected: list[Remark]
    duplicates: list[list[str]]
    left_out: NotRequired[list[LeftOut]]


class ClassList(TypedDict):
    """The classes in the order of their labels, and where they come from."""

    source: SourceEntry
    classes: list[str]
    class_order: NotRequired[str]


class Manifest(ClassList):
    """A dataset."""

    options: OptionsEntry
    splits: dict[str, SplitEntry]
    audit: AuditEntry


def split_digest(index_sha256: str, shard_sha256: list[str]) -> str:
    """The digest of a split, from the hash of its index file and of each shard in order."""
    return hashlib.sha256("\n".join([index_sha256, *shard_sha256]).encode()).hexdigest()


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's file content, with a hash of itself: any bit that flips in the file is noticed."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def read_manifest(root: Path | str) -> Manifest:
    """The manifest of a dataset folder.

    Raises:
      UserError: there is none, or it is damaged, or of another format version.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: not found, so {root} is not a finished dataset", help_with="making")
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            raise ValueError(f"more than {_MAX_MANIFEST:,} bytes")
        content = path.read_bytes()
        manifest = json.loads(content, parse_int=_count)
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_manifest(manifest, content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged, or not of this program ({clipped(error, 120)}). Restore it, or build the dataset again"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}. Build it again")
    return manifest


def _count(digits: str) -> int:
    """A number of a manifest, each of which counts something. Raises a ValueError about any that counts nothing."""
    if len(digits) > 15 or not digits.isdecimal():
        raise ValueError(f"{clipped(digits)} is no count")
    return int(digits)


def _check_manifest(manifest: Manifest, content: bytes) -> None:
    """Raise a ValueError unless it has all that a command reads, and names files in the folders of its splits."""
    if manifest_bytes(manifest) != content:
        raise ValueError("its hash is another")
    if key := misfit(manifest, Manifest):
        raise ValueError(f"'{key}' is missing or of another kind")
    for split, entry in manifest["splits"].items():
        if not entry["shards"]:
            raise ValueError(f"{split} has no shards")
        if len(entry["class_counts"]) != len(manifest["classes"]) or not entry["class_counts"]:
            raise ValueError(f"{split} counts {len(entry['class_counts'])} of {len(manifest['classes'])} classes")
        for name in (split, *(shard["name"] for shard in entry["shards"])):
            raw = os.fsencode(name)  # raises a ValueError about a name that no file can have
            if raw in (b"", b".", b"..") or b"/" in raw or b"\0" in raw:
                raise ValueError(f"{ascii(name)} is no name of a file")


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
    # re.split puts what the group matches, the digits, at the odd indices.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def class_order(manifest: ClassList) -> str:
    """Say what decided the order of a dataset's classes.

    Returns:
      "given" where the source numbers its classes, "text" or "numeric" where the person who built the dataset chose,
      and "unstated" where names were sorted as text because nobody chose.
    """
    from_names = manifest["source"]["kind"] in ("folder", "kaggle")  # older manifests do not say it
    return manifest.get("class_order") or ("unstated" if from_names else "given")


def class_order_doubt(manifest: ClassList) -> str:
    """One sentence where nobody chose the order of the classes and common tools disagree on it; "" elsewhere.

    Weights whose outputs have no names may then be in either order.
    """
    if class_order(manifest) != "unstated":
        return ""
    text, numeric = (sorted_classes(manifest["classes"], order) for order in CLASS_ORDERS)
    first = next((label for label, name in enumerate(text) if name != numeric[label]), None)
    if first is None:
        return ""
    return (
        f"the order of the classes was not stated: class {first} is '{clipped(text[first], 30)}' in text order "
        f"(torchvision's, taken here) and '{clipped(numeric[first], 30)}' in numeric order (timm's)"
    )
