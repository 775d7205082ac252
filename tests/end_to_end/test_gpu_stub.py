"""The GPU path on a machine without a GPU: the tests in tests/gpu_stub pass on a CUDA without a device."""

import pytest

from gpu_stub.build import build, missing, run_tests


@pytest.mark.skipif(bool(missing()), reason=f"{missing()} is missing")
def test_the_gpu_path_holds_on_a_cuda_without_a_device(tmp_path):
    """All of them but the long ones, in one process; `make gpu-stub` runs those, too."""
    ended = run_tests(build(tmp_path), ["-q", "--no-header"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
