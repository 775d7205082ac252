"""Makes a dataset of finished shards: an index for each split, the audit and the manifest, from the shards' records."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.files import replacing, sha256_of
from pipelines.shards.index import sample_dtype
from pipelines.shards.manifest import AUDIT, INDEX, ClassList, ShardEntry, SourceEntry, SplitEntry, split_digest
from tools.lib.shards.shard import HASH_BYTES, ShardRecord, read_record
from tools.lib.shards.sources.source import HIDDEN, Unused

TOOL, VERSION = "tools/shard_imagenet.py", "0.1.0"
_HASHES_AT_A_TIME = 1 << 20  # The search for duplicates never holds more.
_KINDS = ("repaired", "rejected", "tiny", "oriented", "duplicates", "hidden", "left_out")
_EXAMPLES = 1000  # The manifest has this many remarks of each kind; audit.jsonl has all of them.


class SourceDescription(SourceEntry, total=False):
    """A source with the files and columns that identify it besides its kind and name, as `Source` has them."""

    files: dict[str, int]
    columns: list[str]


class Description(ClassList):
    """The parts of a manifest that say what a dataset is and how it was made."""

    format_version: int
    made_with: dict[str, str]
    options: dict[str, Any]
    class_names: list[str]


def assemble(
    root: Path, records: Path, description: Mapping[str, Any], shards: dict[str, list[str]], unused: Iterable[Unused]
) -> dict[str, Any]:
    """Make the index of each split and the audit's file from the records of all shards.

    Args:
      root: the dataset folder.
      records: folder with SPLIT/NAME.json.
      description: a `Description`.
      shards: split -> names of its shards, in order.
      unused: what of the source is no sample.
    Returns:
      The manifest, not yet written.
    """
    paths = {split: [records / split / f"{name}.json" for name in names] for split, names in shards.items()}
    num_classes = len(description["classes"])
    splits = {split: _write_index(root / split / INDEX, found, num_classes) for split, found in paths.items()}
    with replacing(root / AUDIT) as file:
        audit = _Audit(file)
        for split, found in paths.items():
            for path in found:
                audit.add_record(split, read_record(path))
        for group in find_duplicates([path for found in paths.values() for path in found]):
            audit.add("duplicates", group)
        for each in unused:
            if each.kind == HIDDEN:
                audit.add("hidden", each.source)
            else:
                audit.add("left_out", {"source": each.source, "reason": each.reason})
    audit_entry = {
        "counts": {**audit.counts, "resized": audit.resized},
        **audit.examples,
        "sha256": sha256_of(root / AUDIT),
    }
    return {**description, "tool": TOOL, "splits": splits, "audit": audit_entry}


class _Audit:
    """Writes every remark, a line of JSON each, and keeps how many of each kind there are, and the first few."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.counts: dict[str, int] = dict.fromkeys(_KINDS, 0)
        self.examples: dict[str, list] = {kind: [] for kind in _KINDS}
        self.resized = 0

    def add(self, kind: str, item: object) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(item)
        self._file.write(json.dumps({"kind": kind, "what": item}).encode() + b"\n")

    def add_record(self, split: str, record: ShardRecord) -> None:
        notes = record.notes
        self.resized += notes["resized"]
        for kind, items in (("repaired", notes["repaired"]), ("rejected", notes["rejected"])):
            for item in items:
                self.add(kind, {**item, "sample": f"{split}/{item['sample']}"})
        for key in notes["tiny"]:
            self.add("tiny", f"{split}/{key}")
        for row in record.rows:
            if row["orientation"] != 1:
                self.add("oriented", f"{split}/{row['key']}")


def _write_index(path: Path, records: list[Path], num_classes: int) -> SplitEntry:
    """Write a split's index from its shards' records, one after the other. Returns its entry in the manifest."""
    key_bytes = samples = 0
    for record in map(read_record, records):
        samples += len(record.rows)
        key_bytes = max([key_bytes, *(len(row["key"].encode()) for row in record.rows)])
    if not samples:
        raise UserError(f"{path.parent.name}: no image of this split can be used. Look at the source")
    dtype = sample_dtype(key_bytes)
    entries: list[ShardEntry] = []
    counts = np.zeros(num_classes, dtype=np.int64)
    with replacing(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_2_0(file, header)
        for number, record in enumerate(map(read_record, records)):
            entries.append(record.entry)
            rows = np.zeros(len(record.rows), dtype=dtype)
            for field in dtype.names or ():
                values = [row.get(field, number) for row in record.rows]  # No row has a shard.
                rows[field] = [value.encode() if isinstance(value, str) else value for value in values]
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


def find_duplicates(records: list[Path]) -> list[list[str]]:
    """Groups of samples, as SPLIT/KEY, whose sources have the same content, within a split and across splits.

    The hashes are read several times, each time for another part of them, so that memory does not grow with the
    dataset.
    """
    passes = max(1, -(-sum(len(_hashes(path)) for path in records) // _HASHES_AT_A_TIME))
    groups: dict[bytes, list[str]] = {}
    for current in range(passes):
        found = [hashes[hashes.view(np.uint8)[::HASH_BYTES] % passes == current] for hashes in map(_hashes, records)]
        unique, counts = np.unique(np.concatenate(found), return_counts=True)
        groups |= {content: [] for content in unique[counts > 1].tolist()}
    for path in records:
        if found := [(row, content) for row, content in enumerate(_hashes(path).tolist()) if content in groups]:
            keys = [row["key"] for row in read_record(path).rows]
            for row, content in found:
                groups[content].append(f"{path.parent.name}/{keys[row]}")
    return sorted(map(sorted, groups.values()))


def _hashes(record: Path) -> np.ndarray:
    """The hashes of a shard's sources, as bytes without the zeros at their ends."""
    return np.frombuffer(record.with_suffix(".sha256").read_bytes(), dtype=f"S{HASH_BYTES}")
