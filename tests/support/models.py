"""Models as tests need them."""

import torch
from torch import nn


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
