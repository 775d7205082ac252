"""The BatchNorm layers of a model and their running statistics."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pipelines.common.errors import UserError
from trainer.cluster.world import World


def batch_norms(model: nn.Module) -> list[_NormBase]:
    """The layers of a model that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running mean and variance of each layer of `batch_norms`, float [channels] each; no other buffers."""
    statistics = []
    for norm in batch_norms(model):
        assert norm.running_mean is not None and norm.running_var is not None
        statistics += [norm.running_mean, norm.running_var]
    return statistics


def batch_counters(model: nn.Module) -> list[torch.Tensor]:
    """The number of batches that each layer of `batch_norms` has counted, int64 scalars."""
    return [norm.num_batches_tracked for norm in batch_norms(model) if norm.num_batches_tracked is not None]


def synchronize_batch_norms(model: nn.Module, world: World) -> nn.Module:
    """The model with SyncBatchNorm layers, which share parameters and buffers with the ones they replace.

    On one rank, or without BatchNorm, there is nothing to do.

    Raises:
      UserError: several ranks on CPUs.
    """
    if world.size == 1 or not batch_norms(model):
        return model
    if world.device.type != "cuda":
        raise UserError(
            f"run.batch_norm is sync with {world.size} ranks on CPUs, and PyTorch has SyncBatchNorm on GPUs alone: use "
            "run.batch_norm reduce, or one rank with a larger run.micro_batch"
        )
    return convert_sync_batchnorm(model)
