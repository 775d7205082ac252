"""AdamW with the recipe's parameter groups, and clipping of gradients."""

import functools
from collections.abc import Callable

import torch
from timm.optim import param_groups_weight_decay
from timm.utils import adaptive_clip_grad
from torch import nn

from trainer.config.sections import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on 1-D parameters, biases and what `model.no_weight_decay()` names.

    trainer/models/checkpoint_format.py lists the tensors that it keeps for each parameter. Checkpoints are checked
    against that list, and the warm-up of an update allocates as many.
    """
    no_weight_decay = getattr(model, "no_weight_decay", None)
    excluded = no_weight_decay() if no_weight_decay is not None else ()
    groups = param_groups_weight_decay(model, weight_decay=config.weight_decay, no_weight_decay_list=excluded)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set one rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_clipping(model: nn.Module, config: OptimConfig) -> Callable[[], object] | None:
    """A function that clips a model's gradients in place, without waiting for the device; None for no clipping.

    Adaptive clipping leaves out the classifier that the model names (timm's `get_classifier`), as in the paper.
    """
    if config.clip_norm:
        parameters = list(model.parameters())
        return functools.partial(nn.utils.clip_grad_norm_, parameters, config.clip_norm, foreach=True)
    if config.clip_agc:
        layers = getattr(model, "get_classifier", tuple)()  # Some models have several, and some name none.
        layers = layers if isinstance(layers, (tuple, list)) else [layers]
        left_out = {id(parameter) for layer in layers for parameter in layer.parameters()}
        parameters = [parameter for parameter in model.parameters() if id(parameter) not in left_out]
        return functools.partial(adaptive_clip_grad, parameters, config.clip_agc)
    return None
