"""Shows what a plan makes of images: the pixels of the CPU reference, one call for a few rows."""

import numpy as np
import torch

from pipelines.ops.mixing import mix_pixels, partners
from pipelines.ops.pil_ops import decode_checked, transform
from pipelines.plan.plan import BatchPlan
from pipelines.shards.damage import CheckedReader, raise_on_damage
from pipelines.shards.index import ShardIndex


def render(rows: BatchPlan, index: ShardIndex, *, mixed: bool = False) -> np.ndarray:
    """The images of a plan as the CPU reference makes them: uint8 [B, S, S, 3].

    Args:
      rows: any rows of a plan, such as plan[5] or plan[0:1024].
      index: the images that the plan was made for.
      mixed: mix each image with its partner, as the training step does before it normalises.
    Raises:
      UserError: a shard cannot be read, or a sample is damaged.
    """
    reader = CheckedReader(index, raise_on_damage(index))
    own = _transformed(rows, reader)
    if not mixed or (rows.mix_group == 0 and rows.partners is None):
        return own
    images = torch.from_numpy(own)
    if rows.partners is None:
        other = partners(images, rows.mix_group)
    else:
        other = torch.from_numpy(_transformed(rows.partners, reader))
    return mix_pixels(images, other, torch.from_numpy(rows.lam), rows.box).numpy()


def decode_sample(index: ShardIndex, sample: int) -> np.ndarray:
    """The decoded image of a sample: uint8 [height, width, 3]. Raises as `render`."""
    return decode_checked(CheckedReader(index, raise_on_damage(index)), sample)


def _transformed(rows: BatchPlan, reader: CheckedReader) -> np.ndarray:
    images = [transform(decode_checked(reader, sample), rows, row) for row, sample in enumerate(rows.sample.tolist())]
    return np.stack(images)
