"""PIL's Gaussian blur on a batch of pixels that lies on the device, to the last bit."""

import numpy as np
import torch

_PASSES = 3  # PIL approximates a Gaussian by three box blurs in each direction.


def blur(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Three box blurs along the rows, then three along the columns, each rounded.

    Args:
      images: uint8 [n, S, S, 3].
      weights: int64 [n, taps] on the same device, as from `box_weights`.
    Returns:
      uint8 [n, S, S, 3].
    Source: PIL.ImageFilter.GaussianBlur; the arithmetic is in fixed point, 1 is 1 << 24.
    """
    for _ in range(_PASSES):
        images = _box_blur(images, weights)
    images = images.transpose(1, 2)
    for _ in range(_PASSES):
        images = _box_blur(images, weights)
    return images.transpose(1, 2)


def box_weights(sigma: np.ndarray) -> np.ndarray:
    """The weights of a box whose ends count in part: int64 [n, taps], an odd number of taps around the pixel.

    Args:
      sigma: standard deviations of the Gaussians, pixels, float32 [n].
    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", as PIL
      computes it: variables are float32, expressions with a float64 constant are float64.
    """
    variance = sigma**2 / np.float32(_PASSES)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = whole + part
    whole = radius.astype(np.int64)[:, None]
    inner = (np.float32(1 << 24) / (radius * 2 + 1)).astype(np.int64)[:, None]
    outer = ((1 << 24) - (2 * whole + 1) * inner) // 2
    reach = int(whole.max()) + 1
    distance = abs(np.arange(-reach, reach + 1))
    return np.where(distance <= whole, inner, np.where(distance == whole + 1, outer, 0))


def _box_blur(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One weighted box along dimension 2 of [n, S, S, 3], edge pixels repeated."""
    size, reach = images.shape[2], weights.shape[1] // 2
    total = torch.full(images.shape, 1 << 23, dtype=torch.int64, device=images.device)  # This half rounds.
    column = torch.arange(size, device=images.device)
    for tap, weight in enumerate(weights.T):
        shifted = images.index_select(2, (column + tap - reach).clamp(0, size - 1))
        total += weight[:, None, None, None] * shifted
    return (total >> 24).to(torch.uint8)
