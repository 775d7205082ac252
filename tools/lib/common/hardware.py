"""The device that commands use, and what a measured number depends on: processor, cores, GPU, driver, packages."""

import importlib.util
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores

if TYPE_CHECKING:  # Commands that need no torch start faster without it.
    import torch

Machine = dict[str, str | int]  # "cpu", "cores", "gpu", "python", and the version of each package
_PACKAGES = (
    *("pillow", "numpy", "torch", "torchvision", "timm", "webdataset", "ffcv"),
    *("nvidia-dali-cuda120", "nvidia-dali-cuda130"),  # One of the two is enough.
)

INSTALL_BACKENDS = "pip install -e '.[compare]'"
# The backends whose speed tools/compare.py measures: the package that each needs, and the command that installs it.
BACKEND_PACKAGES = {
    "openvino": ("openvino", INSTALL_BACKENDS),
    "onnxruntime": ("onnxruntime", INSTALL_BACKENDS),
    "tensorrt": ("tensorrt", "pip install tensorrt"),
    "compiled": ("torch", ""),
    "eager": ("torch", ""),
}


def check_backend(name: str) -> None:
    """Raise a UserError if there is no such backend, or what it needs is not installed."""
    if name not in BACKEND_PACKAGES:
        raise UserError(f"'{name}' is no backend. Name some of {', '.join(BACKEND_PACKAGES)}")
    package, command = BACKEND_PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{name} is not installed. Run: {command}")


def first_device() -> "torch.device":
    """The GPU if there is one, otherwise the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(packages: Sequence[str] = ()) -> Machine:
    """Describe this machine; `packages` are listed besides the usual ones."""
    versions = {name: _version(name) for name in (*_PACKAGES, *packages)}
    return {"cpu": _cpu(), "cores": num_cores(), **_gpu(), "python": platform.python_version(), **versions}


def _cpu() -> str:
    """The processor's model where the system names it, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _gpu() -> dict[str, str]:
    """The GPU's name, "none" without one, and what its numbers depend on."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": "none"}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
