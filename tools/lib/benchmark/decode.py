"""DALI's decode paths: which of them work on this machine, and how many training batches a second each makes.

A path is tried in a process of its own first, as a run tries it (pipelines/dali_probe.py), since decoding regions has
been seen to end the process. Then the recipe's batches are made with it: read, decoded, cropped, resized and augmented.
What is known to be safe comes first, so that a path which fails on whole batches only costs no other row.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.common.machine import num_cores
from pipelines.dali_probe import decode_failure
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader
from tools.lib.benchmark.loader import SIZE_PX, batch_seconds
from tools.lib.common.opening import first_device, opened
from tools.lib.common.photos import write_common_photographs
from tools.lib.common.timing import speeds
from tools.lib.shards.build import BuildOptions, build

COLUMNS = {"what": "what", "works": "works", "images_per_s": "images/s", "min": "min", "max": "max"}
_LEAD = 8  # batches before those that count: DALI's queues are full by then
_COUNTED = 16  # batches of a turn


def decode(images: int, batch: int, repeats: int) -> Iterator[dict]:
    """The rows: each decode path, on a GPU with its JPEG engine and without; "note" says why one does not work."""
    with tempfile.TemporaryDirectory() as scratch:
        write_common_photographs(Path(scratch) / "src", images)
        build(Path(scratch) / "src", Path(scratch) / "out", BuildOptions(), workers=num_cores())
        index, device = read_index(Path(scratch) / "out", "train"), first_device()
        (jpeg,) = ShardReader(index).read(np.array([0]))
        loads = (1.0, 0.0) if device.type == "cuda" else (0.0,)
        for path, load in itertools.product(("full", "roi"), loads):
            row = {"what": f"{path}, hw_decoder_load {load:g}"}
            if reason := decode_failure(str(device), jpeg, path, load):
                yield {**row, "works": "no", "note": f"does not work: {reason}"}
            else:
                open_batches = functools.partial(_batches, index, min(batch, images), device, path, load)
                times = [batch_seconds(open_batches, _LEAD, _COUNTED) for _ in range(repeats)]
                yield {**row, "works": "yes", **speeds(_COUNTED * min(batch, images), times)}


def _batches(index: ShardIndex, batch: int, device: torch.device, path: str, load: float) -> Iterator[torch.Tensor]:
    """Endless batches of the recipe's, without repeats: with them DALI would decode no less."""
    plan = TrainPlan(index, AugmentConfig(mix_group=batch, repeats=1), 0, batch, SIZE_PX, fill=(124, 116, 104))
    plans = (plan.rows(start, start + batch) for start in itertools.count(0, batch))
    pipeline = opened("dali", index, device=device, threads=num_cores(), decode=path, hw_decoder_load=load)
    for made in pipeline.batches(plans):
        yield made.images
