"""BatchNorm folded into convolutions: the same outputs, and nothing folded that anybody else reads."""

import pytest
import timm
import torch
from torch import nn

from support.models import with_statistics
from trainer.models.fold_batch_norm import fold_batch_norms


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("test_resnet", 64, 0),
        ("tresnet_v2_l", 64, 0),
        ("mobilenetv3_small_050", 64, 0),
        ("tf_efficientnet_b0", 64, 0),  # Conv2dSame
        ("regnety_002", 64, 0),
        ("hrnet_w18_small", 64, 0),
        ("levit_128s", 224, 0),  # its other BatchNorms, after matrix products, are one-dimensional
        ("repvgg_a0", 64, 17),  # those that stand beside a convolution and not behind one
        ("densenet121", 64, 62),  # those that read what several layers gave
        ("test_vit", 160, 0),
    ],
)
def test_a_folded_model_gives_the_same_logits(name, size, left):
    model = with_statistics(timm.create_model(name), size).double()  # float32 rounds more in some models than others
    images, before = torch.randn(2, 3, size, size, dtype=torch.float64), num_norms(model)
    with torch.no_grad():
        expected = model(images)
        assert fold_batch_norms(model, torch.zeros_like(images[:1])) == before - left
        found = model(images)
    assert num_norms(model) == left
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


class Shared(nn.Module):
    """A convolution whose output is read twice, and one BatchNorm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in "abc")
        self.norm_a, self.norm_bc = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images):
        a = self.a(images)
        return self.norm_a(a) + a.relu() + self.norm_bc(self.b(images)) + self.norm_bc(self.c(images))


def test_what_others_read_too_is_not_folded():
    model = with_statistics(Shared(), 8)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    assert fold_batch_norms(model, images) == 0 and torch.equal(model(images), expected)


def test_a_convolution_that_changes_its_weights_on_the_way_is_not_folded():
    from timm.layers import ScaledStdConv2d

    model = with_statistics(nn.Sequential(ScaledStdConv2d(3, 4, 3), nn.BatchNorm2d(4)), 8)
    assert fold_batch_norms(model, torch.randn(1, 3, 8, 8)) == 0


class TwoNames(nn.Module):
    """A BatchNorm that is found under two names."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.again = self.norm

    def forward(self, images):
        return self.again(self.convolution(images))


class ByKeyword(TwoNames):
    def __init__(self):
        super().__init__()
        del self.again

    def forward(self, images):
        return self.norm(input=self.convolution(images))


@pytest.mark.parametrize("make", [TwoNames, ByKeyword])
def test_what_is_uncertain_is_not_folded(make):
    model = with_statistics(make(), 8)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    assert fold_batch_norms(model, images) == 0 and torch.equal(model(images), expected)
