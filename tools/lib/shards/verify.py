"""Compares a dataset with what was written: every bit that has changed is found, and located where possible."""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipelines.common.files import is_hidden, sha256_of
from pipelines.shards.index import read_rows
from pipelines.shards.manifest import AUDIT, INDEX, MANIFEST, Manifest, ShardEntry, read_manifest
from tools.lib.common.process_pool import run_jobs
from tools.lib.shards.images import ImageOptions, RejectedImageError, check_image
from tools.lib.shards.sources.tars import BLOCK, first_not_zero, tar_header

_NAMED = 20  # This many faults of one shard are named.


def verify(
    root: Path, *, decode: bool = False, workers: int = 1, on_shard: Callable[[int, int], None] = lambda i, n: None
) -> list[str]:
    """Re-read everything and compare it with the manifest.

    Args:
      decode: also decode every image.
      on_shard: called with the number of finished shards and of all shards.
    Returns:
      The faults, [] if there are none. Each names a file, relative to the dataset folder, and what is wrong with it;
      where they are known, the sample and its bytes.
    Raises:
      UserError: there is no manifest, or it is damaged, so there is nothing to compare with.
    """
    manifest = read_manifest(root)
    is_foreign = manifest["source"]["kind"] == "webdataset"
    faults, jobs = list(_compare(root, AUDIT, manifest["audit"]["sha256"])), []
    known = {MANIFEST, AUDIT}
    for split, entry in manifest["splits"].items():
        index_faults = list(_compare(root, f"{split}/{INDEX}", entry["index_sha256"]))
        faults += index_faults
        start = 0
        for shard in entry["shards"]:
            jobs.append((root, split, shard, None if index_faults else start, decode, is_foreign))
            start += shard["samples"]
            known |= {f"{split}/{Path(shard['name']).with_suffix(suffix)}" for suffix in (".tar", ".idx")}
        known.add(f"{split}/{INDEX}")
    faults += _strangers(root, manifest, known, is_foreign)
    found: dict[int, list[str]] = {}
    for number, of_shard in run_jobs(_verify_shard, jobs, workers):
        found[number] = of_shard
        on_shard(len(found), len(jobs))
    return faults + [fault for number in sorted(found) for fault in found[number]]


def _strangers(root: Path, manifest: Manifest, known: set[str], is_foreign: bool) -> Iterator[str]:
    """Yield files that the manifest does not know, except what lay beside indexed tars of another writer."""
    listed = {item["source"] for item in manifest["audit"].get("left_out", ())} if is_foreign else set()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        fine = str(name) in known or (is_foreign and is_hidden(str(name)))
        if path.is_file() and not fine and listed.isdisjoint(map(str, (name, *name.parents))):
            yield f"{name}: is not in the manifest; move it away, or verify the folder it came from"


def _compare(root: Path, name: str, sha256: str) -> Iterator[str]:
    """Yield the fault of a file that is not the one of the manifest."""
    path = root / name
    try:
        if not path.is_file():
            yield f"{name}: missing"
        elif sha256_of(path) != sha256:
            yield f"{name}: {path.stat().st_size} bytes that are not those of the manifest: damaged, stale or swapped"
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror})"


def _verify_shard(
    root: Path, split: str, shard: ShardEntry, start: int | None, decode: bool, is_foreign: bool
) -> list[str]:
    """The faults of a shard and its .idx.

    Args:
      start: which row of the index is its first; None if the index cannot be used.
      is_foreign: whether another program than `write_shard` made it.
    """
    path, name = root / split / shard["name"], f"{split}/{shard['name']}"
    faults, located = list(_compare(root, name, shard["sha256"])), []
    if path.is_file() and start is not None and (faults or decode):
        try:
            rows = read_rows(root / split / INDEX, start, start + shard["samples"])
            located = [f"{name}: {fault}" for fault in _locate(path, rows, decode, is_foreign)]
        except OSError as error:
            located = [f"{name}: cannot be read ({error.strerror})"]
    more = [f"{name}: and {len(located) - _NAMED} more faults"] if len(located) > _NAMED else []
    idx = _compare(root, f"{split}/{Path(shard['name']).with_suffix('.idx')}", shard["idx_sha256"])
    return [*faults, *located[:_NAMED], *more, *idx]


def _locate(path: Path, rows: np.ndarray, decode: bool, is_foreign: bool) -> Iterator[str]:
    """Yield the damaged parts of a shard: of images, and in our own shards of headers, labels and padding."""
    with open(path, "rb") as file:
        nbytes, stop = os.fstat(file.fileno()).st_size, 0

        def part(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        for row in rows:
            key, start = row["key"].decode(), int(row["offset"])
            stop = start + int(row["nbytes"])
            if nbytes < stop:
                yield f"sample {key}, byte {nbytes}: the shard ends here"
                return
            where, image = f"sample {key}, bytes {start} to {stop}", part(start, stop)
            if zlib.crc32(image) != row["crc32"]:
                yield f"{where}: its image is damaged"
            elif decode and (fault := _why_undecodable(image, row)):
                yield f"{where}: {fault}"
            if not is_foreign:
                label = str(int(row["label"])).encode()
                before = tar_header(f"{key}.cls", len(label)) + label.ljust(BLOCK, b"\0")
                before += tar_header(f"{key}.jpg", stop - start)
                if part(start - len(before), start) != before:
                    yield f"sample {key}, bytes {start - len(before)} to {start}: its label or a tar header is damaged"
                if (place := first_not_zero(file, stop, stop + -stop % BLOCK)) is not None:
                    yield f"byte {place}: the padding after sample {key} is damaged"
        if not is_foreign and (place := first_not_zero(file, stop + -stop % BLOCK, nbytes)) is not None:
            yield f"byte {place}: the end of the tar is damaged"


def _why_undecodable(image: bytes, row: np.void) -> str:
    """Say why an image, whose bytes are those that were written, cannot be used; "" if it can."""
    try:
        checked = check_image(image, ImageOptions())
    except RejectedImageError as error:
        return str(error)
    if (checked.height, checked.width) == (row["height"], row["width"]):
        return ""
    return f"is {checked.height} x {checked.width}, the index says {row['height']} x {row['width']}"
