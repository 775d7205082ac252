"""Batches without data: they show how fast everything behind the pipeline can be."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pipelines.batch import Batch, BatchMaker, Pipeline
from pipelines.plan import rng
from pipelines.plan.plan import BatchPlan
from pipelines.shards.index import ShardIndex


class SyntheticPipeline(Pipeline):
    """The plan's labels and mixing with noise for pixels: the same noise every batch, made once on the device."""

    def __init__(self, index: ShardIndex, *, device: torch.device):
        self._maker = BatchMaker(index, device)
        self._device = device

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order."""
        images = torch.empty(0)
        for plan in plans:
            shape = (max(len(plan), plan.capacity), plan.image_size, plan.image_size, 3)
            if images.shape != shape:
                images = torch.from_numpy(_noise(shape)).to(self._device)
            yield self._maker.make(images[: len(plan)], plan)


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    """Reproducible noise: uint8 of this shape."""
    row_bytes = int(np.prod(shape[1:]))
    row_words = -(-row_bytes // 32) * 4  # A word has 8 bytes, and words come in fours.
    noise = rng.words(0, rng.Stream.SYNTHETIC, 0, shape[0], row_words).view(np.uint8)
    return noise[:, :row_bytes].reshape(shape).copy()
