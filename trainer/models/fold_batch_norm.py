"""BatchNorm folded into the convolutions before it: the same function in evaluation, with less to compute."""

import collections

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Exactly these: a subclass may change its weights on the way (weight standardisation), or do more than normalise.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, images: torch.Tensor) -> int:
    """Fold each BatchNorm whose only input is what one convolution gives to it alone, in place.

    Which those are is seen in a forward pass, so it holds for whatever a model's code does.

    Args:
      model: in evaluation mode, and staying in it; it gives the same outputs afterwards, but for rounding.
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
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        parent, _, name = names[norm][0].rpartition(".")
        setattr(model.get_submodule(parent), name, _rest(norm))
    difference, scale = (model(images) - expected).abs().max(), expected.abs().max()
    if difference > 1e-2 * scale:
        raise RuntimeError(f"folding BatchNorm changed outputs of up to {scale:.3g} by {difference:.3g}")
    return len(pairs)


def _rest(norm: nn.Module) -> nn.Module:
    """What a layer does besides normalising."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _foldable(model: nn.Module, images: torch.Tensor) -> tuple[list[tuple[nn.Module, nn.Module]], torch.Tensor]:
    """Convolutions and the BatchNorms after them, both called once, with nothing else that reads what is between.

    And the model's outputs.
    """
    uses = _Uses()
    made: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # by id; kept, so that no later tensor has the same id
    calls: dict[nn.Module, int] = {}
    met: list[tuple[int, nn.Module]] = []

    def after_convolution(module: nn.Module, _, output: torch.Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        made[id(output)] = (module, output)
        uses.of[id(output)] = 0

    def before_norm(module: nn.Module, inputs: tuple) -> None:
        calls[module] = calls.get(module, 0) + 1
        if inputs and id(inputs[0]) in made:
            met.append((id(inputs[0]), module))

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
