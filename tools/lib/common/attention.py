"""Models whose fused attention an exporter does not take are exported with timm's plain one."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from pipelines.common.errors import UserError

T = TypeVar("T")
PLAIN_ATTENTION = "with timm's plain attention, because the fused one cannot be exported"
_SWITCH = "fused_attn"  # timm's layers have this attribute where they call scaled_dot_product_attention


def has_fused_attention(model: nn.Module) -> bool:
    """Return whether a layer of the model calls scaled_dot_product_attention."""
    return any(getattr(module, _SWITCH, False) for module in model.modules())


def with_plain_attention(model: nn.Module) -> nn.Module:
    """A copy of the model that multiplies and normalises the attention's matrices itself, with the same weights."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, _SWITCH):
            setattr(module, _SWITCH, False)
    return plain


def fused_or_plain(model: nn.Module, attempt: Callable[[nn.Module], T]) -> tuple[T, bool]:
    """Try an export with the model's fused attention, and again with plain attention if that fails.

    Args:
      attempt: exports the model that it is given; it raises a UserError if the file cannot be written, run or trusted.
    Returns:
      what `attempt` returned, and whether that was for a copy with plain attention.
    Raises:
      UserError: the model has no fused attention, or plain attention fails, too.
    """
    try:
        return attempt(model), False
    except UserError:
        if not has_fused_attention(model):
            raise
    return attempt(with_plain_attention(model)), True
