"""Pipelines with the default settings, for tools that compare them. A damaged image ends the tool."""

import torch

from pipelines import Pipeline, open_pipeline
from pipelines.dali_probe import probe_dataset
from pipelines.shards.damage import raise_on_damage
from pipelines.shards.index import ShardIndex
from trainer.config.sections import DataConfig


def first_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def decode_path(index: ShardIndex, device: torch.device) -> tuple[str, str]:
    """DALI's decode path as a training run would choose it, roi or full, and why."""
    if device.type == "cpu":
        return "roi", "it works"
    return probe_dataset(index, str(device), DataConfig().hw_decoder_load)


def opened(
    name: str,
    index: ShardIndex,
    *,
    device: torch.device,
    threads: int,
    decode: str,
    hw_decoder_load: float = DataConfig().hw_decoder_load,
) -> Pipeline:
    """A pipeline by name; the last two concern DALI alone. Raises a UserError if it cannot be had here."""
    defaults = DataConfig()
    return open_pipeline(
        name,
        index,
        device=device,
        threads=threads,
        prefetch=defaults.prefetch,
        decode=decode,
        hw_decoder_load=hw_decoder_load,
        decoder_padding_mib=defaults.decoder_padding_mib,
        on_bad=raise_on_damage(index),
    )
