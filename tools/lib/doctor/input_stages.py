"""The stages of a pipeline, each alone: from reading to the finished batch.

They add up: each does what the one before does, and one thing more. They run through the pipeline itself, from plans
that leave the later stages nothing to do. Starting and ending do not count: a timed run takes some batches before it
times the next ones, and lets the pipeline work on some more meanwhile.
"""

import collections
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch

from pipelines import Pipeline, resolve_pipeline
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


@dataclasses.dataclass(frozen=True)
class Feed:
    """The input of a rank.

    Attributes:
      name: dali or torchvision.
      pipeline: over `index`, on `device`.
      plans: called with a number of updates, gives this rank's micro-batches of the first ones that are measured.
      per_update: micro-batches an update.
      prefetch, threads: settings of the pipeline.
      decode, hw_decoder_load: settings of DALI.
    """

    name: str
    index: ShardIndex
    pipeline: Pipeline
    device: torch.device
    plans: Callable[[int], Iterator[BatchPlan]]
    per_update: int
    prefetch: int
    threads: int
    decode: str
    hw_decoder_load: float

    @property
    def ahead(self) -> int:
        """How many updates the pipeline works on before the first of them is asked for."""
        return math.ceil((self.prefetch + BATCHES_IN_WORK) / self.per_update)


