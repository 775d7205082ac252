"""How long the device waits for input."""

import time
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class InputWait(Iterator[T]):
    """An iterator that measures input starvation: how long the device idled for lack of the next item.

    The host runs ahead of a GPU, so its own waiting means little. One CUDA event is recorded before next() and one
    after; a busy GPU reaches both together (0 s), an idle one reaches the second only when the item arrives. Nobody
    waits for the events.

    Args:
      items: complete when they are given.
      device: where they are used, in the stream that is current for it.
    """

    def __init__(self, items: Iterator[T], device: torch.device):
        self._items = items
        self._on_gpu = device.type == "cuda"
        self._host_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __next__(self) -> T:
        if not self._on_gpu:
            start_s = time.perf_counter()
            item = next(self._items)
            self._host_s += time.perf_counter() - start_s
            return item
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        item = next(self._items)
        after.record()
        self._events.append((before, after))
        return item

    def take_s(self) -> float:
        """Seconds since the last call. On a GPU, call it only when the device has done what was enqueued."""
        waited_s = self._host_s + sum(before.elapsed_time(after) for before, after in self._events) / 1e3
        self._host_s, self._events = 0.0, []
        return waited_s
