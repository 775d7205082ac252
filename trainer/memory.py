"""The host's memory allocator, set for training on CPUs."""

import ctypes

# parameters of mallopt(3), as glibc's malloc.h numbers them
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have this process use freed memory again rather than give it back to the system, where libc is glibc.

    Otherwise glibc asks the system anew for each large tensor, or does not: that depends on what was freed before. An
    update of ResNet-18 then spends up to a tenth of its time on pages that come in and are zeroed
    (docs/performance.md). The price is that a process stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl and macOS have none
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
