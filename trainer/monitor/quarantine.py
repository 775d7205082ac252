"""Damaged samples of a run: each named once in RUN/quarantine.jsonl, and a limit to how many there may be."""

import functools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import split_json_lines
from pipelines.shards.index import ShardIndex
from trainer.cluster.world import World
from trainer.monitor.run_files import is_quarantine_line, naming

QUARANTINE = "quarantine.jsonl"


_Place = tuple[str, str, int]  # split, shard and offset of a sample


class Quarantine:
    """Collects what the pipelines find, on every rank, and records it from time to time.

    Samples that an earlier session of the run has named count, too: they are read when the run is built.

    Args:
      path: the file; its lines are {"split", "shard", "key", "offset", "error"}.
      indices: the index of each split.
      max_bad_fraction: of a split's samples; a larger fraction ends the run.
    """

    def __init__(self, path: Path, indices: dict[str, ShardIndex], max_bad_fraction: float, world: World):
        self._path = path
        self._indices = indices
        self._max_bad_fraction = max_bad_fraction
        self._world = world
        self._lock = threading.Lock()
        self._found: list[tuple[str, int, str]] = []  # On this rank, since the last record_new.
        lines, _ = split_json_lines(path, is_quarantine_line) if world.is_main else ([], [])
        named = world.broadcast_object([_place(line) for line in lines])
        self._named: set[_Place] = set(named)

    def __len__(self) -> int:
        """How many samples have been named."""
        return len(self._named)

    def collector(self, split: str) -> Callable[[int, str], None]:
        """A function that a pipeline of the split calls with (sample, error), from any thread."""
        return functools.partial(self._add, split)

    def _add(self, split: str, sample: int, error: str) -> None:
        with self._lock:
            self._found.append((split, sample, error))

    def record_new(self) -> str:
        """Write down the samples that any rank has found since the last call. Every rank must call it.

        Returns:
          a line about samples that were found for the first time in the run, "" if there are none.
        Raises:
          UserError: a split has too many damaged samples, on every rank.
        """
        with self._lock:
            mine, self._found = self._found, []
        new = {}
        for split, sample, error in sorted(self._world.all_gather(mine)):
            line = _line(split, self._indices[split], sample, error)
            if _place(line) not in self._named:
                new.setdefault(_place(line), line)
        self._named |= set(new)
        if new and self._world.is_main:
            _append(self._path, list(new.values()))
        self._check_fraction()
        if not new:
            return ""
        places = [f"{line['split']}: sample {line['key']} in {line['shard']}" for line in new.values()]
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        return f"damaged and replaced: {places[0]}{more}; {len(self)} in all, named in {self._path}"

    def _check_fraction(self) -> None:
        for split, index in self._indices.items():
            bad = sum(place[0] == split for place in self._named)
            if bad > self._max_bad_fraction * len(index) and (bad > 1 or not self._max_bad_fraction):
                raise UserError(
                    f"{bad} of the {len(index)} images in '{split}' are damaged, more than data.max_bad_fraction, "
                    f"{self._max_bad_fraction:g}: {self._path} names them. Raise the limit, or restore the shards "
                    "('tools/shard_imagenet.py verify' finds what is wrong with them) and move that file away; the run "
                    "resumes from its newest checkpoint, if there is one"
                )


def _line(split: str, index: ShardIndex, sample: int, error: str) -> dict:
    row = index.samples[sample]
    return {
        "split": split,
        "shard": index.paths[row["shard"]].name,
        "key": row["key"].decode(),
        "offset": int(row["offset"]),
        "error": error,
    }


def _place(line: dict) -> _Place:
    return line["split"], line["shard"], line["offset"]


def _append(path: Path, lines: list[dict]) -> None:
    with naming(path), open(path, "a") as file:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            file.write("\n")
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
