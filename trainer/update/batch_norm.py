"""BatchNorm's running statistics over the micro-batches and ranks of an update."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from trainer.cluster.world import World
from trainer.models.batch_norm import batch_counters, running_statistics


class StatisticsAverage:
    """Makes the running statistics after an update those of all its micro-batches, on whatever rank they ran.

    Each micro-batch starts from the statistics before the update, and the results are averaged over the micro-batches
    of a rank, then over the ranks, weighted by their images. So all ranks always hold the same statistics.

    Args:
      model: the unwrapped model.
      sizes: images that BatchNorm sees in each micro-batch of an update.
      rank_weight: this rank's images, as a multiple of the mean over the ranks.
      mode: run.batch_norm; only with reduce, the default, the ranks take the mean over all of them.
    """

    def __init__(self, model: nn.Module, sizes: Sequence[int], rank_weight: float, mode: str, world: World):
        self._statistics = running_statistics(model)
        self._counters = batch_counters(model)
        # Multiples of the largest size: with sizes that are equal, the mean has the bits of a plain one.
        self._weights = [size / max(sizes) for size in sizes]
        self._rank_weight = rank_weight
        self._mode = mode
        self._world = world

    @contextlib.contextmanager
    def one_update(self) -> Iterator[None]:
        """Inside, the micro-batches of one update run, and `end_micro_batch` is called after each."""
        if not self._statistics:
            yield
            return
        self._before = torch.cat(self._statistics)
        self._total = torch.zeros_like(self._before)
        self._next_weight = iter(self._weights)
        yield
        with torch.no_grad():
            if self._counters:  # An update counts as one batch, however it was split.
                torch._foreach_sub_(self._counters, len(self._weights) - 1)
            mean = self._total / sum(self._weights)
            if self._mode == "reduce":
                mean = self._world.all_reduce_sum(mean * self._rank_weight) / self._world.size
            elif self._mode == "broadcast":
                mean = self._world.broadcast(mean)
            self._set(mean)

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """Collect the statistics after a forward and backward pass, and restore those before the update."""
        if self._statistics:
            self._total += torch.cat(self._statistics) * next(self._next_weight)
            self._set(self._before)

    def _set(self, values: torch.Tensor) -> None:
        torch._foreach_copy_(self._statistics, list(values.split([len(buffer) for buffer in self._statistics])))
