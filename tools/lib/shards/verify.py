"""Compares a dataset with what was written: every bit that has changed is found, and located where possible."""

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.common.files import is_hidden, sha256_of
from pipelines.shards.index import read_rows
from pipelines.shards.manifest import AUDIT, INDEX, MANIFEST, Manifest, ShardEntry, read_manifest
from tools.lib.common.process_pool import run_jobs
from tools.lib.shards.images import ImageOptions, RejectedImageError, check_image
from tools.lib.shards.shard import dali_index, read_dali_index
from tools.lib.shards.sources.tars import BLOCK, first_not_zero, tar_header
from tools.lib.shards.sources.webdataset import LABEL_PARTS, tar_members

_NAMED = 20  # This many faults of one shard are named.


@dataclasses.dataclass(frozen=True)
class Fault:
    """A file, or a part of one, that differs from what was written.

    Attributes:
      file: relative to the dataset folder.
      where: sample and bytes, as precisely as they are known.
      what: what was found.
    """

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where + ': ' if self.where else ''}{self.what}"


def verify(
    root: Path, *, decode: bool = False, workers: int = 1, on_shard: Callable[[int, int], None] = lambda i, n: None
) -> list[Fault]:
    """Re-read everything and compare it with the manifest.

    Args:
      decode: also decode every image.
      on_shard: called with the number of finished shards and of all shards.
    Returns:
      The faults, [] if there are none.
    Raises:
      UserError: there is no manifest, or it is damaged, so there is nothing to compare with.
    """
    manifest = read_manifest(root)
    faults, jobs = [], []
    known = {MANIFEST, AUDIT}
    faults += _verify_file(root, AUDIT, manifest["audit"]["sha256"])
    for split, entry in manifest["splits"].items():
        index_faults = _verify_file(root, f"{split}/{INDEX}", entry["index_sha256"])
        faults += index_faults
        known.add(f"{split}/{INDEX}")
        start, names = 0, {shard["sha256"]: shard["name"] for shard in entry["shards"]}
        for shard in entry["shards"]:
            known |= {f"{split}/{shard['name']}", f"{split}/{Path(shard['name']).with_suffix('.idx')}"}
            rows = None if index_faults else (start, start + shard["samples"])
            start += shard["samples"]
            jobs.append((root, split, shard, rows, decode, manifest["source"]["kind"] != "webdataset", names))
    faults += _strangers(root, manifest, known)
    found: dict[int, list[Fault]] = {}
    for number, of_shard in run_jobs(_verify_shard, jobs, workers):
        found[number] = of_shard
        on_shard(len(found), len(jobs))
    return faults + [fault for number in sorted(found) for fault in found[number]]


def _strangers(root: Path, manifest: Manifest, known: set[str]) -> Iterator[Fault]:
    """Yield files that the manifest does not know, except what lay beside indexed tars of another writer."""
    is_foreign = manifest["source"]["kind"] == "webdataset"
    listed = {item["source"] for item in manifest["audit"].get("left_out", ())} if is_foreign else set()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        fine = str(name) in known or (is_foreign and is_hidden(str(name)))
        if path.is_file() and not fine and listed.isdisjoint(map(str, (name, *name.parents))):
            yield Fault(str(name), "", "is not in the manifest; move it away, or verify the folder it came from")


def _verify_file(root: Path, name: str, sha256: str) -> list[Fault]:
    """The fault of a file that is not the one of the manifest."""
    path = root / name
    try:
        if not path.is_file():
            return [Fault(name, "", "missing")]
        if sha256_of(path) == sha256:
            return []
        return [Fault(name, "", f"{path.stat().st_size} bytes that are not those of the manifest: damaged or stale")]
    except OSError as error:
        return [Fault(name, "", f"cannot be read ({error.strerror})")]


def _verify_shard(
    root: Path,
    split: str,
    shard: ShardEntry,
    span: tuple[int, int] | None,
    decode: bool,
    ours: bool,
    names: dict[str, str],
) -> list[Fault]:
    """The faults of a shard and its .idx.

    Args:
      span: which rows of the index are its own, if the index can be used.
      ours: whether `write_shard` made it.
      names: hash -> name of all shards of the split; a shard in the place of another is recognised by it.
    """
    path, name = root / split / shard["name"], f"{split}/{shard['name']}"
    try:
        rows = None if span is None else read_rows(root / split / INDEX, *span)
        faults = _verify_tar(path, name, shard, rows, ours, names)
        if decode and rows is not None and not faults:
            faults = _decode(path, name, rows)
    except OSError as error:
        faults = [Fault(name, "", f"cannot be read ({error.strerror})")]
    return faults + _verify_idx(root, split, shard, intact=not faults)


def _verify_tar(
    path: Path, name: str, shard: ShardEntry, rows: np.ndarray | None, ours: bool, names: dict[str, str]
) -> list[Fault]:
    if not path.is_file():
        return [Fault(name, "", "missing")]
    faults = []
    if path.stat().st_size != shard["bytes"]:
        faults.append(Fault(name, "", f"{path.stat().st_size} bytes, the manifest says {shard['bytes']}"))
    sha256 = sha256_of(path)
    if sha256 == shard["sha256"]:
        return faults
    if sha256 in names:
        return [Fault(name, "", f"holds the content of {names[sha256]}: swapped")]
    if rows is None:
        return [
            *faults,
            Fault(name, "", "damaged or swapped; without the index the place is not known"),
        ]
    found = list(_locate(path, name, rows) if ours else _locate_images(path, name, rows))
    unknown = Fault(name, "", "not the file of the manifest: damaged outside its samples, or rewritten")
    if len(found) > _NAMED:
        found = [*found[:_NAMED], Fault(name, "", f"and {len(found) - _NAMED} more faults")]
    return faults + found or [unknown]


