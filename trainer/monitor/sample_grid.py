"""RUN/samples.png: the first images that the student saw, after augmentation and mixing."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.batch import Batch
from pipelines.common.files import write_synced
from trainer.update.mixing import mix_pixels

SAMPLES = "samples.png"
_COLUMNS, _ROWS = 8, 2
_SIDE_PX = 96  # Smaller images are enlarged to about this.
_GAP_PX = 4


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
    images = pixels[: _COLUMNS * _ROWS].cpu().numpy()
    factor = max(1, _SIDE_PX // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    side = images.shape[1] + _GAP_PX
    rows, columns = -(-len(images) // _COLUMNS), min(len(images), _COLUMNS)
    canvas = np.full((rows * side - _GAP_PX, columns * side - _GAP_PX, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // _COLUMNS * side, i % _COLUMNS * side
        canvas[top : top + len(image), left : left + len(image)] = image
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG")
    return file.getvalue()
