"""Damaged samples of a run: each named once in RUN/quarantine.jsonl, and a limit to how many there may be."""

import json
import queue
from collections.abc import Callable
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import append_synced
from pipelines.shards.index import ShardIndex
from pipelines.shards.quarantine import location, read_quarantine
from trainer.cluster.world import World


class Quarantine:
    """Collects what the pipelines find, on every rank, and records it from time to time.

    Samples that an earlier session of the run has named count, too. So do those that other recorders of a teacher store
    name in the same file meanwhile.

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
        self._found: queue.SimpleQueue[tuple[str, int, str]] = queue.SimpleQueue()  # On this rank, not recorded yet.
        self._named = world.broadcast_object(set(read_quarantine(path)) if world.is_main else set())

    def __len__(self) -> int:
        """How many samples have been named."""
        return len(self._named)

    def collector(self, split: str) -> Callable[[int, str], None]:
        """A function that a pipeline of the split calls with (sample, error), from any thread."""
        return lambda sample, error: self._found.put((split, sample, error))

    def record_new(self) -> str:
        """Write down the samples that any rank has found since the last call. Every rank must call it.

        Returns:
          a line about samples that were found for the first time in the run, "" if there are none.
        Raises:
          UserError: a split has too many damaged samples, on every rank.
        """
        if self._world.size == 1:  # Recorders are a world each. The ranks of a run have a file of their own.
            self._named.update(read_quarantine(self._path))
        mine = [self._found.get() for _ in range(self._found.qsize())]
        lines = []
        for split, sample, error in sorted(self._world.all_gather(mine)):
            line = self._line(split, sample, error)
            if location(line) not in self._named:
                self._named.add(location(line))
                lines.append(line)
        if lines and self._world.is_main:
            append_synced(self._path, [json.dumps(line).encode() for line in lines])
        self._check_fraction()
        if not lines:
            return ""
        first = f"{lines[0]['split']}: sample {lines[0]['key']} in {lines[0]['shard']}"
        return f"warning: damaged and replaced: {first}; {len(lines)} new, {len(self)} in all, named in {self._path}"

    def _line(self, split: str, sample: int, error: str) -> dict:
        index = self._indices[split]
        row = index.samples[sample]
        return {
            "split": split,
            "shard": index.paths[row["shard"]].name,
            "key": row["key"].decode(),
            "offset": int(row["offset"]),
            "error": error,
        }

    def _check_fraction(self) -> None:
        for split, index in self._indices.items():
            bad = sum(named[0] == split for named in self._named)
            if bad > self._max_bad_fraction * len(index) and (bad > 1 or not self._max_bad_fraction):
                raise UserError(
                    f"{bad} of the {len(index)} images in '{split}' are damaged, more than data.max_bad_fraction, "
                    f"{self._max_bad_fraction:g}: {self._path} names them. Raise the limit, or restore the shards "
                    "('tools/shard_imagenet.py verify' finds what is wrong with them), move that file away, and record "
                    "its teacher store from the start; a run resumes from its newest checkpoint, if there is one"
                )
