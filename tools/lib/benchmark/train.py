"""A complete run: its updates fed by its own pipeline, and by the synthetic one, which costs next to nothing.

What makes the rows of a table comparable: it is the same run with the same models, and the same plan of the same
photographs; only where the pixels come from differs. The two feed it in turn, each for the same number of updates,
until the device has finished. Some updates that do not count come first, which use up what was decoded while the other
one was timed. "alone" is the run's pipeline without the updates: its batches are made and thrown away.

On a GPU the ratio of "real" shows how busy it is kept. On a CPU the models and the decoding work on the same cores: the
ratio there is that of the models' time to the time of both.
"""

import contextlib
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
from tools.lib.benchmark.results import Measured, Row
from tools.lib.benchmark.runs import LAST, Setting, open_run, settings, updates_per_timed_run
from tools.lib.common.hardware import first_device
from tools.lib.common.timing import BATCHES_IN_WORK, interleaved, ratio, speeds, synchronize, timed_on_device
from trainer.builder import Run
from trainer.config.sections import DataConfig
from trainer.feed import batches_of, rank_plans
from trainer.monitor.clock import InputWait

SYNTHETIC = "synthetic"
# Updates before those that count: more than the batches that wait.
_LEAD = DataConfig().prefetch + BATCHES_IN_WORK + 1
_PER_SHARD = 512  # A shard has this many images.


def train(
    models: list[str],
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
      precision: auto, bf16 or fp32.
      compile: no, yes or both.
      seconds: about how long a timed run takes.
    Raises:
      UserError: fewer photographs than a batch, or models that cannot be built.
    """
    if images < batch:
        raise UserError(f"--images {images} is less than --batch {batch}: give at least as many")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        index = photograph_index(folder, images, _PER_SHARD)
        data, note = _pipeline_here(index, first_device())
        data += ["--data.root", str(folder / "data")]
        chosen = {"batch": batch, "size": size, "precision": precision, "compile": compile}
        for setting in settings(models, [teacher], folder, **chosen, classes=index.num_classes):
            for row in _rows(setting, folder, data, repeats, seconds):
                yield {**row, **note}


def _pipeline_here(index: ShardIndex, device: torch.device) -> tuple[list[str], Measured]:
    """A run's options for its pipeline, and a note about it; torchvision where DALI cannot be used."""
    pipeline = resolve_pipeline("auto", device)
    try:
        decode, why = resolve_decode(PipelineConfig(), index, device)
    except UserError as error:
        return ["--data.pipeline", "torchvision"], {"note": f"without DALI: {error}"}
    options = ["--data.pipeline", pipeline, "--data.decode", decode]
    return options, {"note": f"DALI's decode path is {decode}: {why}"} if pipeline == "dali" else {}


def _rows(setting: Setting, folder: Path, data: list[str], repeats: int, seconds: float) -> Iterator[Row]:
    start_s = time.perf_counter()
    run = open_run(setting, folder, data)
    built_s = round(time.perf_counter() - start_s, 1)
    name = run.config.data.pipeline
    with (
        contextlib.closing(Feed(run, SyntheticPipeline(run.plan.index, device=run.world.device))) as synthetic,
        contextlib.closing(Feed(run, run.pipelines.of["train"])) as own,
    ):
        synthetic.updates(_LEAD)
        updates = max(3 * _LEAD, updates_per_timed_run(lambda: synthetic.updates(1), seconds))
        candidates = {
            SYNTHETIC: lambda: synthetic.seconds(updates),
            f"{name} alone": lambda: own.seconds_alone(updates),
            f"real ({name})": lambda: own.seconds(updates),
        }
        seconds_of = interleaved(candidates, repeats)
    waits = {SYNTHETIC: synthetic.waits, f"real ({name})": own.waits}
    for what, times in seconds_of.items():
        row: Row = {
            "what": what,
            "setting": setting.title,
            **speeds(updates * setting.batch, times, 1),
            "ratio": ratio(seconds_of[SYNTHETIC], times),
            "of": SYNTHETIC,
            "built_s": built_s,
        }
        if what in waits:
            row["input_wait"] = round(statistics.median(waits[what][-repeats:]), 4)
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
