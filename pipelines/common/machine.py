"""Asks the machine for its cores, versions, home folders, and a folder whose name is short enough for sockets."""

import contextlib
import multiprocessing.util
import os
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.common.errors import UserError, clipped

# A Unix socket's name has at most 107 bytes (sockaddr_un has 108 with the zero at the end); multiprocessing adds this.
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
_sockets = threading.Lock()
# The packages that the numbers of a run depend on.
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "nvidia-dali-cuda120")


# --- cores ---


def num_cores(cgroup: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may use: those of its affinity, and no more than its cgroups' CPU quota, rounded up.

    Args:
      cgroup: where the control groups are mounted; groups: the file that names those of this process.
    Source: the kernel's admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    return min([len(os.sched_getaffinity(0)), *_quotas(cgroup, groups)])


def _quotas(cgroup: Path, groups: Path) -> Iterator[int]:
    """The CPU quotas in cores, each at least 1, of this process's cgroups and all groups above them."""
    for line in _text(groups).splitlines():
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if not controllers:  # This is a group of version 2.
            roots, read = (cgroup, cgroup / "unified"), _quota_v2
        elif "cpu" in controllers.split(","):
            roots, read = (cgroup / controllers, cgroup / "cpu"), _quota_v1
        else:
            continue
        parts = [part for part in group.split("/") if part]
        if ".." in parts:  # The group lies outside of the mounted folders.
            parts = []
        for root in roots:  # In a container the root itself may be this process's group, whatever its name is outside.
            for depth in range(len(parts) + 1):
                quota, period = read(root.joinpath(*parts[:depth]))
                if quota > 0 and period > 0:
                    yield -(-quota // period)


def _quota_v2(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU time, and the microseconds of the clock that they are for; 0 where there is no limit."""
    return _numbers(_text(folder / "cpu.max"))


def _quota_v1(folder: Path) -> tuple[int, int]:
    return _numbers(f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}")


def _numbers(text: str) -> tuple[int, int]:
    try:
        quota, period = map(int, text.split())
    except ValueError:  # It is "max", or there is no such file.
        return 0, 0
    return quota, period


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


# --- versions ---


def package_versions() -> dict[str, str]:
    """The version of each package that the numbers of a run depend on, where it is installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


# --- paths ---


def expanded(path: str | Path) -> Path:
    """Put a user's home folder in place of ~ or ~USER at the beginning of a path, as a shell does.

    Raises:
      UserError: the system knows no such home folder; or no path can have this name.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: a path cannot have a zero byte in it. Write it without")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: the home folder of {Path(path).parts[0]} is not known here. Write the path in full, from / on"
        ) from error


# --- sockets ---


def use_short_socket_names() -> None:
    """Make multiprocessing keep its sockets in a folder whose name is short enough, where TMPDIR's is not.

    multiprocessing makes one folder for its sockets when it first needs it; other temporary files stay in TMPDIR.

    Raises:
      UserError: TMPDIR's name is too long and /tmp cannot be written, or there is no folder for temporary files at all.
    """
    with _sockets:
        usual = tempfile.tempdir
        try:
            if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
                tempfile.tempdir = "/tmp"
            folder, why = os.path.dirname(multiprocessing.util.get_temp_dir()), "its name is too long"
        except OSError as error:
            folder, why = "", f"{error.filename or ''} {error.strerror}".strip()
        finally:
            tempfile.tempdir = usual
    if not folder or len(os.fsencode(folder)) > _LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR is {clipped(os.environ.get('TMPDIR', 'not set'))}: no sockets can be made ({clipped(why)}). "
            f"Set TMPDIR to a folder that can be written and has a name of at most {_LONGEST_TMPDIR} bytes"
        )
