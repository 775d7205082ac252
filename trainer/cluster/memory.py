"""Recognises errors that say that memory is too short."""

import torch

_WORDS = ("out of memory", "memoryallocation", "alloc_failed", "bad_alloc", "can't allocate", "allocation failed")


def is_out_of_memory(error: BaseException) -> bool:
    """True if there was too little memory.

    Python and PyTorch have types for it on GPUs; PyTorch on CPUs, cuBLAS, cuDNN and DALI only say it in words.
    """
    types = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, types) or any(word in str(error).lower() for word in _WORDS)
