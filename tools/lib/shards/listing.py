"""The listing of a conversion: all samples of a source, written once, and what of the source is no sample."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

from pipelines.common.errors import UserError, grouped
from pipelines.common.files import replacing, write_synced
from tools.lib.shards.sources.source import MISPLACED, Entry, Source, Unused

_START_BYTES = 8  # The place of a line in a listing is stored in this many bytes.


class ListingSummary(TypedDict):
    """The listing of a split: the number of samples, and the hash of their lines."""

    samples: int
    sha256: str


def list_source(partial: Path, source: Source, skip_bad: bool) -> None:
    """Write the listing of each split, or make sure that it is still what the source holds.

    Raises:
      UserError: it is not, or something in the source is not understood and `skip_bad` is off; all of that is named.
        New listings are removed then, for no shard was written from them, and the user may now change the source. So is
        OUT.partial if there are no others: the next command may be another one.
    """
    new = [split for split in source.splits if not path_of(partial, split).is_file()]
    try:
        for split in source.splits:
            if split in new:
                _write_listing(partial, split, source)
            elif not source.copies and digest_of(source.splits[split]()) != listed(partial, split)["sha256"]:
                raise UserError(
                    f"{source.root}: its {split} images have changed since the conversion began. Put them back, or "
                    f"remove {partial} to begin again"
                )
        unused = [each for split in source.splits for each in read_unused(partial, split)]
        check_misplaced(source.root, unused, skip_bad)
        if empty := [split for split in source.splits if not listed(partial, split)["samples"]]:
            raise UserError(f"{source.root / empty[0]}: no images of this split. Add some, or move it away")
    except UserError:
        for split in new:
            path_of(partial, split).unlink(missing_ok=True)
        if not any((partial / "listing").glob("*.json")):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_listing(partial: Path, split: str, source: Source) -> None:
    about = path_of(partial, split)
    about.parent.mkdir(exist_ok=True)
    digest, position, count = hashlib.sha256(), 0, 0
    with (
        replacing(about.with_suffix(".jsonl")) as file,
        replacing(about.with_suffix(".starts")) as starts,
        replacing(about.with_suffix(".unused.jsonl")) as unused,
    ):
        for entry in source.splits[split]():
            line = _line(entry)
            digest.update(line)
            if isinstance(entry, Unused):
                unused.write(json.dumps(dataclasses.astuple(entry)).encode() + b"\n")
                continue
            starts.write(position.to_bytes(_START_BYTES, "little"))
            position, count = position + len(line), count + 1
            file.write(line)
    write_synced(about, json.dumps({"samples": count, "sha256": digest.hexdigest()}).encode())


def path_of(partial: Path, split: str) -> Path:
    """The file that says how many samples a split has, and their hash; the others lie beside it."""
    return partial / "listing" / f"{split}.json"


def listed(partial: Path, split: str) -> ListingSummary:
    """Read how many samples a split has, and the hash of its listing."""
    return json.loads(path_of(partial, split).read_text())


def read_unused(partial: Path, split: str) -> list[Unused]:
    """Read what the listing of a split found that is no sample."""
    path = path_of(partial, split).with_suffix(".unused.jsonl")  # Older conversions have none.
    return [Unused(*json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def check_misplaced(root: Path, unused: Iterable[Unused], skip_bad: bool) -> None:
    """Raise a UserError that names, by reason, what would be left out, unless the person has decided to skip it."""
    reasons: dict[str, list[str]] = {}
    for each in unused:
        if each.kind == MISPLACED and not skip_bad:
            reasons.setdefault(each.reason, []).append(each.source)
    if reasons:
        raise UserError(f"{root}: would be left out: {grouped(reasons)}. Or leave out what is named with --on-bad skip")


def _line(entry: Entry | Unused) -> bytes:
    """Write an entry as the listing's hash covers it: samples, and what a person may have decided to leave out."""
    if isinstance(entry, Unused):
        return json.dumps([entry.kind, entry.source]).encode() + b"\n" if entry.kind == MISPLACED else b""
    return json.dumps([entry.key, entry.label, entry.location, entry.source]).encode() + b"\n"


def digest_of(entries: Iterator[Entry | Unused]) -> str:
    """The hash of a listing, in hex."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(_line(entry))
    return digest.hexdigest()


def read_entries(partial: Path, split: str, rows: Iterable[int]) -> Iterator[Entry]:
    """Read samples of a split by their numbers, from the listing on disk.

    Raises:
      UserError: a file of it has become shorter than it was written.
    """
    path = path_of(partial, split)
    # They are not memory-mapped: SIGBUS would end the process if they shrank.
    with open(path.with_suffix(".starts"), "rb") as starts, open(path.with_suffix(".jsonl"), "rb") as lines:
        for row in rows:
            starts.seek(row * _START_BYTES)
            start = starts.read(_START_BYTES)
            lines.seek(int.from_bytes(start, "little"))
            line = lines.readline()
            if len(start) < _START_BYTES or not line.endswith(b"\n"):
                raise UserError(f"{path}: its listing is cut off. Remove {partial} to begin the conversion again")
            yield Entry(*json.loads(line))
