"""The exponential moving average of a model's weights."""

import copy

import torch
from torch import nn

from trainer.models.batch_norm import running_statistics


class ModelEma:
    """Exponential moving average of a model's parameters and BatchNorm statistics; other buffers are copied.

    Attributes:
      module: the model with the EMA weights, in evaluation mode.

    Args:
      model: the unwrapped model; the EMA starts from its present weights.
    """

    def __init__(self, model: nn.Module):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        # These lists hold the same tensors for the whole life of both models; a tensor that layers share occurs once.
        self._averages, self._currents = _averaged(self.module), _averaged(model)
        averaged = {id(tensor) for tensor in running_statistics(model)}
        others = [
            (copied, original)
            for copied, original in zip(self.module.buffers(), model.buffers(), strict=True)
            if id(original) not in averaged
        ]
        self._copies = [copied for copied, _ in others]
        self._originals = [original for _, original in others]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Become decay x EMA + (1 - decay) x the model's present weights."""
        torch._foreach_lerp_(self._averages, self._currents, 1.0 - decay)
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)


def _averaged(model: nn.Module) -> list[torch.Tensor]:
    """The tensors of a model that an EMA averages."""
    return [*(parameter.data for parameter in model.parameters()), *running_statistics(model)]
