"""BatchNorm's running statistics over the micro-batches and ranks of an update."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from trainer.cluster.world import World
from trainer.models.batch_norm import batch_counters, running_statistics


class StatisticsAverage:
    """Makes the running statistics after an update those of all its micro-batches, on whatever rank they ran.

    Each micro-batch starts from the statistics before the update, and the results are averaged on each rank. Then the
    mode decides what the ranks do:
      reduce: they take the mean over the ranks. So all ranks always hold the same statistics, and these do not depend
        on how the global batch was split over ranks and micro-batches.
      broadcast: they take those of rank 0's images, as DDP's own broadcast has it.
      none: each rank keeps its own.
      sync: nothing, because the layers themselves saw the images of all ranks.

    Args:
      model: the unwrapped model.
      num_micro_batches: of an update, on this rank.
      mode: reduce, broadcast, none or sync.
      world: the ranks.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int, mode: str, world: World):
        self._statistics = running_statistics(model)
        self._counters = batch_counters(model)
        self._num_micro_batches = num_micro_batches
        self._is_split = bool(self._statistics) and num_micro_batches > 1
        self._is_common = bool(self._statistics) and world.size > 1 and mode in ("reduce", "broadcast")
        self._mode = mode
        self._world = world
        self._before: list[torch.Tensor] = []
        self._total: list[torch.Tensor] = []

    @contextlib.contextmanager
    def one_update(self) -> Iterator[None]:
        """Inside, the micro-batches of one update run, and `end_micro_batch` is called after each."""
        with torch.no_grad():
            self._begin()
        yield
        with torch.no_grad():
            self._end()

    def _begin(self) -> None:
        if self._is_split:
            self._before = [buffer.clone() for buffer in self._statistics]
            self._total = [torch.zeros_like(buffer) for buffer in self._statistics]

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """Collect the statistics after a forward and backward pass, and restore those before the update."""
        if self._is_split:
            torch._foreach_add_(self._total, self._statistics)
            torch._foreach_copy_(self._statistics, self._before)

    def _end(self) -> None:
        if self._is_split:
            # An update counts as one batch, however it was split.
            torch._foreach_sub_(self._counters, self._num_micro_batches - 1)
            torch._foreach_div_(self._total, self._num_micro_batches)
            torch._foreach_copy_(self._statistics, self._total)
        if self._is_common:
            flat = torch.cat(self._statistics)
            if self._mode == "reduce":
                flat = self._world.all_reduce_sum(flat) / self._world.size
            else:
                flat = self._world.broadcast(flat)
            torch._foreach_copy_(self._statistics, list(flat.split([len(buffer) for buffer in self._statistics])))