def _verify_idx(root: Path, split: str, shard: ShardEntry, intact: bool) -> list[Fault]:
    name = f"{split}/{Path(shard['name']).with_suffix('.idx')}"
    faults = _verify_file(root, name, shard["idx_sha256"])
    if not faults or not intact or not (root / name).is_file():
        return faults
    found, expected = (root / name).read_bytes(), dali_index(tar_members(root / split / shard["name"]).samples)
    if hashlib.sha256(expected).hexdigest() != shard["idx_sha256"]:  # Another program wrote it.
        return faults
    shorter = min(len(found), len(expected))
    first = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
    line = expected[:first].count(b"\n") + 1
    return [Fault(name, f"line {line}, byte {first}", "does not describe its shard: damaged or stale")]


def _locate(path: Path, name: str, rows: np.ndarray) -> Iterator[Fault]:
    """Yield the damaged parts of a shard: samples, headers and padding that differ from what was written."""
    with open(path, "rb") as file:
        nbytes, position = os.fstat(file.fileno()).st_size, 0
        for row in rows:
            key, label = row["key"].decode(), str(int(row["label"])).encode()
            for member, size, intact in (
                (f"{key}.cls", len(label), lambda data, label=label: data == label),
                (f"{key}.jpg", int(row["nbytes"]), lambda data, crc32=row["crc32"]: zlib.crc32(data) == crc32),
            ):
                header = tar_header(member, size)
                start = position + len(header)
                stop = start + size
                position = stop + -size % BLOCK
                if nbytes < position:
                    yield Fault(name, f"sample {key}, byte {nbytes}", "the shard ends here")
                    return
                if _slice(file, start - len(header), start) != header:
                    where = f"sample {key}, bytes {start - len(header)} to {start}"
                    yield Fault(name, where, f"the tar header of {member} is damaged")
                if not intact(_slice(file, start, stop)):
                    yield Fault(name, f"sample {key}, bytes {start} to {stop}", f"the content of {member} is damaged")
                yield from _check_zeros(file, name, f"the padding after {member}", stop, position)
        if (begin := first_not_zero(file, position)) is not None:
            yield Fault(name, f"byte {begin}", "the end of the tar is damaged")


def _slice(file: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes of a file. Those that are no longer there are missing, where a memory map would end the process."""
    file.seek(start)
    return file.read(stop - start)


def _check_zeros(file: BinaryIO, name: str, what: str, start: int, stop: int) -> Iterator[Fault]:
    rest = _slice(file, start, stop)
    if rest.strip(b"\0"):
        yield Fault(name, f"byte {start + len(rest) - len(rest.lstrip(bytes(1)))}", f"{what} is damaged")


def _locate_images(path: Path, name: str, rows: np.ndarray) -> Iterator[Fault]:
    """Do the same for tars of another writer: check images by their checksums, labels where the .idx has them."""
    labels = _labels(path.with_suffix(".idx"))
    with open(path, "rb") as file:
        for row in rows:
            key, start, nbytes = row["key"].decode(), int(row["offset"]), int(row["nbytes"])
            file.seek(start)
            if zlib.crc32(file.read(nbytes)) != row["crc32"]:
                yield Fault(name, f"sample {key}, bytes {start} to {start + nbytes}", "its image is damaged")
            start, nbytes = labels.get(start, (0, 0))
            file.seek(start)
            if nbytes and file.read(nbytes).strip() != str(int(row["label"])).encode():
                yield Fault(name, f"sample {key}, bytes {start} to {start + nbytes}", "its label is damaged")


def _labels(idx: Path) -> dict[int, tuple[int, int]]:
    """Where the labels lie, from an .idx file: offset of each part of a sample -> (offset, bytes) of its label."""
    labels = {}
    for parts in read_dali_index(idx.read_bytes()) if idx.is_file() else []:
        spans = {extension: (offset, size) for extension, offset, size in parts}
        label = next((spans[name] for name in LABEL_PARTS if name in spans), None)
        if label is not None:
            labels |= {offset: label for offset, _ in spans.values()}
    return labels


def _decode(path: Path, name: str, rows: np.ndarray) -> list[Fault]:
    faults = []
    with open(path, "rb") as file:
        for row in rows:
            start, stop = int(row["offset"]), int(row["offset"]) + int(row["nbytes"])
            where = f"sample {row['key'].decode()}, bytes {start} to {stop}"
            try:
                image = check_image(_slice(file, start, stop), ImageOptions())
            except RejectedImageError as error:
                faults.append(Fault(name, where, str(error)))
                continue
            if (image.height, image.width) != (row["height"], row["width"]):
                size = f"{row['height']} x {row['width']}"
                faults.append(Fault(name, where, f"is {image.height} x {image.width}, the index says {size}"))
    return faults
