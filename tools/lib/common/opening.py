"""Pipelines with the default settings, for tools that compare them. A damaged image ends the tool."""

from typing import Literal

import torch

from pipelines import Pipeline, PipelineConfig, open_pipeline, resolve_decode
from pipelines.shards.index import ShardIndex


def first_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def decode_path(index: ShardIndex, device: torch.device) -> tuple[Literal["roi", "full"], str]:
    """DALI's decode path as a training run would choose it, roi or full, and why."""
    return resolve_decode(PipelineConfig(), index, device)


def opened(
    name: Literal["dali", "torchvision"],
    index: ShardIndex,
    *,
    device: torch.device,
    threads: int,
    decode: Literal["roi", "full"],
    hw_decoder_load: float = PipelineConfig().hw_decoder_load,
) -> Pipeline:
    """A pipeline by name; the last two concern DALI alone. Raises a UserError if it cannot be had here."""
    config = PipelineConfig(pipeline=name, decode=decode, threads=threads, hw_decoder_load=hw_decoder_load)
    return open_pipeline(index, config, device=device)
