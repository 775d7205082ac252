"""How long the device waits for input, and how long the rest of a run takes."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class _Mark(Protocol):
    """A point in the device's work: torch.cuda.Event, or _HostMark on a CPU."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event) -> float: ...


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
        self._make_mark: Callable[[], _Mark] = _HostMark
        if device.type == "cuda":
            self._make_mark = functools.partial(torch.cuda.Event, enable_timing=True)
        self._waits: list[tuple[_Mark, _Mark]] = []

    def __next__(self) -> T:
        before, after = self._make_mark(), self._make_mark()
        before.record()
        item = next(self._items)
        after.record()
        self._waits.append((before, after))
        return item

    def take_s(self) -> float:
        """Seconds since the last call. On a GPU, call it only when the device has done what was enqueued."""
        waits, self._waits = self._waits, []
        return sum(before.elapsed_time(after) for before, after in waits) / 1e3


class _HostMark:
    """Stands for a CUDA event where host and device are one."""

    def record(self) -> None:
        self._time_s = time.perf_counter()

    def elapsed_time(self, end_event: "_HostMark") -> float:
        """Milliseconds, as torch.cuda.Event has it."""
        return 1e3 * (end_event._time_s - self._time_s)


class Pace:
    """Estimates the time to the end of the run from the pace of this session: updates, evaluations and all.

    The first update does not count, because it waits for the first images and for kernels to be chosen.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic):
        self._total_steps = total_steps
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget the updates so far: the run continues from another step."""
        self._first: tuple[int, float] | None = None  # (step, time in seconds)
        self._last: tuple[int, float] | None = None

    def advance(self, step: int) -> None:
        """Note that `step` updates have been done in all."""
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def left(self) -> str:
        """As 2 d 3 h, 3:04:05 or 4:05; -:-- where it is not known yet."""
        if self._first is None or self._last is None or self._first == self._last:
            return "-:--"
        first, start_s = self._first
        step, now_s = self._last
        seconds = round((now_s - start_s) / (step - first) * (self._total_steps - step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        if hours >= 24:
            return f"{hours // 24} d {hours % 24} h"
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
