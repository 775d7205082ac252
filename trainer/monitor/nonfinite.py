"""The error about an update with a loss or gradient that is not finite, and the samples behind it."""

import numpy as np
import torch

from pipelines.common.errors import UserError, named
from pipelines.plan.plan import TrainPlan
from trainer.cluster.world import World

_ADVICE = "Lower optim.lr or change run.precision; the run resumes from its newest checkpoint, if there is one"
_SHOWN = 3  # An error names at most this many samples.


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, at update `step`, which metrics.jsonl calls step + 1."""

    def __init__(self, message: str, step: int):
        super().__init__(f"step {step + 1}: {message}. {_ADVICE}")
        self.step = step


def nonfinite_error(
    stop: int,
    bad: list[torch.Tensor],
    bad_gradients: list[torch.Tensor],
    plan: TrainPlan,
    world: World,
    micro_batch: int,
) -> NonFiniteError:
    """The error about the first bad update of any rank, or the last update if none is known. Every rank must call it.

    Args:
      stop: updates done in the run.
      bad, bad_gradients: for each of the last updates StepMetrics.bad and .bad_gradients of this rank.
      micro_batch: the most images of a forward pass.
    """
    mine: list[tuple[int, list[str]]] = []  # This rank's first bad update, and the samples whose logits are bad in it.
    for step, (bad_rows, is_bad_gradient) in enumerate(zip(bad, bad_gradients, strict=True), start=stop - len(bad)):
        if bad_rows.any() or is_bad_gradient:
            batches = plan.batches(step, step + 1, rank=world.rank, ranks=world.size, micro_batch=micro_batch)
            samples = np.concatenate([rows.sample for rows in batches])[bad_rows.cpu().numpy()]
            mine = [(step, [plan.index.name(int(sample)) for sample in samples])]
            break
    found = world.all_gather(mine)
    first = min((step for step, _ in found), default=stop - 1)
    names = [name for step, samples in found if step == first for name in samples]
    if not names:
        return NonFiniteError("the gradient is not finite, or the loss is not though all logits are", first)
    what = f"the logits of the student or a teacher are not finite for {len(names)} of {plan.global_batch} images"
    return NonFiniteError(f"{what}: {named(names, _SHOWN)}", first)
