"""TensorFloat-32."""

import pytest
import torch

from support.tiny_runs import all_equal, build_here, first_batches
from trainer.update.precision import allow_tf32


def tf32_flags() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.fixture
def restored_tf32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("restored_tf32")
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions_so_that_it_can_be_read(allowed):
    """torch.compile reads it, and some ways to set it make that an error."""
    allow_tf32(allowed)
    assert tf32_flags() == [allowed] * 2


def test_tf32_changes_nothing_on_a_cpu(digits, tmp_path):
    before, states = tf32_flags(), []
    for allowed in ("true", "false"):
        run = build_here(digits, tmp_path, "--run.tf32", allowed)
        assert tf32_flags() == before
        run.step(iter(first_batches(run, 1)), 0)
        states.append(list(run.state.student.state_dict().values()))
    assert all_equal(*states)
