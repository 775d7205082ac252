"""The stages of a pipeline, each alone: from reading to the finished batch.

They add up: each does what the one before does, and one thing more. They run through the pipeline itself, from plans
that leave the later stages nothing to do. Starting and ending do not count: a timed run takes some batches before it
times the next ones, and lets the pipeline work on some more meanwhile.
"""

import collections
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch

from pipelines import resolve_pipeline
from pipelines.batch import BatchMaker
from pipelines.plan.plan import BatchPlan
from pipelines.prefetch import PLANS_AHEAD, look_ahead
from pipelines.shards.damage import CheckedReader
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import places
from tools.lib.common.timing import BATCHES_IN_WORK
from tools.lib.doctor.stages import DECODING, PIPELINE, READING, READING_COLD, RESIZING, Stage, take, timed_updates
from trainer.builder import Run
from trainer.feed import batches_of, rank_plans, rank_threads

_SAMPLE_IMAGES = 4096  # All timed runs go through this many images of the plan.
Plans = Callable[[int], Iterator[BatchPlan]]  # a number of updates -> this rank's micro-batches of as many


def pipeline_of(run: Run) -> str:
    """The name of the run's pipeline: dali, torchvision or synthetic."""
    return resolve_pipeline(run.config.data.pipeline, run.world.device)


def updates_ahead(run: Run) -> int:
    """How many updates the pipeline works on before the first of them is asked for."""
    return math.ceil((run.config.data.prefetch + BATCHES_IN_WORK) / run.step.num_micro_batches)


def plans_of_size(run: Run, size: int, *, again: bool = True) -> Plans:
    """A function that gives this rank's micro-batches of any number of updates, from the run's next update on.

    Args:
      size: of the images, pixels.
      again: begin again after some thousand images, so that all timed runs have the same; the copies of an image
        that a pipeline keeps are used up by then. Without it the updates continue to the end of that size.
    """
    per_epoch, num_epochs = run.plan.steps_per_epoch, run.config.schedule.total_epochs
    epochs = range(run.state.step // per_epoch, num_epochs)
    begin = next(epoch for epoch in epochs if run.plan.image_size_at(epoch) == size)
    end = next((epoch for epoch in range(begin, num_epochs) if run.plan.image_size_at(epoch) != size), num_epochs)
    first, stop = max(run.state.step, begin * per_epoch), end * per_epoch
    if again:
        enough = max(-(-2 * PLANS_AHEAD // run.step.num_micro_batches), -(-_SAMPLE_IMAGES // run.plan.global_batch))
        stop = min(stop, first + enough)

    def plans(count: int) -> Iterator[BatchPlan]:
        while count > 0:
            updates = min(count, stop - first)
            yield from rank_plans(run.plan, first, first + updates, run.world, run.state.micro_batch)
            count -= updates

    return plans


def input_stages(run: Run, plans: Plans) -> dict[str, Stage]:
    """The stages from reading to the finished batch; the last one, with RandAugment, is the pipeline itself."""
    stages = {READING_COLD: _reading(run, plans, cold=True), READING: _reading(run, plans, cold=False)}
    if pipeline_of(run) == "torchvision":  # No plan can leave out the resize of DALI's graph.
        stages[DECODING] = _through_pipeline(run, plans, _only_decoded)
    stages[RESIZING] = _through_pipeline(run, plans, _not_operated)
    return {**stages, PIPELINE: _through_pipeline(run, plans, lambda plan: plan)}


def drop_from_cache(index: ShardIndex, samples: np.ndarray) -> None:
    """Drop the bytes of samples from the page cache, as far as the system and the file system allow it."""
    by_shard = collections.defaultdict(list)
    for shard, offset, nbytes in places(index, samples):
        by_shard[shard].append((offset, nbytes))
    for shard, spans in by_shard.items():
        with open(index.paths[shard], "rb") as file:
            for offset, nbytes in spans:
                os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def _not_operated(plan: BatchPlan) -> BatchPlan:
    """The plan without what comes after crop, resize and flip."""
    return dataclasses.replace(plan, ops=np.zeros_like(plan.ops), erase=np.zeros_like(plan.erase))


def _only_decoded(plan: BatchPlan) -> BatchPlan:
    """The plan with one pixel of each image: the torchvision pipeline decodes all of it, and little else remains."""
    pixel, one = np.zeros_like(plan.crop), np.ones_like(plan.resize)
    pixel[:, 2:] = 1
    changes = {"image_size": 1, "crop": pixel, "resize": one, "window": np.zeros_like(plan.window)}
    return dataclasses.replace(_not_operated(plan), **changes, flip=np.zeros_like(plan.flip))


def _through_pipeline(run: Run, plans: Plans, change: Callable[[BatchPlan], BatchPlan]) -> Stage:
    per_update, ahead = run.step.num_micro_batches, updates_ahead(run)

    def stage(count: int) -> float:
        changed = map(change, plans(1 + ahead + count + ahead))
        with closing(batches_of(run.pipelines.of["train"], changed)) as batches:
            take(batches, (1 + ahead) * per_update)
            elapsed_s = timed_updates(lambda: take(batches, per_update), count)
            take(batches, ahead * per_update)
            assert next(batches, None) is None  # A graph of DALI can be used again only after its end.
            return elapsed_s

    return stage


def _reading(run: Run, plans: Plans, *, cold: bool) -> Stage:
    """Read ahead in the plan's order, in as many threads as the pipeline does; each image of an update once."""
    reader = CheckedReader(run.plan.index, lambda sample, error: None)
    threads = 1 if pipeline_of(run) == "dali" else rank_threads(run.config.data, run.world)
    per_update = run.step.num_micro_batches

    def stage(count: int) -> float:
        elapsed_s, planned = 0.0, plans(count)
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(count):
                update = np.concatenate([plan.sample for plan in itertools.islice(planned, per_update)])
                samples = np.array(list(dict.fromkeys(update.tolist())), dtype=np.int32)
                if cold:
                    drop_from_cache(run.plan.index, samples)
                start_s = time.perf_counter()
                for batch in look_ahead(np.array_split(samples, per_update), PLANS_AHEAD, reader.will_need):
                    list(pool.map(reader.read, np.array_split(batch, threads)))
                elapsed_s += time.perf_counter() - start_s
        return elapsed_s

    return stage


def to_device(run: Run, plans: Plans) -> Stage:
    """Copy to the GPU: encoded images for DALI, which decodes there, otherwise finished batches."""
    index, device, update = run.plan.index, run.world.device, list(plans(1))
    if pipeline_of(run) == "dali":
        sizes = [int(index.samples["nbytes"][plan.sample].sum()) for plan in update]
        encoded = [torch.zeros(nbytes, dtype=torch.uint8).pin_memory() for nbytes in sizes]
        return lambda count: timed_updates(lambda: [each.to(device, non_blocking=True) for each in encoded], count)
    maker = BatchMaker(index, device)
    pixels = [torch.zeros(len(plan), plan.image_size, plan.image_size, 3, dtype=torch.uint8) for plan in update]
    return lambda count: timed_updates(lambda: list(map(maker.make, pixels, update)), count)
