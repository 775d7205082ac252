"""What the numbers of tools/doctor.py mean: pure functions of what stages.py measured."""

import dataclasses

from tools.lib.doctor import stages
from tools.lib.doctor.stages import Rate

_CUMULATIVE = (stages.READING, stages.DECODING, stages.RESIZING, stages.PIPELINE)
_PARTS = ("reading", "decoding", "crop, resize, flip", "RandAugment")
_BUSY = 0.95  # of its speed on synthetic batches: a step that is fed this well is what limits


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What limits a run.

    Attributes:
      side: "input" or "step".
      part: of that side, what takes the most time.
      shares: of the time an image takes on that side, for each of its parts.
      input_share: of all the work on cores that pipeline and step share, the pipeline's; where they share none, 1 if
        the input limits, and 0.
      headroom: the pipeline's speed alone over that of the whole; None without images.
      text: the same in a sentence or two.
    """

    side: str
    part: str
    shares: dict[str, float]
    input_share: float
    headroom: float | None
    text: str


def diagnose(rates: dict[str, Rate], *, shared_cores: bool, input_wait: float) -> Diagnosis:
    """Name what limits.

    Args:
      rates: of the stages by their names in stages.py, as far as they were measured; the step and the whole always.
      shared_cores: the step runs on the cores that decode, so that both take of the same time.
      input_wait: share of the time in which the whole waited for its next batch.
    """
    speed = {name: rate.images_per_s for name, rate in rates.items()}
    input_share = _input_share(speed, shared_cores)
    side = "input" if input_share > 0.5 else "step"
    shares = input_shares(speed) if side == "input" else step_shares(speed)
    part = max(shares, key=shares.get)
    headroom = speed[stages.PIPELINE] / speed[stages.WHOLE] if stages.PIPELINE in speed else None
    if shared_cores and headroom is not None:
        text = _shared_sentence(part, shares[part], input_share, input_wait)
    else:
        text = _sentence(side, part, shares[part], speed, input_wait, headroom)
    return Diagnosis(side, part, shares, input_share, headroom, text)


def input_shares(speed: dict[str, float]) -> dict[str, float]:
    """The parts of the pipeline's time: what each adds to those before it. {} without images."""
    if stages.PIPELINE not in speed:
        return {}
    if speed.get(stages.TO_DEVICE, float("inf")) <= speed[stages.PIPELINE]:  # it goes on beside the rest
        return {stages.TO_DEVICE: 1.0}
    times, before_s = {}, 0.0
    for part, name in zip(_PARTS, _CUMULATIVE, strict=True):
        if name in speed:
            times[part] = max(0.0, 1 / speed[name] - before_s)
            before_s = max(before_s, 1 / speed[name])
    return _shares(times)


def step_shares(speed: dict[str, float]) -> dict[str, float]:
    """The parts of the step's time; the gradients travel while the student's are still computed."""
    if speed.get(stages.ALL_REDUCE, float("inf")) <= speed[stages.STUDENT]:
        return {stages.ALL_REDUCE: 1.0}
    return _shares({name: 1 / speed[name] for name in (stages.TEACHER, stages.STUDENT) if name in speed})


def _shares(times: dict[str, float]) -> dict[str, float]:
    return {name: seconds / sum(times.values()) for name, seconds in times.items()}


def _input_share(speed: dict[str, float], shared_cores: bool) -> float:
    """See Diagnosis."""
    if stages.PIPELINE not in speed:
        return 0.0
    if shared_cores:
        return speed[stages.STEP] / (speed[stages.STEP] + speed[stages.PIPELINE])
    return float(speed[stages.WHOLE] < _BUSY * speed[stages.STEP])


def _shared_sentence(part: str, share: float, input_share: float, input_wait: float) -> str:
    side = "pipeline" if input_share > 0.5 else "step"
    within = f"; most of the {side}'s is {part} ({share:.0%})" if share < 1 else ""
    return (
        f"Pipeline and step share the cores: of what each takes alone, {input_share:.0%} is the pipeline's and "
        f"{1 - input_share:.0%} the step's{within}. {input_wait:.0%} waiting for input, which says little where they "
        "share"
    )


def _sentence(
    side: str, part: str, share: float, speed: dict[str, float], input_wait: float, headroom: float | None
) -> str:
    whole, step = speed[stages.WHOLE], speed[stages.STEP]
    if headroom is None:
        return f"The step limits, and in it the {part} ({share:.0%} of its time): the batches are synthetic"
    waiting = f"the step waits for input {input_wait:.1%} of the time and runs at {whole / step:.2f} of its own speed"
    if side == "step":
        return (
            f"The step limits, and in it the {part} ({share:.0%} of its time): {waiting}; the pipeline has headroom "
            f"{headroom:.1f} x"
        )
    return f"{_capital(part)} limits ({share:.0%} of the pipeline's time): {waiting}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclasses.dataclass(frozen=True)
class Remaining:
    """What a run has before it.

    Attributes:
      updates: at each image size (pixels).
      evaluations: of the validation set.
      to_the_end: whether it is not to stop before.
    """

    updates: dict[int, int]
    evaluations: int
    to_the_end: bool = True


def remaining(run) -> Remaining:
    """What trainer.loop.Run `run` has before it, from its present step to where it stops."""
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
    """The duration of what is left.

    Args:
      images_per_s: of the whole, at each image size.
      evaluation_s: of one evaluation.
    """
    updates_s = sum(count * global_batch / images_per_s[size] for size, count in work.updates.items())
    return updates_s + work.evaluations * evaluation_s
