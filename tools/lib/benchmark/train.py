"""The whole: the updates of a run fed by its own pipeline, and by the synthetic one, which costs next to nothing.

What makes the rows of a table comparable: it is the same run, models and all, and the same plan of the same
photographs; only where the pixels come from differs. The two feed it in turn, each for the same number of updates,
until the device has finished. Before these come some that do not count, so that what was decoded while the other one
had its turn is used up. "alone" is the run's pipeline without the updates: its batches are made and thrown away.

On a GPU the ratio of "real" tells how well it is kept busy. On a CPU both the models and the decoding work on the same
cores: the ratio there is that of the models' time to the whole.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines import Pipeline, resolve_pipeline
from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores
from pipelines.shards.index import ShardIndex, read_index
from pipelines.synthetic import SyntheticPipeline
from tools.lib.benchmark.runs import (
    CLASSES,
    LAST,
    Setting,
    compiled_or_not,
    open_run,
    random_weights,
    release_memory,
    resolve,
    teacher_or_none,
    updates_of_a_turn,
)
from tools.lib.common.opening import decode_path, first_device
from tools.lib.common.photos import write_common_photographs
from tools.lib.common.timing import SPEED_COLUMNS, interleaved, ratio, speeds, synchronize, timed_on_device
from tools.lib.doctor.stages import IN_WORK
from tools.lib.shards.build import BuildOptions, build
from trainer.config.sections import DataConfig
from trainer.feed import rank_plans
from trainer.loop import Run
from trainer.monitor.telemetry import InputWait

COLUMNS = SPEED_COLUMNS | {
    "input_wait": "waiting for input",
    "built_s": "built in, s",
}
SYNTHETIC = "synthetic"
_LEAD = DataConfig().prefetch + IN_WORK + 1  # updates before those that count: more than the batches that wait
_PER_SHARD = 512  # images


def train(
    models: tuple[str, ...],
    teacher: str,
    images: int,
    batch: int,
    size: int,
    precision: str,
    compile: str,
    repeats: int,
    seconds: float,
) -> Iterator[dict]:
    """The rows, over `images` photographs: a table for each model, from the teacher (null: alone).

    Args:
      compile: no, yes or both.
      seconds: about how long a turn takes.
    Raises:
      UserError: fewer photographs than a batch, unknown words, or models that cannot be built.
    """
    if images < batch:
        raise UserError(f"--images {images} is less than --batch {batch}: give at least as many")
    wanted, device = compiled_or_not(compile), first_device()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_common_photographs(folder / "src", images, CLASSES)
        build(folder / "src", folder / "data", BuildOptions(samples_per_shard=_PER_SHARD), workers=num_cores())
        index = read_index(folder / "data", "train")
        pipeline, decode, note = _pipeline_here(index, device)  # once for all models
        data = ["--data.root", folder / "data", "--data.pipeline", pipeline, "--data.decode", decode]
        name = teacher_or_none(teacher)
        weights = random_weights(name, index.num_classes, size, folder) if name else None
        for is_compiled, model in itertools.product(wanted, models):
            how = resolve(precision, device), is_compiled, index.num_classes
            setting = Setting(model, name, weights, batch, size, *how)
            with tempfile.TemporaryDirectory(dir=folder) as out:
                start_s = time.perf_counter()
                run = open_run(setting, Path(out), data)
                built = {"built_s": round(time.perf_counter() - start_s, 1)}
                yield from (row | built | note for row in _rows(setting, run, repeats, seconds))
                del run
            release_memory()


def _pipeline_here(index: ShardIndex, device: torch.device) -> tuple[str, str, dict]:
    """A run's pipeline and DALI's decode path; torchvision where DALI cannot be used, with a "note" that says why."""
    try:
        return resolve_pipeline("auto", device), decode_path(index, device)[0], {}
    except UserError as error:
        return "torchvision", "full", {"note": f"without DALI: {error}"}


def _rows(setting: Setting, run: Run, repeats: int, seconds: float) -> list[dict]:
    pipeline = resolve_pipeline(run.config.data.pipeline, run.world.device)
    real, alone = f"real ({pipeline})", f"{pipeline} alone"
    feeds = {SYNTHETIC: Feed(run, SyntheticPipeline(run.plan.index, device=run.world.device))}
    feeds[real] = Feed(run, run.pipelines.of["train"])
    try:
        feeds[SYNTHETIC].updates(_LEAD)
        updates = max(3 * _LEAD, updates_of_a_turn(lambda: feeds[SYNTHETIC].updates(1), seconds))
        candidates = {
            SYNTHETIC: lambda: feeds[SYNTHETIC].seconds(updates),
            alone: lambda: feeds[real].seconds_alone(updates),
            real: lambda: feeds[real].seconds(updates),
        }
        turns = interleaved(candidates, repeats)
    finally:
        for feed in feeds.values():
            feed.close()
    return [
        {
            "what": name,
            **setting.described(),
            **speeds(updates * setting.batch, times, 1),
            "ratio": ratio(turns[SYNTHETIC], times),
            "of": SYNTHETIC,
            "updates": updates,
            **({"input_wait": round(statistics.median(feeds[name].waits[-repeats:]), 4)} if name in feeds else {}),
        }
        for name, times in turns.items()
    ]


class Feed:
    """Updates of a run with batches from a pipeline of its plan.

    Attributes:
      waits: of each turn, the share of time that the device had no work for want of a batch.
    """

    def __init__(self, run: Run, pipeline: Pipeline):
        self._run = run
        plans = rank_plans(run.plan, 0, LAST, run.world, run.state.micro_batch)
        self._batches = pipeline.batches(plans)
        self._waiting = InputWait(self._batches, run.world.device)
        self._number = 0
        self.waits: list[float] = []

    def updates(self, count: int) -> None:
        """Make so many."""
        for _ in range(count):
            self._run.step(self._waiting, self._number)
            self._number += 1

    def seconds(self, count: int) -> float:
        """Seconds for so many, after some that do not count."""
        self.updates(_LEAD)
        synchronize()
        self._waiting.take_s()
        elapsed_s = timed_on_device(lambda: self.updates(count))()
        self.waits.append(self._waiting.take_s() / elapsed_s)
        return elapsed_s

    def seconds_alone(self, count: int) -> float:
        """Seconds for the batches of so many updates that nobody makes, after some that do not count."""
        self._skip(_LEAD)
        return timed_on_device(lambda: self._skip(count))()

    def _skip(self, count: int) -> None:
        for _ in range(count):
            next(self._batches)

    def close(self) -> None:
        """End the pipeline's threads."""
        self._batches.close()
