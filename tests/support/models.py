"""Models as tests need them."""

import timm
import torch
from torch import nn

from trainer.evaluation.trained import EvalTransform, TrainedModel


def with_statistics(model: nn.Module, size: int) -> nn.Module:
    """A model in evaluation whose BatchNorms are not the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


# This one has a single stage, which attends within windows, so its tensors have five dimensions. Nothing is pooled.
HIERA = {
    **{"img_size": [32, 32], "embed_dim": 8, "num_heads": 1, "stages": [1], "q_pool": 0},
    **{"mask_unit_size": [4, 4], "mask_unit_attn": [True]},
}


def tiny_hiera() -> TrainedModel:
    """A Hiera of ten classes with random weights."""
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", num_classes=10, **HIERA).eval().requires_grad_(False)
    nn.init.normal_(model.head.fc.weight)
    return TrainedModel(model, "hiera_tiny_224", HIERA, EvalTransform(32, 0.9, "center", "bicubic"), None, "hiera.pt")


def logits(model) -> torch.Tensor:
    """The logits [2, classes] of two images that are the same in every call."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)
