"""From the records of all shards to what makes them a dataset: an index for each split, the audit and the manifest."""

import collections
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.files import replacing, sha256_of
from pipelines.shards.index import sample_dtype
from pipelines.shards.manifest import AUDIT, INDEX, split_digest
from tools.lib.shards.entries import HIDDEN, Unused
from tools.lib.shards.shards import HASH_BYTES, read_record

TOOL, VERSION = "tools/shard_imagenet.py", "0.1.0"
_HASHES_AT_A_TIME = 1 << 20  # of the search for duplicates, which never holds more
_EXAMPLES = 1000  # of each kind of remark in the manifest; all of them are in audit.jsonl


def assemble(
    root: Path, records: Path, description: dict, shards: dict[str, list[str]], unused: Iterable[Unused] = ()
) -> dict:
    """Make the index of each split and the audit's file from the records of all shards.

    Args:
      root: the dataset folder.
      records: folder with SPLIT/NAME.json.
      description: the manifest's part that says what the dataset is.
      shards: split -> names of its shards, in order.
      unused: what of the source is no sample.
    Returns:
      The manifest, not yet written.
    """
    paths = {split: [records / split / f"{name}.json" for name in names] for split, names in shards.items()}
    num_classes = len(description["classes"])
    splits = {split: _write_index(root / split / INDEX, found, num_classes) for split, found in paths.items()}
    with replacing(root / AUDIT) as file:
        audit = _write_audit(file, paths, unused)
    return {**description, "tool": TOOL, "splits": splits, "audit": {**audit, "sha256": sha256_of(root / AUDIT)}}


def _write_audit(file: BinaryIO, records: dict[str, list[Path]], unused: Iterable[Unused]) -> dict:
    """Write every remark, a line of JSON each. Returns how many of each kind there are, and the first few."""
    kinds = ("repaired", "rejected", "tiny", "oriented", "duplicates", "hidden", "left_out")
    counts, examples, resized = dict.fromkeys(kinds, 0), {kind: [] for kind in kinds}, 0

    def remark(kind: str, item) -> None:
        counts[kind] += 1
        if len(examples[kind]) < _EXAMPLES:
            examples[kind].append(item)
        file.write(json.dumps({"kind": kind, "what": item}).encode() + b"\n")

    for split, paths in records.items():
        for record in map(read_record, paths):
            resized += record.notes["resized"]
            for kind in ("repaired", "rejected"):
                for item in record.notes[kind]:
                    remark(kind, {**item, "sample": f"{split}/{item['sample']}"})
            for key in record.notes["tiny"]:
                remark("tiny", f"{split}/{key}")
            for row in record.rows:
                if row["orientation"] != 1:
                    remark("oriented", f"{split}/{row['key']}")
    for group in find_duplicates([path for paths in records.values() for path in paths]):
        remark("duplicates", group)
    for each in unused:
        if each.kind == HIDDEN:
            remark("hidden", each.source)
        else:
            remark("left_out", {"source": each.source, "reason": each.reason})
    return {"counts": {**counts, "resized": resized}, **examples}


def _write_index(path: Path, records: list[Path], num_classes: int) -> dict:
    """Write a split's index from its shards' records, one after the other. Returns its entry in the manifest."""
    key_bytes = samples = 0
    for record in map(read_record, records):
        samples += len(record.rows)
        key_bytes = max([key_bytes, *(len(row["key"].encode()) for row in record.rows)])
    if not samples:
        raise UserError(f"{path.parent.name}: no image of this split can be used. Look at the source")
    dtype = sample_dtype(key_bytes)
    entries, counts = [], np.zeros(num_classes, dtype=np.int64)
    with replacing(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_2_0(file, header)
        for number, record in enumerate(map(read_record, records)):
            entries.append(record.entry)
            rows = np.zeros(len(record.rows), dtype=dtype)
            for field in dtype.names:
                rows[field] = number if field == "shard" else [_encoded(row[field]) for row in record.rows]
            file.write(rows.tobytes())
            counts += np.bincount(rows["label"], minlength=num_classes)
    index_sha256 = sha256_of(path)
    return {
        "samples": samples,
        "bytes": sum(entry["bytes"] for entry in entries),
        "class_counts": counts.tolist(),
        "index_sha256": index_sha256,
        "digest": split_digest(index_sha256, [entry["sha256"] for entry in entries]),
        "shards": entries,
    }


def _encoded(value: int | str) -> int | bytes:
    return value.encode() if isinstance(value, str) else value


def find_duplicates(records: list[Path]) -> list[list[str]]:
    """Groups of samples, as SPLIT/KEY, whose sources have the same content, within a split and across splits.

    The hashes are gone through several times, each time for another share of them, so that memory does not grow with
    the dataset.
    """
    paths = [path.with_suffix(".sha256") for path in records]
    total = sum(path.stat().st_size for path in paths) // HASH_BYTES
    passes = max(1, -(-total // _HASHES_AT_A_TIME))
    groups = []
    for share in range(passes):
        # found: [hashes of this share] with the two halves of the hash, the file and the row
        found = np.concatenate([_hashes(path, number, share, passes) for number, path in enumerate(paths)])
        found.sort(order=("high", "low", "file", "row"))
        same = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
        for start, stop in _runs(same):
            groups.append([(int(row["file"]), int(row["row"])) for row in found[start:stop]])
    return sorted(_named(paths, groups))


def _hashes(path: Path, number: int, share: int, passes: int) -> np.ndarray:
    halves = np.frombuffer(path.read_bytes(), dtype=[("high", "<u8"), ("low", "<u8")])
    rows = np.flatnonzero(halves["high"] % np.uint64(passes) == share)
    found = np.empty(len(rows), dtype=[("high", "<u8"), ("low", "<u8"), ("file", "<i4"), ("row", "<i4")])
    found["high"], found["low"], found["file"], found["row"] = halves["high"][rows], halves["low"][rows], number, rows
    return found


def _runs(same: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of equal neighbours; same[i] says that i and i + 1 are equal."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield start, stop + 1


def _named(paths: list[Path], groups: list[list[tuple[int, int]]]) -> list[list[str]]:
    wanted = collections.defaultdict(dict)
    for group in groups:
        for file, row in group:
            wanted[file][row] = ""
    for file, rows in wanted.items():
        record = read_record(paths[file].with_suffix(".json"))
        for row in rows:
            rows[row] = f"{paths[file].parent.name}/{record.rows[row]['key']}"
    return [sorted(wanted[file][row] for file, row in group) for group in groups]
