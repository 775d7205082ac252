"""AdamW with the recipe's parameter groups, and the moving average of the weights."""

import copy

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

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


def batch_norms(model: nn.Module) -> list[_NormBase]:
    """The layers of a model that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of a model; no other buffers."""
    return [buffer for norm in batch_norms(model) for buffer in (norm.running_mean, norm.running_var)]


class ModelEma:
    """Exponential moving average of a model's parameters and BatchNorm statistics; other buffers are copied.

    Args:
      model: the unwrapped model.
      decay: ema = decay x ema + (1 - decay) x model at every update, from the initial weights on.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        # the same tensors for the whole life of the models; a shared one occurs once
        self._averages, self._currents = _averaged(self.module), _averaged(model)
        averaged = {id(tensor) for tensor in running_statistics(model)}
        buffers = zip(self.module.buffers(), model.buffers(), strict=True)
        self._copied = [(ours, theirs) for ours, theirs in buffers if id(theirs) not in averaged]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's present weights."""
        torch._foreach_lerp_(self._averages, self._currents, 1.0 - self.decay)
        for average, current in self._copied:
            average.copy_(current)


def _averaged(model: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.data for parameter in model.parameters()), *running_statistics(model)]
