"""Mixing on raw pixels."""

import torch

from pipelines.batch import Batch
from pipelines.ops import mixing
from pipelines.ops.mixing import partners
from pipelines.ops.torch_ops import kernel_error
from trainer.models.normalize import Normalize


def mix_pixels(batch: Batch) -> torch.Tensor:
    """The mixed images: uint8 [B, S, S, 3] on the batch's device.

    The host reads the boxes, for which it waits for a GPU; `mixed_inputs` does not.
    """
    if batch.mix_group == 0:
        return batch.images
    return mixing.mix_pixels(batch.images, partners(batch.images, batch.mix_group), batch.lam, batch.box)


def mixed_inputs(batch: Batch, models: list[Normalize], *, kernel: bool | None = None) -> list[torch.Tensor]:
    """The mixed images, normalised for each of several models: [B, 3, S, S] in channels-last memory.

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

    assert batch.images.is_contiguous()
    outs = [torch.empty_like(batch.images, dtype=model.dtype) for model in models]
    for dtype in {model.dtype for model in models}:  # The kernel writes one type.
        chosen = [i for i, model in enumerate(models) if model.dtype == dtype]
        scale = torch.stack([models[i].scale for i in chosen])
        launch(batch, [outs[i] for i in chosen], scale, torch.stack([models[i].shift for i in chosen]))
    return [out.permute(0, 3, 1, 2) for out in outs]
