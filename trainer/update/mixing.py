"""Mixing on raw pixels."""

import itertools

import torch

from pipelines.batch import Batch
from pipelines.ops.torch_ops import kernel_error
from trainer.models.normalize import Normalize


def partners(values: torch.Tensor, mix_group: int) -> torch.Tensor:
    """Each row's partner: the rows of every group of `mix_group` reversed. Same shape and type as `values`."""
    if mix_group == 0:
        return values
    # unflatten: [groups, mix_group, ...]
    return values.unflatten(0, (-1, mix_group)).flip(1).flatten(0, 1)


def mix_pixels(batch: Batch) -> torch.Tensor:
    """The mixed images: uint8 [B, S, S, 3] on the batch's device.

    A row with a box takes the box from its partner (CutMix); any other is lam x own + (1 - lam) x partner, rounded
    half to even (mixup). The host reads the boxes, for which it waits for a GPU; `mixed_inputs` does not.

    Source: timm.data.mixup.FastCollateMixup, which mixes uint8 before normalisation.
    """
    own = batch.images
    if batch.mix_group == 0:
        return own
    other, mixed = partners(own, batch.mix_group), own.clone()
    start = 0
    for (top, left, height, width), same in itertools.groupby(batch.box.tolist()):  # A group has one box.
        stop = start + len(list(same))
        rows = slice(start, stop)
        start = stop
        if height * width:
            inside = rows, slice(top, top + height), slice(left, left + width)
            mixed[inside] = other[inside]
        else:
            lam = batch.lam[rows].view(-1, 1, 1, 1)
            mixed[rows] = own[rows].float().mul_(lam).add_(other[rows].float().mul_(1.0 - lam)).round_()
    return mixed


def mixed_inputs(batch: Batch, models: list[Normalize], *, kernel: bool | None = None) -> list[torch.Tensor]:
    """The mixed images, normalised for each of several models: [B, 3, S, S] in channels-last memory, all of one dtype.

    Each model's images have memory of their own, so that the student's, which are kept for its backward pass, keep no
    others.

    Args:
      kernel: the Triton kernel, one pass over the pixels for all models (True), or torch (False); None takes the kernel
        on CUDA if Triton works there.
    """
    if kernel is None:
        kernel = batch.images.is_cuda and not kernel_error()
    if not kernel:
        pixels = mix_pixels(batch)
        return [normalize(pixels) for normalize in models]
    from trainer.update.mixing_triton import launch

    assert batch.images.is_contiguous() and len({model.dtype for model in models}) == 1
    outs = [torch.empty_like(batch.images, dtype=model.dtype) for model in models]
    launch(
        batch.images,
        outs,
        lam=batch.lam,
        box=batch.box,
        mix_group=batch.mix_group,
        scale=torch.stack([model.scale for model in models]),
        shift=torch.stack([model.shift for model in models]),
    )
    return [out.permute(0, 3, 1, 2) for out in outs]
