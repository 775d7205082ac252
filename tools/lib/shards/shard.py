"""One shard: a tar, its DALI index, and a record of its samples. It is complete once the record is there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict

from pipelines.common.errors import UserError
from pipelines.common.files import replacing, write_synced
from pipelines.shards.manifest import Remark, ShardEntry
from tools.lib.shards.images import TINY_PX, CheckedImage, ImageOptions, RejectedImageError, check_image
from tools.lib.shards.sources.source import Entry
from tools.lib.shards.sources.tars import BLOCK, Parts

if TYPE_CHECKING:  # webdataset imports torch, which takes seconds, and only writing needs it
    from webdataset.writer import TarWriter

HASH_BYTES = 16  # This much of the sha256 of each source is kept beside the record; duplicates are found by it.


class SampleRow(TypedDict):
    """A sample in a shard: the fields of pipelines.shards.index.sample_dtype but the shard."""

    key: str
    offset: int
    nbytes: int
    label: int
    height: int
    width: int
    crc32: int
    orientation: int


class Rejection(Remark):
    """A sample that cannot be used; `source` is how messages name its file."""

    source: str


class Notes(TypedDict):
    """Remarks of the audit on the samples of a shard.

    `tiny` has keys, and `resized` is a number of samples. Only tars of another writer have `hidden` members, which are
    passed over, and `parts` that are not read: the number of each extension.
    """

    repaired: list[Remark]
    rejected: list[Rejection]
    tiny: list[str]
    resized: int
    hidden: list[str]
    parts: dict[str, int]


@dataclasses.dataclass
class ShardRecord:
    """The record of a finished shard, with its samples in the order of the tar."""

    entry: ShardEntry
    rows: list[SampleRow]
    notes: Notes


class RecordBuilder:
    """Collects the record of a shard, one sample after the other."""

    def __init__(self):
        self._rows: list[SampleRow] = []
        self._hashes: list[bytes] = []
        self.notes = Notes(repaired=[], rejected=[], tiny=[], resized=0, hidden=[], parts={})

    def add(self, key: str, label: int, offset: int, image: CheckedImage, source: bytes) -> None:
        """Add a sample whose image is at byte `offset` of the tar; duplicates are found by the bytes of `source`."""
        self._rows.append(
            {
                "key": key,
                "offset": offset,
                "nbytes": len(image.jpeg),
                "label": label,
                "height": image.height,
                "width": image.width,
                "crc32": zlib.crc32(image.jpeg),
                "orientation": image.orientation,
            }
        )
        self._hashes.append(hashlib.sha256(source).digest()[:HASH_BYTES])
        if image.repaired:
            self.notes["repaired"].append({"sample": key, "reason": image.repaired})
        if min(image.height, image.width) < TINY_PX:
            self.notes["tiny"].append(key)
        self.notes["resized"] += image.resized

    def reject(self, key: str, source: str, reason: str) -> None:
        """Add a sample that cannot be used, and why."""
        self.notes["rejected"].append({"sample": key, "source": source, "reason": reason})

    def write(self, path: Path, tar: Path, sha256: str, idx: bytes) -> None:
        """Write the record, which makes the shard complete, and beside it the hash of each sample's source.

        Args:
          sha256: of the tar, in hex.
          idx: the content of the tar's .idx file.
        """
        entry = ShardEntry(
            name=tar.name,
            bytes=tar.stat().st_size,
            samples=len(self._rows),
            sha256=sha256,
            idx_sha256=hashlib.sha256(idx).hexdigest(),
        )
        write_synced(path.with_suffix(".sha256"), b"".join(self._hashes))
        write_synced(path, json.dumps(vars(ShardRecord(entry, self._rows, self.notes))).encode())


def read_record(path: Path) -> ShardRecord:
    """The record of a finished shard."""
    return ShardRecord(**json.loads(path.read_text()))


def write_shard(
    path: Path, records: Path, entries: Iterable[Entry], read: Callable[[str], bytes], options: ImageOptions
) -> None:
    """Write a shard and then its record, the same bytes on every machine.

    A process that dies leaves a file with its process number in the name and nothing else.

    Args:
      path: of the tar.
      records: folder for the record, which gets the tar's name.
      entries: the samples, in the order in which they are written.
      read: location -> the source's bytes.
    Raises:
      UserError: a source cannot be read at all (which says nothing about the image).
      OSError: the shard cannot be written.
    """
    from webdataset.writer import TarWriter

    members: dict[str, Parts] = {}
    record = RecordBuilder()
    with replacing(path) as file:
        hashing = _HashingFile(file)
        # TarWriter calls write() alone.
        with TarWriter(hashing, encoder=False, mtime=0, user="", group="") as tar:  # pyright: ignore[reportArgumentType]
            for entry in entries:
                try:
                    content = read(entry.location)
                    image = check_image(content, options)
                except RejectedImageError as error:
                    record.reject(entry.key, entry.source, str(error))
                    continue
                except OSError as error:
                    reason = f"cannot be read ({error.strerror or error})"
                    raise UserError(f"{entry.source}: {reason}. Fix that and run the same command again") from error
                assert entry.key not in members, entry.key
                members[entry.key] = _write_sample(tar, entry, image.jpeg)
                record.add(entry.key, entry.label, members[entry.key]["jpg"][0], image, content)
    idx = dali_index(members)
    write_synced(path.with_suffix(".idx"), idx)
    record.write(records / f"{path.stem}.json", path, hashing.sha256.hexdigest(), idx)


class _HashingFile:
    """Hashes what is meant to be written, since what is read back from the disk may be damaged."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self._file.write(content)


def _write_sample(tar: TarWriter, entry: Entry, jpeg: bytes) -> Parts:
    """Write one sample. Returns extension -> (offset, bytes) of its parts."""
    label, start = str(entry.label).encode(), tar.tarstream.offset
    tar.write({"__key__": entry.key, "cls": label, "jpg": jpeg})
    # The tar now ends with a header, the label in one block, a header of the same size and the JPEG in whole blocks.
    padded = len(jpeg) + -len(jpeg) % BLOCK
    header = (tar.tarstream.offset - start - BLOCK - padded) // 2
    return {"cls": (start + header, len(label)), "jpg": (tar.tarstream.offset - padded, len(jpeg))}


def dali_index(members: dict[str, Parts], version: str = "v1.2") -> bytes:
    """The content of the .idx file that DALI's fn.readers.webdataset takes, as its wds2idx writes it.

    Fields are separated by spaces, so where names have some, the file is of the version without names, v1.1.
    """
    if any(len(key.split()) != 1 for key in members):
        version = "v1.1"
    lines = []
    for key, parts in members.items():
        fields = [
            f"{extension} {offset} {size}" + (f" {key}.{extension}" if version == "v1.2" else "")
            for extension, (offset, size) in parts.items()
            if extension
        ]
        lines += [" ".join(fields)] if fields else []
    return "\n".join([f"{version} {len(lines)}", *lines]).encode(errors="surrogateescape") + b"\n"
