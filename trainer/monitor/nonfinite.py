"""Finds the first update with a loss or gradient that is not finite, and the samples behind it."""

import dataclasses
from collections.abc import Callable

import torch

from pipelines.common.errors import UserError
from trainer.cluster.world import World
from trainer.config.sections import Config

_ADVICE = "Lower optim.lr or change run.precision; the run resumes from its newest checkpoint, if there is one"
_SHOWN = 3  # An error names at most this many samples.
NameSamples = Callable[[int, list[int]], list[str]]


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, at update `step`, which metrics.jsonl calls step + 1."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclasses.dataclass(frozen=True)
class _Found:
    """The first bad update of one rank: which one, how many of its images are bad, and the names of some of them."""

    step: int
    count: int
    names: list[str]


def nonfinite_error(
    loss: float,
    first_step: int,
    bad: list[torch.Tensor],
    bad_gradients: list[torch.Tensor],
    *,
    config: Config,
    world: World,
    name_samples: NameSamples,
) -> NonFiniteError:
    """The error about updates of which at least one, on some rank, is not finite. Every rank must call it.

    Args:
      loss: the mean over all of these updates and ranks.
      first_step: the number of the first of them.
      bad, bad_gradients: for each update StepMetrics.bad and .bad_gradients of this rank.
      name_samples: names the samples in some of this rank's rows of an update.
    """
    found = world.all_gather(_first_of_this_rank(first_step, bad, bad_gradients, name_samples))
    if not found:
        last = first_step + len(bad)
        return NonFiniteError(f"the loss is {loss} in one of the {len(bad)} steps up to {last}. {_ADVICE}", last)
    first = min(each.step for each in found)
    count = sum(each.count for each in found if each.step == first)
    names = [name for each in found if each.step == first for name in each.names]
    if not count:
        return NonFiniteError(f"step {first + 1}: the gradient is not finite, though the loss is. {_ADVICE}", first)
    models = "the student" if config.teacher.name is None else "the student or a teacher"
    more = ", ..." if count > _SHOWN else ""
    message = (
        f"step {first + 1}: the output of {models} is not finite for {count} of {config.run.global_batch} images: "
        f"{', '.join(names[:_SHOWN])}{more}. {_ADVICE}"
    )
    return NonFiniteError(message, first)


def _first_of_this_rank(
    first_step: int, bad: list[torch.Tensor], bad_gradients: list[torch.Tensor], name_samples: NameSamples
) -> list[_Found]:
    """The first bad update of this rank; [] if all are finite here."""
    for step, (bad_rows, is_bad_gradient) in enumerate(zip(bad, bad_gradients, strict=True), start=first_step):
        rows = bad_rows.nonzero().flatten().tolist()
        if rows or is_bad_gradient:
            return [_Found(step, len(rows), name_samples(step, rows[:_SHOWN]))]
    return []
