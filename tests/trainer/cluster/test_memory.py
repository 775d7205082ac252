"""Errors about too little memory are recognised; the environment variables in docs/performance.md keep freed memory."""

import os
import platform
import re
import subprocess

import pytest
import torch

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from support.forked_python import executable
from trainer.cluster.memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        UserError("DALI failed on positions [0, 64), not because of an image: cudaErrorMemoryAllocation (2)"),
        UserError(
            "DALI failed on positions [0, 64), not because of an image: Can't allocate 12345678 bytes on device 0."
        ),
        RuntimeError("Error in MIXED operator `nvidia.dali.fn.decoders.image_slice`: CUDA allocation failed"),
    ],
)
def test_errors_about_too_little_memory_are_recognised_and_no_others(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


PAGE_FAULTS = """
import resource, torch
def fill():
    for _ in range(8):
        torch.zeros(16 << 20).add_(1)  # 64 MiB
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables: str) -> int:
    """The page faults of a process that fills eight tensors of 64 MiB one after the other, having done so before."""
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [executable(), "-c", PAGE_FAULTS]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64" or "LD_PRELOAD" in os.environ,
    reason="PyTorch may not use the memory of glibc",
)
def test_the_documented_variables_keep_freed_memory():
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    documented = dict(re.findall(r"\b(MALLOC_[A-Z_]+_)=(-?\d+)", text))
    assert set(documented) == {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}
    assert 2 * page_faults(**documented) < page_faults()
