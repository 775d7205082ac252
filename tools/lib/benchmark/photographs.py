"""Photographs as a dataset for a benchmark, and batches of the recipe's augmentations over them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.machine import num_cores
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from tools.lib.common.photos import write_common_photographs
from tools.lib.shards.build import BuildOptions, build

_FILL = (124, 116, 104)  # ImageNet's mean colour


def photograph_index(
    folder: Path, count: int, *, classes: int = 10, samples_per_shard: int = BuildOptions().samples_per_shard
) -> ShardIndex:
    """Write photographs as files into FOLDER/src and as shards into FOLDER/data, and open the shards."""
    write_common_photographs(folder / "src", count, classes)
    options = BuildOptions(samples_per_shard=samples_per_shard)
    build(folder / "src", folder / "data", options, workers=num_cores())
    return read_index(folder / "data", "train")


def recipe_plan(
    index: ShardIndex, batch: int, size: int, *, augment: AugmentConfig | None = None, global_batch: int | None = None
) -> TrainPlan:
    """The plan of seed 0 with batches that are each a mixing group of their own.

    Args:
      augment: the recipe without repeated augmentation, unless something else is given.
    """
    augment = augment or AugmentConfig(mix_group=batch, repeats=1)
    return TrainPlan(index, augment, 0, global_batch or batch, size, fill=_FILL)


def endless(plan: TrainPlan, batch: int) -> Iterator[BatchPlan]:
    """The plan's batches from the first on, without end."""
    return (plan.rows(start, start + batch) for start in itertools.count(0, batch))
