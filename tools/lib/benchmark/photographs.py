"""Photographs as a dataset for a benchmark."""

from pathlib import Path

from pipelines.common.machine import num_cores
from pipelines.shards.index import ShardIndex, read_index
from tools.lib.benchmark.runs import CLASSES
from tools.lib.common.photos import write_common_photographs
from tools.lib.shards.build import BuildOptions, build


def photograph_index(folder: Path, count: int, samples_per_shard: int) -> ShardIndex:
    """Write photographs as files into FOLDER/src and as shards into FOLDER/data, and open the shards."""
    write_common_photographs(folder / "src", count, CLASSES)
    build(folder / "src", folder / "data", BuildOptions(samples_per_shard=samples_per_shard), workers=num_cores())
    return read_index(folder / "data", "train")
