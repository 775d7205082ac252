"""Mixing on raw pixels, and each model's own normalisation."""

import torch

from pipelines.batch import Batch
from pipelines.randaugment import has_triton


def partners(values: torch.Tensor, mix_group: int) -> torch.Tensor:
    """Each row's partner: the rows of every group of `mix_group` reversed. Same shape and type as `values`."""
    if mix_group == 0:
        return values
    # [groups, mix_group, ...]
    return values.unflatten(0, (-1, mix_group)).flip(1).flatten(0, 1)


def mix_pixels(batch: Batch) -> torch.Tensor:
    """The mixed images: uint8 [B, S, S, 3] on the batch's device.

    A row with a box takes the box from its partner (CutMix); any other is lam x own + (1 - lam) x partner, rounded
    half to even (mixup). Source: timm.data.mixup.FastCollateMixup, which mixes uint8 before normalisation.
    """
    own = batch.images
    other = partners(own, batch.mix_group)
    lam = batch.lam.view(-1, 1, 1, 1)
    mixed = (own.float() * lam + other.float() * (1.0 - lam)).round().to(torch.uint8)
    top, left, height, width = batch.box.view(-1, 4, 1, 1).unbind(1)
    side = torch.arange(own.shape[1], device=own.device)
    rows, columns = side.view(1, -1, 1), side.view(1, 1, -1)
    # inside: [B, S, S, 1]
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    cutmix = (height * width > 0).unsqueeze(-1)
    return torch.where(cutmix, torch.where(inside.unsqueeze(-1), other, own), mixed)


def mixed_inputs(batch: Batch, models: "list[Normalize]", *, kernel: bool | None = None) -> list[torch.Tensor]:
    """The mixed images, normalised for each of several models: [B, 3, S, S] in channels-last memory, all of one dtype.

    Args:
      kernel: the Triton kernel, one pass over the pixels for all models (True), or torch (False); None takes the kernel
        on CUDA if Triton is installed.
    """
    if kernel is None:
        kernel = batch.images.is_cuda and has_triton()
    if not kernel:
        pixels = mix_pixels(batch)
        return [normalize(pixels) for normalize in models]
    from trainer.mix_kernel import launch

    out = batch.images.new_empty((len(models), *batch.images.shape), dtype=models[0].dtype)
    launch(
        batch.images,
        out,
        lam=batch.lam,
        box=batch.box,
        mix_group=batch.mix_group,
        scale=torch.stack([model.scale for model in models]),
        shift=torch.stack([model.shift for model in models]),
    )
    return list(out.permute(0, 1, 4, 2, 3))


class Normalize(torch.nn.Module):
    """uint8 [B, S, S, 3] pixels -> (pixels / 255 - mean) / std as [B, 3, S, S] in channels-last memory.

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
        return torch.addcmul(self.shift, pixels.float(), self.scale).to(self.dtype).permute(0, 3, 1, 2)
