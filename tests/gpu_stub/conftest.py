"""These tests are for a process on the stand-in alone."""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from gpu_stub.build import leave_out_cudnn

collect_ignore_glob = [] if "CUDA_STUB" in os.environ else ["test_*.py"]
if "CUDA_STUB" in os.environ:
    assert "stand-in" in torch.cuda.get_device_name(), (
        "PyTorch did not take the stand-in: is it linked to its own CUDA?"
    )
    leave_out_cudnn()


@pytest.fixture
def no_host_sync() -> Callable[[], contextlib.AbstractContextManager]:
    return _no_host_sync


@contextlib.contextmanager
def _no_host_sync() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device is a RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
