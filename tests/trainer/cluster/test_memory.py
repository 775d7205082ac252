"""Freed memory is used again by a process that trains on a CPU."""

import os
import platform
import subprocess

import pytest

from support.forked_python import executable

# The dynamic threshold of glibc grows up to 32 MiB with what is freed: tensors beyond that always come anew.
_PAGE_FAULTS = """
import resource, torch
{call}
def fill():
    for _ in range(8):
        torch.zeros(16 << 20).add_(1)  # 64 MiB
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_JOIN = "from trainer.cluster.world import join_world; join_world('cpu').__enter__()"
_ALONE = "from trainer.cluster.world import alone; alone()"

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64" or "LD_PRELOAD" in os.environ,
    reason="PyTorch may have its memory of something else than glibc",
)


def page_faults(call: str, **variables: str) -> int:
    """Of a process that fills eight tensors of 64 MiB one after the other, having done so before."""
    command = [executable(), "-c", _PAGE_FAULTS.format(call=call)]
    untold = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    untold["CUDA_VISIBLE_DEVICES"] = ""
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=untold | variables).stdout)


@pytest.fixture(scope="module")
def usual() -> int:
    """Page faults with the allocator as it is."""
    return page_faults("")


@pytest.mark.parametrize("call", [_JOIN, _ALONE])
def test_pages_do_not_come_anew_for_each_large_tensor(usual, call):
    assert 2 * page_faults(call) < usual  # a small one may have come to lie in the way of the next


def test_an_allocator_that_was_set_is_left_alone(usual):
    assert 2 * page_faults(_JOIN, MALLOC_PERTURB_="0") > usual
