"""Builds the stand-in with gcc, in a second, and says how a process is started on it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent
_REPOSITORY = _SOURCES.parents[1]
_OF_TORCH = re.compile(r"(cuda[A-Z]|__cuda[A-Z]|cublas)\w+")
# Other allocators than the usual one, which the stand-in does not know, and the ranks of a launcher.
_LEFT_OUT = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def missing() -> str:
    """What the stand-in would need and this machine does not have, "" if nothing."""
    import torch

    try:
        headers = _headers()
    except ImportError:
        return "Triton"
    version = re.search(r"#define CUDART_VERSION +(\d+)", (headers / "cuda_runtime_api.h").read_text())
    if not (torch.version.cuda or "").startswith("13.") or version is None or int(version[1]) // 1000 != 13:
        return "a PyTorch and a Triton that are built for CUDA 13"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h, which Triton compiles its launchers with,"
    return next((tool for tool in ("gcc", "nm") if shutil.which(tool) is None), "")


def build(folder: Path) -> dict[str, str]:
    """Build the stand-in in `folder`; returns the environment for processes that are to find it instead of a GPU.

    What such a process compiles is kept in the folder, too.
    """
    import torch

    headers = _headers()
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_*.so"))
    libraries += (Path(torch.__file__).parent / "lib").glob("libc10_cuda.so")
    used = {name for library in libraries for name in _symbols(library, "--undefined-only", _OF_TORCH)}
    runtime = _compile(folder, "runtime", folder / "libstub.so", used, f"-I{headers}")
    declared = set(re.findall(r"\b(cu[A-Z]\w*)\b", (headers / "cuda.h").read_text()))
    driver = folder / "lib" / "libcuda.so.1"
    driver.parent.mkdir()
    _compile(folder, "driver", driver, declared)
    (driver.parent / "libcuda.so").symlink_to(driver.name)
    return {
        **{name: value for name, value in os.environ.items() if name not in _LEFT_OUT},
        "LD_PRELOAD": _before(str(runtime), "LD_PRELOAD"),
        "LD_LIBRARY_PATH": _before(str(driver.parent), "LD_LIBRARY_PATH"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "CUDA_STUB": str(runtime),
    }


def _headers() -> Path:
    """The folder of CUDA's headers that Triton brings along."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/include"


def _before(value: str, variable: str) -> str:
    """A path in front of those that an environment variable has."""
    return ":".join(filter(None, [value, os.environ.get(variable)]))


def run_tests(environment: dict[str, str], arguments: list[str], **popen) -> subprocess.CompletedProcess:
    """pytest on the tests of this folder, in a process on the stand-in."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(_SOURCES), *arguments]
    return subprocess.run(command, env=environment, cwd=_REPOSITORY, **popen)


def leave_out_cudnn() -> None:
    """For a process on the stand-in, which has no cuDNN: torch uses its own kernels."""
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def _symbols(library: Path, which: str, pattern: re.Pattern) -> set[str]:
    """The dynamic symbols of a library that match, without their versions."""
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    names = (line.split()[-1].split("@")[0] for line in listed.splitlines())
    return {name for name in names if pattern.fullmatch(name)}


def _compile(folder: Path, name: str, library: Path, wanted: set[str], *options: str) -> Path:
    """Compile NAME.c with functions that succeed and do nothing for all wanted names that it lacks."""
    source, rest = _SOURCES / f"{name}.c", folder / f"{name}_rest.c"
    defined = set(re.findall(r"^\w[\w* ]*?(\w+)\(", source.read_text(), re.MULTILINE))
    rest.write_text("".join(f"int {each}() {{ return 0; }}\n" for each in sorted(wanted - defined)))
    command = ["gcc", "-w", "-shared", "-fPIC", "-O1", *options, "-o", str(library), str(source), str(rest), "-ldl"]
    subprocess.run(command, check=True)
    return library
