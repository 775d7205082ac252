"""Each model's own normalisation of raw pixels."""

import torch


class Normalize(torch.nn.Module):
    """[B, S, S, 3] pixels, of any type -> (pixels / 255 - mean) / std as [B, 3, S, S] in channels-last memory.

    Args:
      mean, std: the model's own, for pixels in [0, 1].
      dtype: of the result; computed in float32.
    """

    scale: torch.Tensor  # float32 [3]: the result is pixels * scale + shift
    shift: torch.Tensor  # float32 [3]

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] of any type -> [B, 3, S, S] of `dtype`."""
        values = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        # A whole row of pixels is one vector here, [B, S, 3S]: a CPU takes three times as long for vectors of three.
        scale, shift = self.scale.repeat(values.shape[2]), self.shift.repeat(values.shape[2])
        values.view(*values.shape[:2], -1).mul_(scale).add_(shift)
        return values.to(self.dtype).permute(0, 3, 1, 2)
