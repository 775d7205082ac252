"""What the numbers of tools/doctor.py mean: pure functions of the measured rates."""

import dataclasses

from tools.lib.doctor import stages
from tools.lib.doctor.stages import Rate
from trainer.builder import Run

_CUMULATIVE = (stages.READING, stages.DECODING, stages.RESIZING, stages.PIPELINE)
_PARTS = ("reading", "decoding", "crop, resize, flip", "RandAugment")
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
    input_fraction = _input_fraction(speed, shared_cores)
    side = "input" if input_fraction > 0.5 else "step"
    fractions = input_fractions(speed) if side == "input" else step_fractions(speed)
    part = max(fractions, key=lambda name: fractions[name])
    headroom = speed[stages.PIPELINE] / speed[stages.WHOLE] if stages.PIPELINE in speed else None
    if shared_cores and headroom is not None:
        text = _shared_sentence(part, fractions[part], input_fraction, input_wait)
    else:
        text = _sentence(side, part, fractions[part], speed, input_wait, headroom)
    return Diagnosis(side, part, fractions, input_fraction, headroom, text)


def input_fractions(speed: dict[str, float]) -> dict[str, float]:
    """For each part of the pipeline, its fraction of the time: what it adds to those before it. {} without images."""
    if stages.PIPELINE not in speed:
        return {}
    if speed.get(stages.TO_DEVICE, float("inf")) <= speed[stages.PIPELINE]:  # It is done beside the rest.
        return {stages.TO_DEVICE: 1.0}
    times, before_s = {}, 0.0
    for part, name in zip(_PARTS, _CUMULATIVE, strict=True):
        if name in speed:
            times[part] = max(0.0, 1 / speed[name] - before_s)
            before_s = max(before_s, 1 / speed[name])
    return _fractions(times)


def step_fractions(speed: dict[str, float]) -> dict[str, float]:
    """For each part of the step, its fraction of the time. Gradients travel while later ones are computed."""
    if speed.get(stages.ALL_REDUCE, float("inf")) <= speed[stages.STUDENT]:
        return {stages.ALL_REDUCE: 1.0}
    return _fractions({name: 1 / speed[name] for name in (stages.TEACHER, stages.STUDENT) if name in speed})


def _fractions(times: dict[str, float]) -> dict[str, float]:
    return {name: seconds / sum(times.values()) for name, seconds in times.items()}


def _input_fraction(speed: dict[str, float], shared_cores: bool) -> float:
    """As described at Diagnosis.input_fraction."""
    if stages.PIPELINE not in speed:
        return 0.0
    if shared_cores:
        return speed[stages.STEP] / (speed[stages.STEP] + speed[stages.PIPELINE])
    return float(speed[stages.WHOLE] < _BUSY * speed[stages.STEP])


def _shared_sentence(part: str, fraction: float, input_fraction: float, input_wait: float) -> str:
    side = "pipeline" if input_fraction > 0.5 else "step"
    within = f"; most of the {side}'s is {part} ({fraction:.0%})" if fraction < 1 else ""
    return (
        f"Pipeline and step share the cores: of what each takes alone, {input_fraction:.0%} is the pipeline's and "
        f"{1 - input_fraction:.0%} the step's{within}. The step waits for input {input_wait:.0%} of the time, which "
        "says little where they share cores"
    )


def _sentence(
    side: str, part: str, fraction: float, speed: dict[str, float], input_wait: float, headroom: float | None
) -> str:
    whole, step = speed[stages.WHOLE], speed[stages.STEP]
    if headroom is None:
        return f"The step limits, and in it the {part} ({fraction:.0%} of its time): the batches are synthetic"
    waiting = f"the step waits for input {input_wait:.1%} of the time and runs at {whole / step:.2f} of its own speed"
    if side == "step":
        return (
            f"The step limits, and in it the {part} ({fraction:.0%} of its time): {waiting}; the pipeline has headroom "
            f"{headroom:.1f} x"
        )
    return f"{_capital(part)} limits ({fraction:.0%} of the pipeline's time): {waiting}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


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


def seconds_left(work: Remaining, images_per_s: dict[int, float], global_batch: int, evaluation_s: float) -> float:
    """The duration of what remains.

    Args:
      images_per_s: the speed of the complete run at each image size.
      evaluation_s: the duration of one evaluation.
    """
    updates_s = sum(count * global_batch / images_per_s[size] for size, count in work.updates.items())
    return updates_s + work.evaluations * evaluation_s
