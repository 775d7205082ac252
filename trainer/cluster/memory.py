"""The host's memory: how it is allocated in training on CPUs, and whether an error says that it is too short."""

import ctypes
import os

import torch

# parameters of mallopt(3), as glibc's malloc.h numbers them
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have this process use freed memory again rather than give it back to the system, where PyTorch has it of glibc.

    Otherwise glibc asks the system anew for each large tensor, or does not: that depends on what was freed before. An
    update of ResNet-18 then spends up to 7 % of its time on pages that come in and are zeroed (docs/performance.md).
    The price is that a process stays as large as it once was, and that each thread that decodes keeps the memory of its
    largest images.

    Nothing is changed where the environment sets glibc's allocator: GLIBC_TUNABLES, or any variable MALLOC_*.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl and macOS have none
        return
    mallopt(_MMAP_MAX, 0)  # a higher M_MMAP_THRESHOLD would not do: some versions allow 32 MiB at the most
    mallopt(_TRIM_THRESHOLD, -1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory: Python and PyTorch have types for it, PyTorch on CPUs, cuBLAS, cuDNN and
    DALI only have words.
    """
    words = ("out of memory", "memoryallocation", "alloc_failed", "bad_alloc", "can't allocate", "allocation failed")
    types = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, types) or any(word in str(error).lower() for word in words)
