"""Folds BatchNorms into the convolutions before them: evaluation computes the same function with less work."""

import collections
from typing import cast

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Exactly these: a subclass may change its weights on the way (weight standardisation), or do more than normalise.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, images: torch.Tensor) -> int:
    """Fold each BatchNorm whose only input is the output of one convolution that nothing else reads, in place.

    A forward pass shows which those are, so this holds for whatever a model's code does.

    Args:
      model: in evaluation mode; it gives the same outputs afterwards, but for rounding.
      images: float32 [B, 3, S, S], noise, for that pass and another one.
    Returns:
      how many were folded.
    Raises:
      RuntimeError: the model gives other outputs afterwards.
    Source: w' = w x gamma / sqrt(var + eps), b' = (b - mean) x gamma / sqrt(var + eps) + beta.
    """
    names = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    found, expected = _foldable(model, images)
    pairs = [pair for pair in found if len(names[pair[1]]) == 1]
    if not pairs:
        return 0
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        parent, _, name = names[norm][0].rpartition(".")
        setattr(model.get_submodule(parent), name, _rest(norm))
    difference, scale = (model(images) - expected).abs().max(), expected.abs().max()
    if difference > 1e-2 * scale:
        raise RuntimeError(f"folding BatchNorm changed outputs of up to {scale:.3g} by {difference:.3g}")
    return len(pairs)


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What a layer does besides normalising."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    return nn.Sequential(cast(nn.Module, norm.drop), cast(nn.Module, norm.act))


def _foldable(model: nn.Module, images: torch.Tensor) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], torch.Tensor]:
    """Find convolutions and BatchNorms that are called once, where only the BatchNorm reads the convolution's output.

    Returns:
      These pairs, and the model's outputs.
    """
    uses = _Uses()
    # By the id of the output. Keeping the output prevents that a later tensor gets the same id.
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    calls: dict[nn.Module, int] = collections.Counter()
    met: list[tuple[int, nn.BatchNorm2d]] = []

    # The hooks are registered on modules of _CONVOLUTIONS and _BATCH_NORMS alone.
    def after_convolution(module: nn.Module, _, output: torch.Tensor) -> None:
        calls[module] += 1
        made[id(output)] = (cast(nn.Conv2d, module), output)
        uses.of[id(output)] = 0

    def before_norm(module: nn.Module, inputs: tuple) -> None:
        calls[module] += 1
        if inputs and id(inputs[0]) in made:
            met.append((id(inputs[0]), cast(nn.BatchNorm2d, module)))

    hooks = [m.register_forward_hook(after_convolution) for m in model.modules() if type(m) in _CONVOLUTIONS]
    hooks += [
        m.register_forward_pre_hook(before_norm)
        for m in model.modules()
        if type(m) in _BATCH_NORMS and m.running_mean is not None
    ]
    try:
        with uses:
            outputs = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(made[output][0], norm) for output, norm in met if uses.of[output] == 1]
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1], outputs


class _Uses(TorchDispatchMode):
    """Counts how many operations read each tensor in `of`, which is by id."""

    def __init__(self):
        super().__init__()
        self.of: dict[int, int] = {}

    def __torch_dispatch__(self, operation, _, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.of:
                self.of[id(value)] += 1
        return operation(*args, **(kwargs or {}))
