"""Asks the machine for its cores, versions, home folders, and a folder whose name is short enough for sockets."""

import contextlib
import multiprocessing.util
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.common.errors import UserError

# A Unix socket's name has at most 107 bytes (sockaddr_un has 108 with the zero at the end); multiprocessing adds this.
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
# The packages that the numbers of a run depend on.
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "nvidia-dali-cuda120")


# --- cores ---


def num_cores(cgroup: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may use: those of its affinity, and no more than its cgroup's CPU quota, rounded up.

    Args:
      cgroup: where the control groups of version 2 are mounted; groups: the file that names that of this process.
    Source: the kernel's admin-guide/cgroup-v2.rst (cpu.max).
    """
    cores = len(os.sched_getaffinity(0))
    line = groups.read_text(errors="replace") if groups.exists() else ""
    own = cgroup / line.rpartition("0::")[2].strip().lstrip("/")
    # In a container the root itself, the last of the groups above, may be this process's group.
    for folder in (own, *own.parents):
        try:
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            cores = min(cores, max(1, -(-quota // period)))
        except (OSError, ValueError, ZeroDivisionError):  # There is no quota.
            continue
    return cores


def part_of_cores(number: int, parts: int) -> set[int]:
    """The numbers of the cores in one of equal parts of those that this process may use, at least one."""
    cores = sorted(os.sched_getaffinity(0))
    begin = number * len(cores) // parts
    return {*cores[begin : begin + max(1, num_cores() // parts)]}  # A CPU quota may allow fewer.


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
      UserError: the system knows no such home folder.
    """
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
    """
    usual = tempfile.tempdir
    try:
        if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
            tempfile.tempdir = "/tmp"
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual
