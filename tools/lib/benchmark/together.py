"""Students that are trained together, against one that is trained alone, each with the loader over photographs.

What makes the rows comparable:

- Images/s count an image once for each student that has been updated with it. Students that are trained one after the
  other have those of the student alone, however many they are.
- The students of a row are alike, and are the student alone, too. Their updates are those of trainer/together.py: each
  batch is loaded once, shown to the teacher once, and used by every student. Nothing is evaluated, logged or saved.
- A timed run begins when the loader has used up what it had made ahead.
"""

import contextlib
import functools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tools.lib.benchmark.photographs import photograph_index
from tools.lib.benchmark.replay import Timed
from tools.lib.benchmark.results import Row
from tools.lib.benchmark.runs import Setting, run_config, settings, updates_per_timed_run
from tools.lib.common.timing import BATCHES_IN_WORK, interleaved, ratio, speeds
from trainer.builder import Run
from trainer.cluster.preemption import Preemption
from trainer.cluster.world import alone
from trainer.config.sections import DataConfig
from trainer.sharing import use_shared_batches
from trainer.together import build_together

ALONE = "one student alone"
_PER_SHARD = 512  # A shard has this many photographs.
_LEAD = DataConfig().prefetch + BATCHES_IN_WORK + 1  # More batches than a loader has ready.


def together(
    models: list[str],
    teacher: str,
    students: list[int],
    images: int,
    batch: int,
    size: int,
    precision: str,
    compile: str,
    repeats: int,
    seconds: float,
) -> Iterator[Row]:
    """The rows: a table for each model, with the student alone and each number of students together.

    Args:
      students: how many are trained together.
      precision: auto, bf16 or fp32.
      compile: no, yes or both.
      seconds: about how long a timed run takes with one student.
    Raises:
      UserError: models that cannot be built.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        index = photograph_index(folder, max(images, batch), _PER_SHARD)
        data = ["--data.root", str(folder / "data")]
        chosen = {"batch": batch, "size": size, "precision": precision, "compile": compile}
        for setting in settings(models, [teacher], folder, **chosen, classes=index.num_classes):
            yield from _rows(setting, folder, data, students, repeats, seconds)


def _rows(
    setting: Setting, folder: Path, data: list[str], students: list[int], repeats: int, seconds: float
) -> Iterator[Row]:
    numbers = {ALONE: 1} | {f"{number} together": number for number in students}
    with contextlib.ExitStack() as stack:
        found = {}
        for what, number in numbers.items():
            configs = [run_config(setting, folder, data) for _ in range(number)]
            runs = build_together(configs, world := alone(), Preemption(world))
            found[what] = stack.enter_context(contextlib.closing(Students(runs, is_shared=what != ALONE)))
            found[what].make(1)
        count = max(3 * _LEAD, updates_per_timed_run(functools.partial(found[ALONE].make, 1), seconds))
        candidates = {
            what: Timed(functools.partial(each.make, count), functools.partial(each.skip, _LEAD))
            for what, each in found.items()
        }
        seconds_of = interleaved(candidates, repeats)
    for what, times in seconds_of.items():
        number = numbers[what]
        row: Row = {
            "what": what,
            "setting": setting.title,
            **speeds(number * count * setting.batch, times, 1),
            "ms": round(statistics.median(times) / count / number * 1000, 2),
            "ratio": ratio([number * each for each in seconds_of[ALONE]], times),
            "of": ALONE,
        }
        if not torch.cuda.is_available():
            row["cpu_ms"] = round(statistics.median(candidates[what].cpu_s[-repeats:]) / count / number * 1000, 2)
        yield row


class Students:
    """Students that take their updates in turn; close it at the end.

    Args:
      is_shared: take the batches and the teacher's logits once for all.
    """

    def __init__(self, runs: Sequence[Run], *, is_shared: bool):
        self._stack = contextlib.ExitStack()
        if is_shared:
            self._stack.callback(use_shared_batches(runs).close)
        feeds = [self._stack.enter_context(contextlib.closing(run.feed(0))) for run in runs]
        self._runs = list(zip(runs, feeds, strict=True))
        self._number = 0

    def make(self, count: int) -> None:
        """Make `count` updates of each student."""
        for _ in range(count):
            for run, feed in self._runs:
                run.step(feed, self._number)
            self._number += 1

    def skip(self, count: int) -> None:
        """Take the batches of `count` updates, which nobody makes."""
        for _ in range(count):
            for _, feed in self._runs:
                next(feed)

    def close(self) -> None:
        """End the threads of the loader."""
        self._stack.close()
