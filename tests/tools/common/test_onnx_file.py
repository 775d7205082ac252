"""The difference between the logits of a model and of its file."""

import pytest
import torch

from tools.lib.common.onnx_file import Difference, largest_difference


def test_a_difference_is_of_the_largest_logit_and_nan_is_never_small():
    images = torch.ones(2, 3, 1, 1)
    found = largest_difference(lambda x: -10 * x, lambda x: -10 * x - 0.002 * (len(x) > 1), images)
    assert found.absolute == pytest.approx(0.002, rel=1e-3) and found.relative == pytest.approx(2e-4, rel=1e-3)
    assert not found.is_small and Difference(9e-4, 10).is_small
    assert not largest_difference(lambda x: x, lambda x: x * torch.nan, images).is_small
