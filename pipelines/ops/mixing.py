"""Mixing on raw pixels: mixup and CutMix of each image with its partner."""

import itertools

import numpy as np
import torch


def partners(values: torch.Tensor, mix_group: int) -> torch.Tensor:
    """Each row's partner: the rows of every group of `mix_group` reversed. Same shape and type as `values`."""
    if mix_group == 0:
        return values
    # The shape in between is [groups, mix_group, ...].
    return values.unflatten(0, (-1, mix_group)).flip(1).flatten(0, 1)


def mix_pixels(
    own: torch.Tensor, other: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | np.ndarray
) -> torch.Tensor:
    """The mixed images: uint8 [B, S, S, 3] on the device of `own`.

    A row with a box takes the box from its partner (CutMix); any other is lam x own + (1 - lam) x partner, rounded
    half to even (mixup). The host reads the boxes, so it waits for a GPU that holds them.

    Args:
      own, other: each row's image and its partner's, uint8 [B, S, S, 3].
      lam: float32 [B], weight of the own image.
      box: int32 [B, 4], top, left, height, width; empty means mixup.
    Source: timm.data.mixup.FastCollateMixup, which mixes uint8 before normalisation.
    """
    mixed = own.clone()
    start = 0
    for (top, left, height, width), alike in itertools.groupby(box.tolist()):  # A group has one box.
        stop = start + len(list(alike))
        rows = slice(start, stop)
        if height * width:
            inside = rows, slice(top, top + height), slice(left, left + width)
            mixed[inside] = other[inside]
        else:
            weight = lam[rows].view(-1, 1, 1, 1)
            mixed[rows] = own[rows].float().mul_(weight).add_(other[rows].float().mul_(1.0 - weight)).round_()
        start = stop
    return mixed
