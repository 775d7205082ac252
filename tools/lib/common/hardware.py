"""The device that commands use, and what a measured number depends on: processor, cores, GPU, driver, packages."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.common.machine import num_cores

if TYPE_CHECKING:  # Commands that need no torch start faster without it.
    import torch

Machine = dict[str, str | int]  # "cpu", "cores", "gpu", "python", and the version of each package
_PACKAGES = ("pillow", "numpy", "torch", "torchvision", "timm", "webdataset", "ffcv")
_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")  # One of the two is enough.
_NOT_INSTALLED = "not installed"


def first_device() -> "torch.device":
    """The GPU if there is one, otherwise the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(packages: Sequence[str] = ()) -> Machine:
    """Describe this machine; `packages` are listed besides the usual ones."""
    dali = next((name for name in _DALI if _version(name) != _NOT_INSTALLED), _DALI[0])
    return {
        "cpu": _cpu(),
        "cores": num_cores(),
        "gpu": _gpu(),
        **_gpu_versions(),
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_PACKAGES, dali, *packages)},
    }


def _cpu() -> str:
    """The processor's model where the system names it, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _gpu_versions() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    cuda, cudnn = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return {"driver": driver, "cuda": cuda, "cudnn": cudnn, "triton": _version("triton")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _NOT_INSTALLED
