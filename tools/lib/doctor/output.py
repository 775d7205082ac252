"""What tools/doctor.py prints and writes: the measurements, and what follows from them, in words."""

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from tools.lib.common.hardware import machine
from tools.lib.common.tables import terminal_table
from tools.lib.common.units import human_seconds
from tools.lib.doctor import proposals, stages
from tools.lib.doctor.diagnosis import Diagnosis, Remaining
from tools.lib.doctor.input_stages import pipeline_of
from tools.lib.doctor.proposals import Trial
from tools.lib.doctor.stages import Rate
from trainer.builder import Run
from trainer.feed import rank_threads

_BAR = 24  # The longest bar of the table has this many characters.
_MATTERS = 10  # How even a stage is makes no difference if it is faster than the complete run times this.
# A stage was not measured well if its slowest timed run has less than this fraction of the fastest's speed.
_UNEVEN = 0.8


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a run.

    Attributes:
      size: the side of the images that the stages were measured with, pixels.
      rates: the rate of each stage by its name in stages.py.
      whole: the speed of the complete run at each image size to come, images/s.
      input_wait: the fraction of the time in which the run waited for its next batch.
      evaluation_s: the duration of one evaluation; 0 without a validation set.
      cached: whether all images fit into the free memory; otherwise the complete run was measured from the disk.
    """

    size: int
    rates: dict[str, Rate]
    whole: dict[int, float]
    input_wait: float
    evaluation_s: float
    cached: bool


def title(run: Run) -> str:
    """The run in a sentence: models, data, batches, devices and progress."""
    config, world = run.config, run.world
    teacher = f"from {config.teacher.title}" if config.teacher.title else "without a teacher"
    return (
        f"{config.student.name} {teacher}: {len(run.plan.index):,} images, {pipeline_of(run)} pipeline, updates of "
        f"{config.run.global_batch} in micro-batches of {run.state.micro_batch} on {world.size} x {world.device_name}, "
        f"after step {run.state.step} of {run.total_steps}"
    )


def input_settings(run: Run) -> Iterator[str]:
    """The settings of the input, with auto resolved; other settings are compared with these."""
    data, world, name = run.config.data, run.world, pipeline_of(run)
    values: dict[str, object] = {"threads": rank_threads(data, world), "prefetch": data.prefetch}
    if world.device.type == "cuda" and name == "dali":
        values |= {"decode": run.pipelines.decode["decode"], "hw_decoder_load": data.hw_decoder_load}
    if name != "synthetic":
        yield "With " + ", ".join(f"data.{name} {value}" for name, value in values.items())


def stage_table(measured: Measured) -> Table:
    """The stages with bars as long as an image takes in them; the others wait for the longest."""
    rows: list[list[str]] = []
    longest_s = max(1 / rate.images_per_s for rate in measured.rates.values())
    for name, rate in measured.rates.items():
        seconds = 1 / rate.images_per_s
        numbers = (f"{value:,.0f}" for value in dataclasses.astuple(rate))
        bar = "\u2588" * max(1, round(_BAR * seconds / longest_s))
        rows.append([name, *numbers, f"{1000 * seconds:.3f}", bar])
    headings = ("stage", "images/s", "min", "max", "ms an image", "")
    return terminal_table(headings, rows, text=(0, 5), title=f"Images/s at {measured.size} px")


def spread_lines(rates: dict[str, Rate]) -> Iterator[str]:
    """A warning where the timed runs of a stage that matters differ too much."""
    matters = _MATTERS * rates[stages.WHOLE].images_per_s
    slow = {name: rate for name, rate in rates.items() if rate.images_per_s < matters}
    if uneven := [name for name, rate in slow.items() if rate.min < _UNEVEN * rate.max]:
        yield (
            f"These numbers are not reliable: the timed runs of {', '.join(uneven)} differ by more than a quarter. "
            "Measure longer, with a larger --seconds, or on a machine that is not busy with something else"
        )


def faster_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The settings that were faster in every timed run, the best first."""
    return sorted((trial for trial in trials if trial.faster), key=lambda trial: -trial.gain)


def proposal_lines(trials: Sequence[Trial]) -> Iterator[str]:
    """The settings that were faster, and those that were not."""
    faster = faster_trials(trials)
    if faster:
        yield f"Each of {proposals.REPEATS} timed runs was faster than every unchanged run with:"
    for trial in faster:
        speeds = f"{trial.rate.images_per_s:,.0f} images/s, {trial.now.images_per_s:,.0f} unchanged, measured in turn"
        yield f"  {trial.override}: {trial.gain:+.0%} ({speeds})"
        if "data.pipeline" in trial.override:
            yield "    (its pixels are a little different: docs/parity.md)"
        if "micro_batch" in trial.override:
            yield "    (BatchNorm sees a micro-batch at a time: with it this changes the result a little)"
    vain = ", ".join(f"{trial.override} ({trial.gain:+.0%})" for trial in trials if not trial.faster)
    if vain:
        yield f"{'Not' if faster else 'Nothing is'} faster in each timed run than in every unchanged one: {vain}"


def duration_lines(work: Remaining, measured: Measured, global_batch: int, trials: Sequence[Trial]) -> Iterator[str]:
    """How long the rest takes, what it consists of, and how long it would take with the best of the settings tried."""
    parts = [
        f"{count:,} updates of {global_batch:,} images at {measured.whole[size]:,.0f} images/s ({size} px)"
        for size, count in work.updates.items()
    ]
    if work.evaluations:
        parts.append(f"{work.evaluations:,} evaluations of {human_seconds(measured.evaluation_s)}")
    what = "The rest of the run" if work.to_the_end else "The run up to run.stop_after_steps"
    yield f"{what} takes {human_seconds(seconds_left(work, measured, global_batch))}: {', '.join(parts)}"
    for best in faster_trials(trials)[:1]:
        with_best_s = seconds_left(work, measured, global_batch, best.gain)
        yield f"With {best.override}, if it gains as much throughout: {human_seconds(with_best_s)}"
    cold = measured.rates.get(stages.READING_COLD)
    if not measured.cached:
        yield "The dataset is larger than the free memory: the run was measured with images read from storage"
    elif cold is not None and cold.images_per_s < 1.2 * measured.whole[measured.size]:
        yield f"The first epoch is slower: read for the first time, images come at {cold.images_per_s:,.0f} a second"


def seconds_left(work: Remaining, measured: Measured, global_batch: int, gain: float = 0.0) -> float:
    """The duration of what remains; a gain of 0.1 makes its updates 10 % faster."""
    updates_s = sum(count * global_batch / measured.whole[size] for size, count in work.updates.items())
    return updates_s / (1 + gain) + work.evaluations * measured.evaluation_s


def to_json(
    run: Run, seconds: float, measured: Measured, diagnosis: Diagnosis, trials: Sequence[Trial], work: Remaining
) -> dict[str, Any]:
    """The content of the file that --json names."""
    return {
        "date": datetime.date.today().isoformat(),
        "seconds": seconds,
        "machine": machine(),
        "run": title(run),
        "measured": dataclasses.asdict(measured),
        "diagnosis": dataclasses.asdict(diagnosis),
        "warnings": list(spread_lines(measured.rates)),
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "remaining": dataclasses.asdict(work),
        "images_per_s": measured.whole[measured.size],
        "seconds_left": seconds_left(work, measured, run.plan.global_batch),
    }
