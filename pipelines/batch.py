"""The batch that every executor hands to the training step, and what all executors have in common."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch

from pipelines.plan.plan import BatchPlan
from pipelines.shards.index import ShardIndex


@dataclasses.dataclass(frozen=True)
class Batch:
    """B positions, carried out, on the device.

    Attributes:
      images: uint8 [B, S, S, 3], RGB; permuted to [B, 3, S, S] it is channels-last without a copy.
      labels: int64 [B].
      lam: float32 [B], weight of the row's own label after mixing.
      box: int32 [B, 4], top, left, height, width of what comes from the partner; empty means mixup.
      valid: bool [B], False for rows that only fill up the batch.
      position: the position of the first row.
      mix_group: rows that are mixed with each other, partner = the group reversed; 0 where nothing is mixed.
      targets: for each recorded teacher uint8 [B, row_bytes], its encoded outputs; () without.
    """

    images: torch.Tensor
    labels: torch.Tensor
    lam: torch.Tensor
    box: torch.Tensor
    valid: torch.Tensor
    position: int
    mix_group: int
    targets: tuple[torch.Tensor, ...] = ()


class Pipeline(Protocol):
    """An executor: it carries plans out. As a context manager it gives its memory back at the end."""

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order. Close the iterator to stop early."""
        ...

    def forget(self) -> None:
        """Give back what is kept for the next call of `batches`. Call it between two calls."""

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()


class BatchMaker:
    """Puts pixels and the rest of their plan together on the device, in memory of their own.

    On a GPU the copies run in a stream of their own. So neither they nor the wait for them delays the training step,
    which runs in the device's default stream. One background thread uses it.

    Attributes:
      stream: where the copies run, and whatever else is done to a batch before it is handed over; None on the CPU.
    """

    def __init__(self, index: ShardIndex, device: torch.device):
        self._index = index
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use_device(self) -> None:
        """Make the device the current GPU of the background thread, whose default is the machine's first GPU."""
        if self.stream is not None:
            torch.cuda.set_device(self._device)

    def make(self, images: torch.Tensor, plan: BatchPlan) -> Batch:
        """The batch, complete when this returns.

        Args:
          images: uint8 [B, S, S, 3] on the CPU or the device, taken over: nobody else may write into it. On the device
            it was made in `stream`.
        """
        with torch.cuda.stream(self.stream):
            batch = Batch(
                images=self._pixels(images),
                labels=self._on_device(self._index.samples["label"][plan.sample]),
                lam=self._on_device(plan.lam),
                box=self._on_device(plan.box),
                valid=self._on_device(plan.valid),
                position=plan.position,
                mix_group=plan.mix_group,
            )
        if self.stream is not None:
            self.stream.synchronize()
            for tensor in (batch.images, batch.labels, batch.lam, batch.box, batch.valid):
                # Do not reuse this memory before the kernels that the training step has enqueued are done.
                tensor.record_stream(torch.cuda.default_stream(self._device))
        return batch

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        if self.stream is None or images.is_cuda:
            return images
        return images.pin_memory().to(self._device, non_blocking=True)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
