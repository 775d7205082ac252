"""Which versions of other packages a run's numbers come from."""

import contextlib
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "nvidia-dali-cuda120")


def package_versions() -> dict[str, str]:
    """The version of each package that is installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
