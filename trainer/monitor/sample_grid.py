"""RUN/samples.png: the first images that the student saw, after augmentation and mixing."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

from pipelines.batch import Batch
from pipelines.common.files import write_synced
from trainer.update.mixing import mix_pixels

SAMPLES = "samples.png"
_SIDE_PX = 96  # Smaller images are enlarged to about this.


def keep_samples(batches: Iterator[Batch], path: Path) -> Iterator[Batch]:
    """The batches, unchanged; images of the first are saved as `path`, unless that file exists."""
    for batch in itertools.islice(batches, 1):
        if not path.exists():
            write_synced(path, strip_png(mix_pixels(batch)))
        yield batch
    yield from batches


def strip_png(pixels: torch.Tensor) -> bytes:
    """The first 16 images in rows of 8, on white, as a PNG; small ones enlarged by a whole factor.

    Args:
      pixels: uint8 [B, S, S, 3].
    """
    images = pixels[:16].cpu().permute(0, 3, 1, 2)
    factor = max(1, _SIDE_PX // images.shape[2])
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(images, nrow=8, padding=4, pad_value=255)
    file = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
