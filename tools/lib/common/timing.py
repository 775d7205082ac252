"""What every benchmark shares: timing in turns, and what a number depends on."""

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from pipelines.common.errors import UserError
from pipelines.common.files import check_parent_folder
from pipelines.common.machine import num_cores

_PACKAGES = ("pillow", "numpy", "torch", "torchvision", "timm", "webdataset", "ffcv")
_NOT_INSTALLED = "not installed"
_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")  # one is enough


def interleaved(
    candidates: dict[str, Callable[[], float]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """What each candidate returns, its seconds, `repeats` times in turn, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + warm_up):
        for name, run in candidates.items():
            elapsed_s = run()
            if turn >= warm_up:
                seconds[name].append(elapsed_s)
    return seconds


def timed(run: Callable[[], None]) -> Callable[[], float]:
    """`run` as a candidate: all of it counts."""

    def seconds() -> float:
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s

    return seconds


def timed_on_device(run: Callable[[], None]) -> Callable[[], float]:
    """`run` as a candidate, from when the GPU has nothing left to do until it has finished; as `timed` on a CPU."""
    measure = timed(lambda: (run(), synchronize()))

    def seconds() -> float:
        synchronize()
        return measure()

    return seconds


def check_positive(options: dict) -> None:
    """Raise a UserError if so much as one number of the command line asks for nothing, or for no end."""
    for name, value in options.items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value:g}; it must be positive and finite")


def check_result_file(path: Path | None) -> None:
    """Raise a UserError if --json names what cannot be written."""
    if path is not None:
        check_parent_folder(path, f"--json {path}")


# Columns of every table of speeds; others may follow.
SPEED_COLUMNS = {
    "what": "what",
    "images_per_s": "images/s",
    "min": "min",
    "max": "max",
    "ratio": "ratio",
    "of": "of",
}


def synchronize() -> None:
    """Until the GPU has finished, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(baseline: list[float], times: list[float]) -> float:
    """The speed of `times` over the baseline's: the median of the ratios of neighbouring runs."""
    return round(statistics.median(b / t for b, t in zip(baseline, times, strict=True)), 3)


def speeds(images: int, times: list[float], digits: int | None = None) -> dict:
    """Images/s of runs of so many images, as columns of a row: the median, the slowest, the fastest."""
    found = {"images_per_s": statistics.median(times), "min": max(times), "max": min(times)}
    return {name: round(images / seconds, digits) for name, seconds in found.items()}


def machine(packages: Sequence[str] = ()) -> dict:
    """What a number depends on: `packages` are versions to be told besides the usual ones."""
    dali = next((name for name in _DALI if _version(name) != _NOT_INSTALLED), _DALI[0])
    return {
        "cpu": _cpu(),
        "cores": num_cores(),
        "gpu": _gpu(),
        **_gpu_versions(),
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_PACKAGES, dali, *packages)},
    }


def console() -> Console:
    """For tables: as wide as the terminal, and wide enough where there is none."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=160)


def _cpu() -> str:
    """The model, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _gpu_versions() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    versions = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version()), "triton": _version("triton")}
    return {"driver": driver, **versions}


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _NOT_INSTALLED
