"""The listing of a conversion: all samples of a source, written once, and what of the source is no sample."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypedDict

from pipelines.common.errors import UserError, grouped, named
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
        check_misplaced(
            source.root, (each for split in source.splits for each in read_unused(partial, split)), skip_bad
        )
        for split in source.splits:
            if not listed(partial, split)["samples"]:
                left = [each.source for each in read_unused(partial, split) if each.kind == MISPLACED]
                why = f"All that it holds was left out ({named(left, 3)}). Sort it" if left else "Add some"
                raise UserError(f"{source.root}: no images in split {split}. {why}, or move the split away")
    except UserError:
        for split in new:  # No shard was written from it, and the user may now change the source.
            path_of(partial, split).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def nothing_left_behind(partial: Path) -> Iterator[None]:
    """Remove OUT.partial after an error if nothing was listed before: the next command may be another one."""
    try:
        yield
    except UserError:
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
        if each.kind == MISPLACED:
            reasons.setdefault(each.reason, []).append(each.source)
    if not reasons or skip_bad:
        return
    total = sum(map(len, reasons.values()))
    raise UserError(
        f"{root}: {total} {'entry' if total == 1 else 'entries'} would be left out. {grouped(reasons)}. Or leave "
        f"{'it' if total == 1 else 'them'} out with --on-bad skip"
    )


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


class Listing:
    """The samples of a split, any of them read on its own from the listing on disk.

    Raises, when it is read:
      UserError: a file of it has become shorter than it was written.
    """

    def __init__(self, partial: Path, split: str):
        self._partial = partial
        # The length does not come from the size of a file, which may have changed: the order of a split depends on it.
        self._samples = listed(partial, split)["samples"]
        # Both stay open as long as the worker lives. They are not memory-mapped: SIGBUS would end it if they shrank.
        self._starts = open(partial / "listing" / f"{split}.starts", "rb")  # noqa: SIM115
        self._lines = open(partial / "listing" / f"{split}.jsonl", "rb")  # noqa: SIM115

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, i: int) -> Entry:
        start = os.pread(self._starts.fileno(), _START_BYTES, i * _START_BYTES)
        self._check_complete(self._starts, len(start) == _START_BYTES)
        self._lines.seek(int.from_bytes(start, "little"))
        line = self._lines.readline()
        self._check_complete(self._lines, line.endswith(b"\n"))
        return Entry(*json.loads(line))

    def _check_complete(self, file: BinaryIO, is_complete: bool) -> None:
        if not is_complete:
            raise UserError(f"{file.name}: is cut off. Remove {self._partial} to begin the conversion again")
