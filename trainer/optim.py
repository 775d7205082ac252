"""AdamW with the recipe's parameter groups, and the moving average of the weights."""

import copy

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from trainer.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on 1-D parameters, biases and what `model.no_weight_decay()` names."""
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, weight_decay=config.weight_decay, no_weight_decay_list=excluded)
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class ModelEma:
    """Exponential moving average of a model's parameters and floating-point buffers; other buffers are copied.

    Args:
      model: the unwrapped model.
      decay: ema = decay x ema + (1 - decay) x model at every update, from the initial weights on.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's present weights."""
        averages, currents = zip(*self._floating, strict=True)
        torch._foreach_lerp_(list(averages), list(currents), 1.0 - self.decay)
        for average, current in self._others:
            average.copy_(current)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, a shared one once; the same objects for the whole life of the model."""
    return [*(parameter.data for parameter in model.parameters()), *model.buffers()]
