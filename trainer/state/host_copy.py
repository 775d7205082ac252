"""Copies of a run's state in host memory, made while the device continues."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_CHUNK = 64 << 20  # At most this many bytes of pinned memory are allocated at once.
_ALIGNMENT = 64  # Each tensor begins at a multiple of this many bytes.


def to_host(content: Any) -> Any:
    """A copy of nested dictionaries, lists and tensors; the device is waited for once, after all copies."""
    on_device: list[torch.Tensor] = []

    def collect(leaf: Any) -> None:
        if torch.is_tensor(leaf) and leaf.is_cuda:
            on_device.append(leaf.detach())

    map_leaves(content, collect)
    copies = pinned_like(on_device)
    try:
        for copy, tensor in zip(copies, on_device, strict=True):
            copy.copy_(tensor, non_blocking=True)
    finally:  # PyTorch does not know that the device still writes into this memory, and would reuse it.
        if on_device:
            torch.cuda.current_stream(on_device[0].device).synchronize()
    in_order = iter(copies)

    def copied(leaf: Any) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        return next(in_order) if leaf.is_cuda else leaf.detach().clone()

    return map_leaves(content, copied)


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested dictionaries, lists and tuples with `function` applied to everything that is none of these."""
    if isinstance(value, dict):
        return {key: map_leaves(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(item, function) for item in value)
    return function(value)


def pinned_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of these shapes, types and strides in a few blocks of pinned host memory.

    Pinning a block takes longer than filling it, and PyTorch rounds its size up to a power of two. One block for each
    tensor would be thousands of them. Each tensor still has a storage of its own, because torch.save writes whole
    storages.
    """
    block_bytes = [0]
    offsets: list[tuple[int, int]] = []  # For each tensor: its block and its first byte in it.
    for tensor in tensors:
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if block_bytes[-1] and block_bytes[-1] + size > _CHUNK:
            block_bytes.append(0)
        offsets.append((len(block_bytes) - 1, block_bytes[-1]))
        block_bytes[-1] += size
    if not tensors:
        return []
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() for size in block_bytes]
    return [
        _tensor_in(blocks[block][start : start + tensor.nbytes], tensor)
        for tensor, (block, start) in zip(tensors, offsets, strict=True)
    ]


def _tensor_in(memory: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """A tensor in uint8 `memory` of as many bytes as `like` has; the strides are those of torch.empty_like."""
    strides = torch.empty_like(like, device="meta").stride()
    return torch.from_numpy(memory).view(like.dtype).as_strided(like.shape, strides)
