"""The Triton kernel behind `trainer.update.mixing`: mixing and every model's normalisation in one pass over the pixels.

Imported only where it runs, so that a machine without Triton needs none. It computes what the torch version computes,
in the same types and order of operations; the launch forbids the compiler to contract a multiplication and an addition
into one (that rounds once instead of twice, and a rounded pixel may then differ).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pipelines.batch import Batch

_VALUES_PER_PROGRAM = 1024
_ROUND = tl.constexpr(12582912.0)  # 1.5 x 2**23: the sum with a float32 in [0, 2**22) has no bits behind the point left


def launch(batch: Batch, outs: Sequence[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Writes outs[k] = shift[k] + scale[k] x mixed images, for each of K models; nothing waits for the device.

    Args:
      batch: its tensors are contiguous.
      outs: floating [B, S, S, 3], contiguous, K of one type, each in memory of its own.
      scale, shift: float32 [K, 3], contiguous.
    """
    size = batch.images.shape[1]
    blocks = triton.cdiv(size * size * 3, _VALUES_PER_PROGRAM)
    with torch.cuda.device_of(batch.images):
        _mix_normalize[(len(batch.images) * blocks,)](
            batch.images,
            tuple(outs),
            batch.lam,
            batch.box,
            scale,
            shift,
            size,
            max(batch.mix_group, 1),  # alone in its group, an image is its own partner
            blocks,
            _VALUES_PER_PROGRAM,
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]  (Triton takes it as an option of the launch.)
        )


@triton.jit
def _mix_normalize(images, outs, lam, box, scale, shift, size, mix_group, blocks, block: tl.constexpr):
    """Program i: values [(i % blocks) block, ... + block) of image i // blocks."""
    image = tl.program_id(0) // blocks
    value = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    image_values = size * size * 3
    mask = value < image_values
    channel = value % 3
    row = value // 3 // size
    column = value // 3 % size
    top = tl.load(box + image * 4)
    left = tl.load(box + image * 4 + 1)
    height = tl.load(box + image * 4 + 2)
    width = tl.load(box + image * 4 + 3)
    mixup = height * width <= 0
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    partner = image // mix_group * mix_group + mix_group - 1 - image % mix_group
    # a batch may hold more than 2**31 values, an image not
    start = image.to(tl.int64) * image_values
    partner_start = partner.to(tl.int64) * image_values
    own = tl.load(images + start + value, mask=mask, other=0).to(tl.float32)
    other = tl.load(images + partner_start + value, mask=mask, other=0).to(tl.float32)
    weight = tl.load(lam + image)
    mixed = (own * weight + other * (1.0 - weight) + _ROUND) - _ROUND
    pixels = tl.where(mixup, mixed, tl.where(inside, other, own))
    for model in tl.static_range(len(outs)):  # pyright: ignore[reportGeneralTypeIssues]  (The kernel unrolls it.)
        normalized = _of_channel(shift + model * 3, channel) + pixels * _of_channel(scale + model * 3, channel)
        tl.store(outs[model] + start + value, normalized.to(outs[model].dtype.element_ty), mask=mask)


@triton.jit
def _of_channel(values, channel):
    """One of three values, by the channel."""
    return tl.where(channel == 0, tl.load(values), tl.where(channel == 1, tl.load(values + 1), tl.load(values + 2)))
