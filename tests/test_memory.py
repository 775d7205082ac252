"""Freed memory is used again by a process that trains on a CPU."""

import subprocess
import sys

import pytest

# The dynamic threshold of glibc grows up to 32 MiB with what is freed: tensors beyond that always come anew.
_PAGE_FAULTS = """
import resource, torch
{call}
def fill():
    for _ in range(4):
        torch.zeros(16 << 20).add_(1)  # 64 MiB
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(call: str) -> int:
    """Of a process that fills four tensors of 64 MiB one after the other, having done so before."""
    command = [sys.executable, "-c", _PAGE_FAULTS.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_pages_do_not_come_anew_for_each_large_tensor():
    join = "from trainer.distributed import join_world; join_world('cpu').__enter__()"
    assert page_faults("") > 1000  # 65,536 of 4 KiB, fewer with huge pages
    assert page_faults(join) < 100
