"""Validation on several ranks: real processes, a validation set that no number of ranks divides."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist

from conftest import REPOSITORY, TINY
from pipelines.batch import Batch
from pipelines.plan.plan import BatchPlan, EvalPlan
from pipelines.shards.index import read_index
from support.forked_python import executable
from support.processes import without_workers
from tools.lib.common.photos import write_digits
from tools.lib.shards.build import BuildOptions, build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.evaluation.predict import EvalPass
from trainer.feed import open_configured_pipeline
from trainer.models.normalize import Normalize

IMAGES = 1003  # 17 x 59: neither ranks nor batches divide it
SIZES = (1, 2, 3, 4)


@dataclasses.dataclass
class Noting:
    """A pipeline that notes which samples the batches that it hands over show, the filled-up rows left out."""

    pipeline: object
    samples: list[int]

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        plans = list(plans)
        for plan, batch in zip(plans, self.pipeline.batches(plans), strict=True):
            self.samples += plan.sample[batch.valid.numpy()].tolist()
            yield batch


def evaluate_as(rank: int, dataset: Path, folder: Path) -> None:
    """What one process does: it takes part in a world of each size that has room for it, one after the other."""
    torch.set_num_threads(1)
    index = read_index(dataset, "val")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    pipeline = open_configured_pipeline(
        parse(TINY).data, index, world=World(0, 1, 1, torch.device("cpu")), decode="roi", on_bad=_fail
    )
    for size in (size for size in SIZES if size > rank):
        world = World(rank, size, size, torch.device("cpu"))
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/join-{size}", rank=rank, world_size=size)
        noting = Noting(pipeline, [])
        plan, normalize = EvalPlan(index, 32, 0.95, "bicubic"), Normalize((0.5,) * 3, (0.5,) * 3)
        metrics = EvalPass(normalize, noting, plan, 32, torch.float32, world).accuracy({"raw": model})
        if size > 1:
            dist.destroy_process_group()
        found = {"metrics": metrics["raw"], "samples": noting.samples}
        (folder / f"rank-{rank}-of-{size}.json").write_text(json.dumps(found))


def _fail(sample: int, reason: str) -> None:
    raise AssertionError(f"sample {sample}: {reason}")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank found, by the number of ranks."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_digits(folder / "images", num_train=10, num_val=IMAGES)
    with without_workers():
        build(folder / "images", folder / "dataset", BuildOptions(samples_per_shard=300))
    # a fresh interpreter, which imports everything once and forks the ranks before it has a thread
    command = [executable(), __file__, str(folder / "dataset"), str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {
        size: [json.loads((folder / f"rank-{rank}-of-{size}.json").read_text()) for rank in range(size)]
        for size in SIZES
    }


@pytest.mark.parametrize("size", SIZES)
def test_each_of_1003_images_is_counted_once(found, size):
    counted = [sample for rank in found[size] for sample in rank["samples"]]
    assert len(counted) == IMAGES and sorted(counted) == list(range(IMAGES))
    assert all(rank["metrics"]["images"] == IMAGES for rank in found[size])


@pytest.mark.parametrize("size", SIZES)
def test_counts_and_loss_are_those_of_one_rank(found, size):
    (alone,) = (rank["metrics"] for rank in found[1])
    assert 0 < alone["top1"] < alone["top5"] < 100
    for rank in found[size]:
        for name in ("top1", "top5"):  # These are quotients of integers.
            assert rank["metrics"][name] * IMAGES / 100 == pytest.approx(round(alone[name] * IMAGES / 100), abs=1e-9)
        assert rank["metrics"] == alone  # the loss, too: it is summed in the order of the samples


def main(dataset: Path, folder: Path) -> None:
    """All ranks, as forks of this process."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=evaluate_as, args=(rank, dataset, folder)) for rank in range(max(SIZES))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
