"""Batches without data: the ceiling of everything behind the pipeline."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.batch import Batch, BatchMaker
from pipelines.plan import rng
from pipelines.plan.plan import BatchPlan
from pipelines.shards.index import ShardIndex, sample_dtype


def synthetic_index(num_samples: int, num_classes: int, height: int = 375, width: int = 500) -> ShardIndex:
    """An index of images that do not exist, of one size (ImageNet's commonest unless told otherwise).

    A sample's label is its row modulo num_classes.
    """
    samples = np.zeros(num_samples, dtype=sample_dtype(1))
    samples["label"] = np.arange(num_samples) % num_classes
    samples["height"], samples["width"] = height, width
    return ShardIndex((Path("synthetic"),), samples, num_classes, f"synthetic-{num_samples}-{num_classes}")


class SyntheticPipeline:
    """The plan's labels and mixing with noise for pixels: the same noise every batch, made once on the device."""

    def __init__(self, index: ShardIndex, *, device: torch.device):
        self._maker = BatchMaker(index, device)
        self._device = device

    def forget(self) -> None:
        """Nothing is kept."""

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order."""
        images = torch.empty(0)
        for plan in plans:
            shape = (len(plan), plan.image_size, plan.image_size, 3)
            if images.shape != shape:
                images = torch.from_numpy(_noise(shape)).to(self._device)
            yield self._maker.make(images, plan)


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    row_words = -(-int(np.prod(shape[1:])) // 32) * 4  # 8 bytes a word, words in fours
    noise = rng.words(0, rng.Stream.SYNTHETIC, 0, shape[0], row_words).view(np.uint8)
    return noise[:, : int(np.prod(shape[1:]))].reshape(shape).copy()
