"""What the optimizer keeps of each parameter, and clipping of gradients."""

import copy

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from pipelines.common.errors import UserError
from trainer.config.sections import OptimConfig, parse
from trainer.models.checkpoint_format import OPTIMIZER_TENSORS
from trainer.update.optimizer import build_optimizer, gradient_clipping


def gradients(model: nn.Module) -> torch.Tensor:
    """All of them, one after the other, float64."""
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def with_gradients(name: str, scale: float = 1.0) -> nn.Module:
    """A model with random gradients, of very different sizes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = scale * 10.0 ** (i % 7 - 5) * torch.randn_like(parameter)
    return model


def test_a_checkpoint_takes_what_the_optimizer_keeps_of_each_parameter():
    """Another optimizer fails here unless OPTIMIZER_TENSORS names its tensors."""
    model = with_gradients("test_resnet")
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.step()
    assert all({*state} == {"step", *OPTIMIZER_TENSORS} for state in optimizer.state.values())


def test_nothing_is_clipped_by_default():
    assert gradient_clipping(nn.Linear(2, 2), OptimConfig()) is None


@pytest.mark.parametrize(("scale", "clipped"), [(1.0, True), (1e-8, False)])
def test_the_norm_of_all_gradients_together_is_cut_and_their_direction_kept(scale, clipped):
    model = with_gradients("test_resnet", scale)
    before = gradients(model)
    gradient_clipping(model, OptimConfig(clip_norm=0.5))()
    expected = before * (0.5 / before.norm()) if clipped else before
    assert torch.allclose(gradients(model), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s"])
def test_adaptive_clipping_is_timms_and_leaves_the_classifier_out(name):
    """levit_128s has two classifiers, each with a BatchNorm."""
    model = with_gradients(name)
    expected = copy.deepcopy(model)
    heads = expected.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    left_out = {id(parameter) for head in heads for parameter in head.parameters()}
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
        if id(theirs) not in left_out:
            adaptive_clip_grad(theirs, clip_factor=0.02)
    before = gradients(model)
    gradient_clipping(model, OptimConfig(clip_agc=0.02))()
    assert torch.allclose(gradients(model), gradients(expected), rtol=1e-5, atol=0)
    changed = (gradients(model) != before).double().mean()
    assert 0.1 < changed < 0.9  # some are clipped and some are not
    assert all(parameter.grad.norm() > 0 for head in heads for parameter in head.parameters())


def test_two_ways_of_clipping_at_once_are_refused():
    with pytest.raises(UserError, match="optim.clip_norm is 1.0 and optim.clip_agc is 0.01: set one of them to 0"):
        parse(["--optim.clip_norm", "1", "--optim.clip_agc", "0.01"])
    with pytest.raises(UserError, match="optim.clip_norm is -1.0; it must lie in"):
        parse(["--optim.clip_norm", "-1"])


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [{"clip_norm": 0.5}, {"clip_agc": 0.02}], ids=["norm", "agc"])
def test_clipping_waits_for_nothing(clip):
    model = with_gradients("test_resnet").cuda()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    clip = gradient_clipping(model, OptimConfig(**clip))
    clip()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip()
    finally:
        torch.cuda.set_sync_debug_mode("default")
