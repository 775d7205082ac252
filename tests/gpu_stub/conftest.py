"""These tests are for a process on the stand-in alone."""

import os

import pytest
import torch

from gpu_stub.build import leave_out_cudnn

collect_ignore_glob = [] if "CUDA_STUB" in os.environ else ["test_*.py"]
if "CUDA_STUB" in os.environ:
    leave_out_cudnn()


class HostSyncError:
    """Inside the block, whatever makes the host wait for the device is a RuntimeError."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_host_sync() -> HostSyncError:
    return HostSyncError()
