"""A complete run: its updates fed by its own pipeline, and by the synthetic one, which costs next to nothing.

What makes the rows of a table comparable: it is the same run with the same models, and the same plan of the same
photographs; only where the pixels come from differs. The two feed it in turn, each for the same number of updates,
until the device has finished. Some updates that do not count come first, which use up what was decoded while the other
one was timed. "alone" is the run's pipeline without the updates: its batches are made and thrown away.

On a GPU the ratio of "real" shows how busy it is kept. On a CPU the models and the decoding work on the same cores: the
ratio there is that of the models' time to the time of both.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines import Pipeline, PipelineConfig, resolve_decode, resolve_pipeline
from pipelines.common.errors import UserError
from pipelines.shards.index import ShardIndex
from pipelines.synthetic import SyntheticPipeline
from tools.lib.benchmark.photographs import photograph_index
from tools.lib.benchmark.results import SPEED_COLUMNS, Measured, Row
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
    updates_per_timed_run,
)
from tools.lib.common.hardware import first_device
from tools.lib.common.timing import BATCHES_IN_WORK, interleaved, ratio, speeds, synchronize, timed_on_device
from trainer.builder import Run
from trainer.config.sections import DataConfig
from trainer.feed import batches_of, rank_plans
from trainer.monitor.clock import InputWait

COLUMNS = SPEED_COLUMNS | {
    "input_wait": "waiting for input",
    "built_s": "built in, s",
}
SYNTHETIC = "synthetic"
# Updates before those that count: more than the batches that wait.
_LEAD = DataConfig().prefetch + BATCHES_IN_WORK + 1
_PER_SHARD = 512  # A shard has this many images.


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
) -> Iterator[Row]:
    """The rows, over `images` photographs: a table for each model, from the teacher (null: alone).

    Args:
      compile: no, yes or both.
      seconds: about how long a timed run takes.
    Raises:
      UserError: fewer photographs than a batch, unknown words, or models that cannot be built.
    """
    if images < batch:
        raise UserError(f"--images {images} is less than --batch {batch}: give at least as many")
    wanted, device = compiled_or_not(compile), first_device()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        index = photograph_index(folder, images, classes=CLASSES, samples_per_shard=_PER_SHARD)
        pipeline, decode, note = _pipeline_here(index, device)
        data = ["--data.root", folder / "data", "--data.pipeline", pipeline, "--data.decode", decode]
        name = teacher_or_none(teacher)
        weights = random_weights(name, index.num_classes, size, folder) if name else None
        for is_compiled, model in itertools.product(wanted, models):
            setting = Setting(
                model, name, weights, batch, size, resolve(precision, device), is_compiled, index.num_classes
            )
            with tempfile.TemporaryDirectory(dir=folder) as out:
                start_s = time.perf_counter()
                run = open_run(setting, Path(out), data)
                built_s = round(time.perf_counter() - start_s, 1)
                for row in _rows(setting, run, repeats, seconds):
                    yield {**row, **note, "built_s": built_s}
                del run
            release_memory()


def _pipeline_here(index: ShardIndex, device: torch.device) -> tuple[str, str, Measured]:
    """A run's pipeline and DALI's decode path; torchvision where DALI cannot be used, with a "note" that says why."""
    try:
        return resolve_pipeline("auto", device), resolve_decode(PipelineConfig(), index, device)[0], {}
    except UserError as error:
        return "torchvision", "full", {"note": f"without DALI: {error}"}


def _rows(setting: Setting, run: Run, repeats: int, seconds: float) -> Iterator[Row]:
    pipeline = resolve_pipeline(run.config.data.pipeline, run.world.device)
    real, alone = f"real ({pipeline})", f"{pipeline} alone"
    synthetic = Feed(run, SyntheticPipeline(run.plan.index, device=run.world.device))
    own = Feed(run, run.pipelines.of["train"])
    try:
        synthetic.updates(_LEAD)
        updates = max(3 * _LEAD, updates_per_timed_run(lambda: synthetic.updates(1), seconds))
        candidates = {
            SYNTHETIC: lambda: synthetic.seconds(updates),
            alone: lambda: own.seconds_alone(updates),
            real: lambda: own.seconds(updates),
        }
        seconds_of = interleaved(candidates, repeats)
    finally:
        synthetic.close()
        own.close()
    waits = {SYNTHETIC: synthetic.waits, real: own.waits}
    for name, times in seconds_of.items():
        row: Row = {
            "what": name,
            **setting.described(),
            **speeds(updates * setting.batch, times, 1),
            "ratio": ratio(seconds_of[SYNTHETIC], times),
            "of": SYNTHETIC,
            "updates": updates,
        }
        if name in waits:
            row["input_wait"] = round(statistics.median(waits[name][-repeats:]), 4)
        yield row


class Feed:
    """Updates of a run with batches from a pipeline of its plan.

    Attributes:
      waits: of each timed run, the fraction of time in which the device had no work because no batch was ready.
    """

    def __init__(self, run: Run, pipeline: Pipeline):
        self._run = run
        plans = rank_plans(run.plan, 0, LAST, run.world, run.state.micro_batch)
        self._batches = batches_of(pipeline, plans)
        self._waiting = InputWait(self._batches, run.world.device)
        self._number = 0
        self.waits: list[float] = []

    def updates(self, count: int) -> None:
        """Make `count` updates."""
        for _ in range(count):
            self._run.step(self._waiting, self._number)
            self._number += 1

    def seconds(self, count: int) -> float:
        """Seconds for `count` updates, after some that do not count."""
        self.updates(_LEAD)
        synchronize()
        self._waiting.take_s()
        elapsed_s = timed_on_device(lambda: self.updates(count))()
        self.waits.append(self._waiting.take_s() / elapsed_s)
        return elapsed_s

    def seconds_alone(self, count: int) -> float:
        """Seconds for the batches of `count` updates that are not made, after some that do not count."""
        self._skip(_LEAD)
        return timed_on_device(lambda: self._skip(count))()

    def _skip(self, count: int) -> None:
        for _ in range(count):
            next(self._batches)

    def close(self) -> None:
        """End the pipeline's threads."""
        self._batches.close()
