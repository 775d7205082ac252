"""DALI's decode paths: which of them work on this machine, and how many training batches a second each makes.

A path is first tried in a process of its own, as a run tries it (pipelines/dali_probe.py), because decoding regions has
been seen to end the process. Then it makes the recipe's batches: read, decoded, cropped, resized and augmented. The
paths that are known to be safe come first, so that one which fails only on complete batches costs no other row.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipelines import PipelineConfig, open_pipeline
from pipelines.common.machine import num_cores
from pipelines.dali_probe import decode_failure
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import ShardReader
from tools.lib.benchmark.loader import SIZE_PX, Images, batch_seconds
from tools.lib.benchmark.photographs import endless, photograph_index, recipe_plan
from tools.lib.benchmark.results import Row
from tools.lib.common.hardware import first_device
from tools.lib.common.timing import speeds

_Path = Literal["full", "roi"]
_PATHS: tuple[_Path, ...] = ("full", "roi")
COLUMNS = {"what": "what", "works": "works", "images_per_s": "images/s", "min": "min", "max": "max"}
_LEAD = 8  # DALI's queues are full after this many batches, which do not count.
_COUNTED = 16  # A timed run makes this many batches.


def decode(images: int, batch: int, repeats: int) -> Iterator[Row]:
    """The rows: each decode path, on a GPU with its JPEG engine and without; "note" says why one does not work."""
    with tempfile.TemporaryDirectory() as scratch:
        index, device = photograph_index(Path(scratch), images), first_device()
        (jpeg,) = ShardReader(index).read(np.array([0]))
        loads = (1.0, 0.0) if device.type == "cuda" else (0.0,)
        for path, load in itertools.product(_PATHS, loads):
            row: Row = {"what": f"{path}, hw_decoder_load {load:g}"}
            if reason := decode_failure(str(device), jpeg, path, load):
                yield {**row, "works": "no", "note": f"does not work: {reason}"}
            else:
                open_batches = functools.partial(_batches, index, min(batch, images), device, path, load)
                times = [batch_seconds(open_batches, _LEAD, _COUNTED) for _ in range(repeats)]
                yield {**row, "works": "yes", **speeds(_COUNTED * min(batch, images), times)}


def _batches(index: ShardIndex, batch: int, device: torch.device, path: _Path, load: float) -> Images:
    """Endless batches of the recipe without repeats; with repeats DALI would decode as many images."""
    plans = endless(recipe_plan(index, batch, SIZE_PX), batch)
    config = PipelineConfig(pipeline="dali", threads=num_cores(), decode=path, hw_decoder_load=load)
    pipeline = open_pipeline(index, config, device=device)
    for made in pipeline.batches(plans):
        yield made.images
