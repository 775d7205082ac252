"""Opens the executor that a `PipelineConfig` names."""

import dataclasses
from typing import Literal

import torch

from pipelines.batch import Pipeline
from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores
from pipelines.config import PipelineConfig
from pipelines.dali_probe import probe_dataset
from pipelines.shards.damage import OnDamage, raise_on_damage
from pipelines.shards.index import ShardIndex


def open_pipeline(
    index: ShardIndex,
    config: PipelineConfig | None = None,
    *,
    device: torch.device | str = "auto",
    on_damage: OnDamage | None = None,
) -> Pipeline:
    """An executor over a split. It imports only what it needs, so a machine without DALI can use the others.

    Args:
      index: where the samples lie.
      config: how plans are carried out; PipelineConfig() by default. Fields that are left open are resolved here.
      device: where the batches go; auto is the current GPU if there is one.
      on_damage: called with (sample, what is wrong) once for each sample that is replaced by gray. By default the
        first damaged sample raises a UserError.
    Raises:
      UserError: DALI is not installed or does not work.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.empty(0, device=device).device  # A GPU without a number is the current one.
    config = config or PipelineConfig()
    config = dataclasses.replace(config, threads=config.threads or num_cores())
    on_damage = on_damage or raise_on_damage(index)
    name = resolve_pipeline(config.pipeline, device)
    if name == "synthetic":
        from pipelines.synthetic import SyntheticPipeline

        return SyntheticPipeline(index, device=device)
    if name == "torchvision":
        from pipelines.cpu import TorchvisionPipeline

        return TorchvisionPipeline(index, config, device=device, on_damage=on_damage)
    try:
        from pipelines.dali import DaliPipeline
    except ImportError as error:
        raise UserError(
            f"the pipeline is 'dali', which cannot be imported ({error}): pip install nvidia-dali-cuda120 in the "
            f"version that setup.cfg names, or use {config.option('pipeline', 'torchvision')}"
        ) from error
    decode, _ = resolve_decode(config, index, device)
    return DaliPipeline(index, dataclasses.replace(config, decode=decode), device=device, on_damage=on_damage)


def resolve_pipeline(
    name: Literal["auto", "dali", "torchvision", "synthetic"], device: torch.device
) -> Literal["dali", "torchvision", "synthetic"]:
    """The executor that 'auto' stands for: DALI with a GPU, torchvision without."""
    if name != "auto":
        return name
    return "dali" if device.type == "cuda" else "torchvision"


def resolve_decode(
    config: PipelineConfig, index: ShardIndex, device: torch.device
) -> tuple[Literal["roi", "full"], str]:
    """DALI's decode path that 'auto' stands for, and why. On a GPU another process tries it, which takes seconds."""
    if config.decode != "auto":
        return config.decode, "it was chosen"
    return probe_dataset(index, str(device), config) if device.type == "cuda" else ("roi", "it works")
