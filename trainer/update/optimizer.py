"""AdamW with the recipe's parameter groups, clipping of gradients, and the moving average of the weights."""

import copy
import functools
import itertools
from collections.abc import Callable

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.config.sections import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on 1-D parameters, biases and what `model.no_weight_decay()` names."""
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, weight_decay=config.weight_decay, no_weight_decay_list=excluded)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_clipping(model: nn.Module, config: OptimConfig) -> Callable[[], object] | None:
    """What clips a model's gradients in place, without waiting for the device; None where nothing is to be clipped.

    Adaptive clipping leaves out the classifier that the model names (timm's `get_classifier`), as in the paper.
    """
    if config.clip_norm:
        parameters = list(model.parameters())
        return functools.partial(nn.utils.clip_grad_norm_, parameters, config.clip_norm, foreach=True)
    if config.clip_agc:
        left_out = {id(parameter) for parameter in _classifier_parameters(model)}
        parameters = [parameter for parameter in model.parameters() if id(parameter) not in left_out]
        return functools.partial(clip_adaptively, parameters, config.clip_agc)
    return None


def _classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the last layer; of all of them where a model has several, of none where it names none."""
    layers = model.get_classifier() if hasattr(model, "get_classifier") else ()
    layers = layers if isinstance(layers, (tuple, list)) else [layers]
    return [parameter for layer in layers for parameter in layer.parameters()]


@torch.no_grad()
def clip_adaptively(parameters: list[nn.Parameter], factor: float, eps: float = 1e-3) -> None:
    """Cut each unit's gradient to `factor` x the norm of its weights, in place.

    A unit is what makes one output: a row of a matrix, a filter of a convolution; a vector is one unit.

    Args:
      parameters: those without a gradient are passed over.
      eps: least norm of weights that counts, so that weights that are zero can leave it.
    Source: arXiv 2102.06171, equation 3 and its eps.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return
    gradients = [parameter.grad for parameter in parameters]
    scales = [_unit_norms(parameter) for parameter in parameters]
    torch._foreach_clamp_min_(scales, eps)
    torch._foreach_mul_(scales, factor)
    torch._foreach_div_(scales, [_unit_norms(gradient) for gradient in gradients])  # no gradient: infinity
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(gradients, scales)


def _unit_norms(values: torch.Tensor) -> torch.Tensor:
    """[units, ...] -> [units, 1, ...]; a vector or a scalar -> []."""
    if values.ndim <= 1:
        return torch.linalg.vector_norm(values)
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)


def batch_norms(model: nn.Module) -> list[_NormBase]:
    """The layers of a model that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of a model; no other buffers."""
    return [buffer for norm in batch_norms(model) for buffer in (norm.running_mean, norm.running_var)]


class ModelEma:
    """Exponential moving average of a model's parameters and BatchNorm statistics; other buffers are copied.

    Args:
      model: the unwrapped model; the average starts from its present weights.
    """

    def __init__(self, model: nn.Module):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        # the same tensors for the whole life of the models; a shared one occurs once
        self._averages, self._currents = _averaged(self.module), _averaged(model)
        averaged = {id(tensor) for tensor in running_statistics(model)}
        others = [id(tensor) not in averaged for tensor in model.buffers()]
        self._copies = list(itertools.compress(self.module.buffers(), others))
        self._originals = list(itertools.compress(model.buffers(), others))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Become decay x average + (1 - decay) x the model's present weights."""
        torch._foreach_lerp_(self._averages, self._currents, 1.0 - decay)
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)


def _averaged(model: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.data for parameter in model.parameters()), *running_statistics(model)]
