"""Plans carried out by an executor, and datasets with a damaged image: what several tests of pipelines/ share."""

import dataclasses
import functools
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Pipeline, PipelineConfig, open_pipeline
from pipelines.dali_probe import probe_decode
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader
from tools.lib.common.photos import photographs

CPU = torch.device("cpu")
NO_OPS = AugmentConfig(mix_group=5, randaugment_ops=0)
EVERYTHING = AugmentConfig(mix_group=5, three_augment=True, color_jitter=0.3, erase_prob=0.5)


def train_plan(index: ShardIndex, augment: AugmentConfig = NO_OPS, size: int = 96, seed: int = 0) -> TrainPlan:
    return TrainPlan(index, augment, seed, global_batch=10, image_size=size, fill=(124, 116, 104))


def plans_of(plan: TrainPlan, count: int, batch: int = 10, first: int = 0) -> list[BatchPlan]:
    return [plan.rows(first + i * batch, first + (i + 1) * batch) for i in range(count)]


def opened(name: str, index: ShardIndex, *, device: torch.device = CPU, **options) -> Pipeline:
    on_damage = options.pop("on_damage", lambda sample, error: pytest.fail(f"{sample}: {error}"))
    config = PipelineConfig(pipeline=name, **{"threads": 2, "decode": "roi", **options})
    return open_pipeline(index, config, device=device, on_damage=on_damage)


def pixels(name: str, index: ShardIndex, plans: list[BatchPlan], **options) -> np.ndarray:
    batches = list(opened(name, index, **options).batches(plans))
    for batch, plan in zip(batches, plans, strict=True):
        assert batch.images.shape == (len(plan), plan.image_size, plan.image_size, 3)
        assert batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
        assert batch.position == plan.position and batch.mix_group == plan.mix_group
        assert batch.labels.tolist() == index.samples["label"][plan.sample].tolist()
        for field in ("lam", "box", "valid"):
            assert np.array_equal(getattr(batch, field).numpy(), getattr(plan, field))
    return np.concatenate([batch.images.numpy() for batch in batches])


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return abs(a.astype(int) - b.astype(int))


def jpeg_of(index: ShardIndex) -> np.ndarray:
    return ShardReader(index).read(np.array([0]))[0]


@functools.cache
def works_on_gpu() -> str:
    """DALI's decode path that can be trusted with this process: the other one may end it."""
    jpeg = io.BytesIO()
    photographs()[0][1].save(jpeg, "JPEG")
    return probe_decode("cuda:0", np.frombuffer(jpeg.getvalue(), np.uint8), PipelineConfig())[0]


def on_gpu(name: str, index: ShardIndex, plans: list[BatchPlan], **options) -> np.ndarray:
    options.setdefault("decode", works_on_gpu())
    batches = list(opened(name, index, device=torch.device("cuda", 0), **options).batches(plans))
    torch.cuda.synchronize()
    return np.concatenate([batch.images.cpu().numpy() for batch in batches])


def overwritten(digits: Path, root: Path, row: int, content: bytes | None, **fields) -> ShardIndex:
    """A copy of the dataset in which a sample has other bytes, unless None, and its index row other values."""
    shutil.copytree(digits, root)
    index = read_index(root, "train")
    samples = index.samples.copy()
    place = samples[row]
    if content is not None:
        with open(index.paths[place["shard"]], "r+b") as file:
            file.seek(int(place["offset"]))
            file.write(content.ljust(int(place["nbytes"]), b"\0"))
    for name, value in fields.items():
        samples[name][row] = value
    return dataclasses.replace(index, samples=samples, audited=False)


def recording(reported: list[tuple[int, str]]) -> Callable[[int, str], None]:
    return lambda sample, error: reported.append((sample, error))


BAD = 7
