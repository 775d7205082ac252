"""Mixing on raw pixels, and each model's own normalisation."""

import torch

from pipelines.batch import Batch
from pipelines.ops import mixing
from pipelines.ops.mixing import partners
from pipelines.ops.torch_ops import kernel_error

__all__ = ["Normalize", "mix_pixels", "mixed_inputs", "partners"]


def mix_pixels(batch: Batch) -> torch.Tensor:
    """The mixed images: uint8 [B, S, S, 3] on the batch's device.

    The host reads the boxes, for which it waits for a GPU; `mixed_inputs` does not.
    """
    if batch.mix_group == 0:
        return batch.images
    return mixing.mix_pixels(batch.images, partners(batch.images, batch.mix_group), batch.lam, batch.box)


def mixed_inputs(batch: Batch, models: "list[Normalize]", *, kernel: bool | None = None) -> list[torch.Tensor]:
    """The mixed images, normalised for each of several models: [B, 3, S, S] in channels-last memory, all of one dtype.

    Each model's are memory of their own, so that what the student keeps for its backward pass does not keep the others.

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


class Normalize(torch.nn.Module):
    """[B, S, S, 3] pixels, of any type -> (pixels / 255 - mean) / std as [B, 3, S, S] in channels-last memory.

    Args:
      mean, std: the model's own, for pixels in [0, 1].
      dtype: of the result; computed in float32.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        # a whole row of pixels at a time, [B, S, 3S]: by threes a CPU would take three times as long
        scale, shift = (per_channel.repeat(values.shape[2]) for per_channel in (self.scale, self.shift))
        values.view(*values.shape[:2], -1).mul_(scale).add_(shift)
        return values.to(self.dtype).permute(0, 3, 1, 2)
