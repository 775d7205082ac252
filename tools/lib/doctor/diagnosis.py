"""What the numbers of tools/doctor.py mean: pure functions of the measured rates."""

import dataclasses

from tools.lib.doctor import stages
from tools.lib.doctor.stages import Rate
from trainer.builder import Run

# Each stage of the pipeline, and what it does beyond the one before it.
_PARTS = {
    stages.READING: "reading",
    stages.DECODING: "decoding",
    stages.RESIZING: "crop, resize, flip",
    stages.PIPELINE: "RandAugment",
}
_BUSY = 0.95  # A step that runs at this fraction of its speed on synthetic batches, or faster, is what limits.


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What limits a run.

    Attributes:
      side: "input" or "step".
      part: the part of that side that takes the most time.
      fractions: for each part of that side, its fraction of the time that an image takes there.
      input_fraction: where pipeline and step share cores, the pipeline's fraction of all work; where they do not, 1 if
        the input limits and 0 if the step does.
      headroom: the pipeline's speed alone over that of the complete run; None without images.
      text: the same in a sentence or two.
    """

    side: str
    part: str
    fractions: dict[str, float]
    input_fraction: float
    headroom: float | None
    text: str


def diagnose(rates: dict[str, Rate], *, shared_cores: bool, input_wait: float) -> Diagnosis:
    """Name what limits.

    Args:
      rates: of the stages that were measured, by their names in stages.py; the step and the whole always were.
      shared_cores: whether the step runs on the cores that decode.
      input_wait: the fraction of the time in which the run waited for its next batch.
    """
    speed = {name: rate.images_per_s for name, rate in rates.items()}
    pipeline, step, whole = speed.get(stages.PIPELINE), speed[stages.STEP], speed[stages.WHOLE]
    if pipeline is not None and stages.STORE in speed:  # Images and targets are read at the same time.
        pipeline = min(pipeline, speed[stages.STORE])
    if pipeline is None:
        input_fraction, why = 0.0, "The batches are synthetic"
    elif shared_cores:
        input_fraction = step / (step + pipeline)
        why = f"Both share the cores: of what each takes alone, {input_fraction:.0%} is the pipeline's"
    else:
        input_fraction = float(whole < _BUSY * step)
        why = (
            f"The step waits for input {input_wait:.1%} of the time and runs at {whole / step:.2f} of its own speed, "
            f"and the pipeline has headroom {pipeline / whole:.1f} x"
        )
    side = "input" if input_fraction > 0.5 else "step"
    times = _input_times(speed) if side == "input" else _step_times(speed)
    fractions = {name: seconds / sum(times.values()) for name, seconds in times.items()}
    part = max(fractions, key=lambda name: fractions[name])
    text = f"The {side} limits, and in it {part} ({fractions[part]:.0%} of its time). {why}"
    return Diagnosis(side, part, fractions, input_fraction, pipeline / whole if pipeline else None, text)


def _input_times(speed: dict[str, float]) -> dict[str, float]:
    """For each part of the pipeline, the seconds an image that it adds to those before it."""
    beside = {name: speed[name] for name in (stages.TO_DEVICE, stages.STORE) if name in speed}
    slowest = min(beside, key=lambda name: beside[name], default=stages.PIPELINE)
    if slowest in beside and beside[slowest] <= speed[stages.PIPELINE]:  # It is done beside the rest.
        return {slowest: 1 / speed[slowest]}
    times, before_s = {}, 0.0
    for name, part in _PARTS.items():
        if name in speed:
            times[part] = max(0.0, 1 / speed[name] - before_s)
            before_s = max(before_s, 1 / speed[name])
    return times


def _step_times(speed: dict[str, float]) -> dict[str, float]:
    """For each part of the step, its seconds an image. Gradients travel while later ones are computed."""
    if speed.get(stages.ALL_REDUCE, float("inf")) <= speed[stages.STUDENT]:
        return {stages.ALL_REDUCE: 1 / speed[stages.ALL_REDUCE]}
    return {name: 1 / speed[name] for name in (stages.TEACHER, stages.STUDENT) if name in speed}


@dataclasses.dataclass(frozen=True)
class Remaining:
    """What a run still has to do.

    Attributes:
      updates: how many at each image size (pixels).
      evaluations: how many of the validation set.
      to_the_end: whether the run continues to its end; False where run.stop_after_steps stops it earlier.
    """

    updates: dict[int, int]
    evaluations: int
    to_the_end: bool = True


def remaining(run: Run) -> Remaining:
    """What a run still has to do, from its present step to where it stops."""
    per_epoch, updates = run.plan.steps_per_epoch, {}
    for epoch in range(run.state.step // per_epoch, -(-run.stop // per_epoch)):
        first, stop = max(run.state.step, epoch * per_epoch), min(run.stop, (epoch + 1) * per_epoch)
        size = run.plan.image_size_at(epoch)
        if stop > first:
            updates[size] = updates.get(size, 0) + stop - first
    first = max(run.state.evaluated // per_epoch + 1, -(-run.state.step // per_epoch))
    ends = range(first, run.stop // per_epoch + 1)
    due = [epoch for epoch in ends if epoch % run.config.run.eval_every == 0 or epoch * per_epoch == run.total_steps]
    return Remaining(updates, len(due) if run.evaluate is not None else 0, run.stop == run.total_steps)