def plans_of_size(run: Run, size: int, *, again: bool = True) -> Callable[[int], Iterator[BatchPlan]]:
    """A function that gives this rank's micro-batches of any number of updates, from the run's next update on.

    Args:
      size: of the images, pixels.
      again: begin again after some thousand images, so that all timed runs have the same; the copies of an image
        that a pipeline keeps are used up by then. Without it the updates continue to the end of that size.
    """
    per_epoch = run.plan.steps_per_epoch
    epochs = [epoch for epoch in range(run.config.schedule.total_epochs) if run.plan.image_size_at(epoch) == size]
    stop = (epochs[-1] + 1) * per_epoch
    epoch = next((epoch for epoch in epochs if (epoch + 1) * per_epoch > run.state.step), epochs[-1])
    first = min(max(run.state.step, epoch * per_epoch), stop - 1)
    stop = next((other for other in range(epoch, epochs[-1] + 2) if other not in epochs), epochs[-1] + 1) * per_epoch
    if again:
        enough = max(-(-2 * PLANS_AHEAD // run.step.num_micro_batches), -(-_SAMPLE_IMAGES // run.plan.global_batch))
        stop = min(stop, first + enough)

    def plans(count: int) -> Iterator[BatchPlan]:
        while count > 0:
            updates = min(count, stop - first)
            yield from rank_plans(run.plan, first, first + updates, run.world, run.state.micro_batch)
            count -= updates

    return plans


def feed_of(run: Run, plans: Callable[[int], Iterator[BatchPlan]]) -> Feed:
    """The input of a run."""
    data, world = run.config.data, run.world
    return Feed(
        name=resolve_pipeline(data.pipeline, world.device),
        index=run.plan.index,
        pipeline=run.pipelines.of["train"],
        device=world.device,
        plans=plans,
        per_update=run.step.num_micro_batches,
        prefetch=data.prefetch,
        threads=rank_threads(data, world),
        decode=run.pipelines.decode["decode"],
        hw_decoder_load=data.hw_decoder_load,
    )


def input_stages(feed: Feed) -> dict[str, Stage]:
    """The stages from reading to the finished batch; the last one, with RandAugment, is the pipeline itself."""
    decoding = _dali_decoding(feed) if feed.name == "dali" else _through_pipeline(feed, _only_decoded)
    stages = {READING_COLD: _reading(feed, cold=True), READING: _reading(feed, cold=False), DECODING: decoding}
    return {**stages, RESIZING: _through_pipeline(feed, _not_operated), PIPELINE: _through_pipeline(feed, _unchanged)}


def drop_from_cache(index: ShardIndex, samples: np.ndarray) -> None:
    """Drop the bytes of samples from the page cache, as far as the system and the file system allow it."""
    by_shard = collections.defaultdict(list)
    for shard, offset, nbytes in places(index, samples):
        by_shard[shard].append((offset, nbytes))
    for shard, spans in by_shard.items():
        file = os.open(index.paths[shard], os.O_RDONLY)
        try:
            for offset, nbytes in spans:
                os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _unchanged(plan: BatchPlan) -> BatchPlan:
    return plan


def _not_operated(plan: BatchPlan) -> BatchPlan:
    """The plan without what comes after crop, resize and flip."""
    return dataclasses.replace(plan, ops=np.zeros_like(plan.ops), erase=np.zeros_like(plan.erase))


def _only_decoded(plan: BatchPlan) -> BatchPlan:
    """The plan with one pixel of each image: the torchvision pipeline decodes all of it, and little else remains."""
    pixel, one = np.zeros_like(plan.crop), np.ones_like(plan.resize)
    pixel[:, 2:] = 1
    changes = {"image_size": 1, "crop": pixel, "resize": one, "window": np.zeros_like(plan.window)}
    return dataclasses.replace(_not_operated(plan), **changes, flip=np.zeros_like(plan.flip))


def _through_pipeline(feed: Feed, change: Callable[[BatchPlan], BatchPlan]) -> Stage:
    def stage(count: int) -> float:
        plans = map(change, feed.plans(1 + feed.ahead + count + feed.ahead))
        with closing(batches_of(feed.pipeline, plans)) as batches:
            return _timed_batches(feed, batches, count)

    return stage


def _timed_batches(feed: Feed, batches: Iterator, count: int) -> float:
    """Seconds for the batches of `count` updates, with others before and after them."""
    take(batches, (1 + feed.ahead) * feed.per_update)
    elapsed_s = timed_updates(lambda: take(batches, feed.per_update), count)
    take(batches, feed.ahead * feed.per_update)
    assert next(batches, None) is None  # A graph of DALI can be used again only after its end.
    return elapsed_s


def _reading(feed: Feed, *, cold: bool) -> Stage:
    """Read ahead in the plan's order, as the pipeline does; torchvision's reads each image once, in its threads."""
    reader = CheckedReader(feed.index, lambda sample, error: None)
    threads = 1 if feed.name == "dali" else feed.threads

    def stage(count: int) -> float:
        elapsed_s = 0.0
        with ThreadPoolExecutor(threads) as pool:
            for plans in rounds(feed.plans(count)):
                batches = (
                    [plan.sample for plan in plans] if feed.name == "dali" else list(_once(plans, feed.per_update))
                )
                if cold:
                    drop_from_cache(feed.index, np.concatenate(batches))
                start_s = time.perf_counter()
                for batch in look_ahead(batches, PLANS_AHEAD, reader.will_need):
                    for _ in pool.map(reader.read, np.array_split(batch, threads)):
                        pass
                elapsed_s += time.perf_counter() - start_s
        return elapsed_s

    return stage


def rounds(plans: Iterator[BatchPlan]) -> Iterator[list[BatchPlan]]:
    """The plans in groups, a new one where their positions begin again."""
    found: list[BatchPlan] = []
    for plan in plans:
        if found and plan.position <= found[-1].position:
            yield found
            found = []
        found.append(plan)
    yield found


def _once(plans: list[BatchPlan], per_update: int) -> Iterator[np.ndarray]:
    """The samples of each plan that no earlier plan of the same update has."""
    for start in range(0, len(plans), per_update):
        seen: set[int] = set()
        for plan in plans[start : start + per_update]:
            new = [sample for sample in dict.fromkeys(plan.sample.tolist()) if sample not in seen]
            seen.update(new)
            yield np.array(new, dtype=np.int32)


def _dali_decoding(feed: Feed) -> Stage:
    """Decoding alone as DaliPipeline's graph does it, because no plan can leave out that graph's resize."""
    from nvidia import dali

    from pipelines import dali as ours

    untyped: Any = dali  # DALI adds most names when it is imported, so its type stubs lack them.
    fn, types = untyped.fn, untyped.types
    reader = CheckedReader(feed.index, lambda sample, error: None)
    plans: Iterator[BatchPlan] = iter(())
    alive: collections.deque[tuple] = collections.deque(maxlen=BATCHES_IN_WORK)  # DALI reads the bytes in place.

    def inputs() -> tuple:
        plan = next(plans)
        corner, extent = (np.ascontiguousarray(half) for half in (plan.crop[:, :2], plan.crop[:, 2:]))
        alive.append((reader.read(plan.sample), corner, extent))
        return alive[-1]

    @untyped.pipeline_def
    def graph():
        kinds = {"dtype": [types.UINT8, types.INT32, types.INT32], "ndim": [1, 1, 1]}
        jpeg, corner, extent = fn.external_source(inputs, num_outputs=3, no_copy=True, **kinds)
        return ours._decode(
            jpeg, corner, extent, feed.decode, {"hw_decoder_load": feed.hw_decoder_load} if on_gpu else {}
        )

    on_gpu = feed.device.type == "cuda"
    first = next(feed.plans(1))
    options = {"num_threads": feed.threads, "device_id": (feed.device.index or 0) if on_gpu else None}
    pipeline = graph(batch_size=len(first), prefetch_queue_depth=2, **options)
    pipeline.build()

    def stage(count: int) -> float:
        nonlocal plans
        updates = 1 + feed.ahead + count + feed.ahead
        plans = look_ahead(feed.plans(updates), PLANS_AHEAD, lambda plan: reader.will_need(plan.sample))
        return _timed_batches(feed, _runs(pipeline), count)

    return stage


def _runs(pipeline) -> Iterator[object]:
    """The outputs of a DALI pipeline up to the end of its source, after which it can be run again."""
    while True:
        try:
            yield pipeline.run()
        except StopIteration:
            return pipeline.reset()


def to_device(feed: Feed) -> Stage:
    """Copy to the GPU: encoded images for DALI, which decodes there, otherwise finished batches."""
    plans = list(feed.plans(1))
    if feed.name == "dali":
        sizes = [int(feed.index.samples["nbytes"][plan.sample].sum()) for plan in plans]
        encoded = [torch.zeros(nbytes, dtype=torch.uint8).pin_memory() for nbytes in sizes]
        return lambda count: timed_updates(
            lambda: [content.to(feed.device, non_blocking=True) for content in encoded], count
        )
    maker = BatchMaker(feed.index, feed.device)
    pixels = [torch.zeros(len(plan), plan.image_size, plan.image_size, 3, dtype=torch.uint8) for plan in plans]
    return lambda count: timed_updates(lambda: list(map(maker.make, pixels, plans)), count)
