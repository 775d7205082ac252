"""Timing of candidates in turn, so that a machine whose speed drifts is unfair to none of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

from pipelines.common.errors import UserError
from pipelines.common.files import check_parent_folder

# A pipeline may work on this many batches besides those that are ready and wait (data.prefetch).
BATCHES_IN_WORK = 4


class Speeds(TypedDict):
    """Images/s: the median of several timed runs, the slowest and the fastest of them."""

    images_per_s: float
    min: float
    max: float


def interleaved(
    candidates: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Call each candidate `repeats` times in turn and collect what it returns, its seconds.

    Args:
      warm_up: begin with a round that does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(repeats + warm_up):
        for name, run in candidates.items():
            elapsed_s = run()
            if number >= warm_up:
                seconds[name].append(elapsed_s)
    return seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A candidate that returns the seconds which `run` takes."""

    def seconds() -> float:
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s

    return seconds


def timed_on_device(run: Callable[[], object]) -> Callable[[], float]:
    """As `timed`, from when the GPU has nothing left to do until it has finished the work of `run`."""

    def to_the_end() -> None:
        run()
        synchronize()

    def seconds() -> float:
        synchronize()
        return timed(to_the_end)()

    return seconds


def synchronize() -> None:
    """Wait until the GPU has finished, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(baseline: list[float], times: list[float]) -> float:
    """The speed of `times` over the baseline's: the median of the ratios of neighbouring runs."""
    return round(statistics.median(b / t for b, t in zip(baseline, times, strict=True)), 3)


def speeds(images: int, times: list[float], digits: int | None = None) -> Speeds:
    """The images/s of runs that took these seconds for `images` images each."""
    median, slowest, fastest = statistics.median(times), max(times), min(times)
    return {
        "images_per_s": round(images / median, digits),
        "min": round(images / slowest, digits),
        "max": round(images / fastest, digits),
    }


def check_positive(options: Mapping[str, object]) -> None:
    """Raise a UserError if a number of the command line is not positive or has no end."""
    for name, value in options.items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value:g}; it must be positive and finite")


def check_result_file(path: Path | None) -> None:
    """Raise a UserError if --json names a file that cannot be written."""
    if path is not None:
        check_parent_folder(path, f"--json {path}")
