"""How fast each stage of a run is on its own, in images/s of the global batch: for tools/doctor.py and the loader's
benchmark.

A stage is a `Turn`: called with a number of updates, it works through as many global batches (this rank's share of
them) and returns its seconds. Every turn and every stage has the same images, in the order of the plan and in whole
global batches: the copies of repeated augmentation lie within one, and only the first of them is decoded.

The stages of a pipeline add up: each does what the one before does, and one thing more. They run through the pipeline
itself, from plans that leave the later stages nothing to do. Starting and ending do not count: a turn takes some
batches before it times the next ones, and lets the pipeline go on with some more while it does.
"""

import collections
import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
import torch.distributed as dist

from pipelines import Pipeline, resolve_pipeline
from pipelines.batch import Batch, BatchMaker
from pipelines.plan.plan import BatchPlan
from pipelines.prefetch import PLANS_AHEAD, look_ahead
from pipelines.shards.damage import CheckedReader
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import places
from pipelines.synthetic import SyntheticPipeline
from tools.lib.common.timing import interleaved, ratio, speeds, synchronize, timed_on_device
from trainer.builder import Run, build
from trainer.cluster.world import World
from trainer.config.sections import TeacherConfig
from trainer.evaluation.predict import num_eval_batches
from trainer.feed import rank_plans, rank_threads
from trainer.monitor.clock import InputWait

READING_COLD, READING = "reading, cold", "reading"
DECODING, RESIZING, PIPELINE = "+ decoding", "+ crop, resize, flip", "+ RandAugment: the pipeline"
TO_DEVICE, TEACHER, STUDENT, ALL_REDUCE, STEP = "host to device", "teacher", "student", "all-reduce", "the step"
WHOLE = "the whole"
ORDER = (READING_COLD, READING, DECODING, RESIZING, PIPELINE, TO_DEVICE, TEACHER, STUDENT, ALL_REDUCE, STEP, WHOLE)
NOTHING = "not-there"  # in a run's folder: where another build finds no checkpoint
IN_WORK = 4  # micro-batches that a pipeline may work on besides those that are ready
_BUCKET_BYTES = 25 << 20  # DDP sends gradients in pieces of this size
_LEAST_UPDATES = 4  # a turn of fewer shows how the threads that decode happen to fall rather than a speed
_SAMPLE_IMAGES = 4096  # of the plan, that all turns go through

Turn = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images/s of the global batch: the median of the turns, the slowest, the fastest."""

    images_per_s: float
    min: float
    max: float


@dataclasses.dataclass(frozen=True)
class Feed:
    """Where a rank's images come from.

    Attributes:
      name: dali or torchvision.
      pipeline: over `index`, on `device`.
      plans: this rank's micro-batches of the first so-many updates that are measured.
      per_update: micro-batches an update.
      prefetch, threads: of the pipeline.
      decode, hw_decoder_load: of DALI.
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
        """Updates that are begun before the first of them is asked for."""
        return math.ceil((self.prefetch + IN_WORK) / self.per_update)


def rates(turns: dict[str, Turn], images: int, seconds: float, world: World, repeats: int = 3) -> dict[str, Rate]:
    """The speed of each stage, measured in turns after a round of warm-up. Every rank must call it.

    Args:
      images: of the global batch.
      seconds: that the timed turns of a stage take together, or longer: a turn is some updates at the least.
    """

    def together(turn: Turn, count: int) -> float:
        world.barrier()
        return max(world.all_gather([turn(count)]))  # the ranks wait for each other in every update

    counts = {}
    for name, turn in turns.items():
        together(turn, 1)
        counts[name] = max(_LEAST_UPDATES, round(seconds / repeats / together(turn, 1)))
    runs = {name: lambda turn=turn, count=counts[name]: together(turn, count) for name, turn in turns.items()}
    return {
        name: Rate(*(images * counts[name] / s for s in (statistics.median(times), max(times), min(times))))
        for name, times in interleaved(runs, repeats, warm_up=False).items()
    }


# --- the stages of a pipeline ---


def input_stages(feed: Feed) -> dict[str, Turn]:
    """From reading to the finished batch; what comes with RandAugment is the pipeline as it is."""
    decoding = _dali_decoding(feed) if feed.name == "dali" else _through_pipeline(feed, _only_decoded)
    stages = {READING_COLD: _reading(feed, cold=True), READING: _reading(feed, cold=False), DECODING: decoding}
    return {**stages, RESIZING: _through_pipeline(feed, _not_operated), PIPELINE: _through_pipeline(feed, _unchanged)}


def input_rows(feeds: dict[str, Feed], images: int, repeats: int) -> list[dict]:
    """Rows of a table for each feed, in turns: every stage's images/s; the ratio is to the pipeline whole.

    Args:
      images: of a turn, rounded up to whole updates.
    """
    updates, runs = {}, {}
    for title, feed in feeds.items():
        size = sum(len(plan) for plan in feed.plans(1))
        updates[title] = (-(-images // size), size)
        runs |= {(title, name): turn for name, turn in input_stages(feed).items()}
    seconds = interleaved(
        {key: lambda key=key, turn=turn: turn(updates[key[0]][0]) for key, turn in runs.items()}, repeats
    )
    rows = []
    for (title, name), times in seconds.items():
        count, size = updates[title]
        row = {"what": name, "augmentation": f"{title}, per stage", **speeds(count * size, times)}
        rows.append({**row, "ratio": ratio(seconds[title, PIPELINE], times), "of": PIPELINE})
    return rows


def drop_from_cache(index: ShardIndex, samples: np.ndarray) -> None:
    """Have the system forget the bytes of samples, as far as it and the file system let themselves be told."""
    by_shard = collections.defaultdict(list)
    for shard, offset, nbytes in places(index, samples):
        by_shard[shard].append((offset, nbytes))
    for shard, spans in by_shard.items():
        file = os.open(index.paths[shard], os.O_RDONLY)
        try:
            for span in spans:
                os.posix_fadvise(file, *span, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _unchanged(plan: BatchPlan) -> BatchPlan:
    return plan


def _not_operated(plan: BatchPlan) -> BatchPlan:
    """Nothing after crop, resize and flip."""
    return dataclasses.replace(plan, ops=np.zeros_like(plan.ops), erase=np.zeros_like(plan.erase))


def _only_decoded(plan: BatchPlan) -> BatchPlan:
    """The torchvision pipeline decodes images whole, so that with one pixel of each little else is left to do."""
    pixel, one = np.zeros_like(plan.crop), np.ones_like(plan.resize)
    pixel[:, 2:] = 1
    changes = {"image_size": 1, "crop": pixel, "resize": one, "window": np.zeros_like(plan.window)}
    return dataclasses.replace(_not_operated(plan), **changes, flip=np.zeros_like(plan.flip))


def _through_pipeline(feed: Feed, change: Callable[[BatchPlan], BatchPlan]) -> Turn:
    def turn(count: int) -> float:
        plans = map(change, feed.plans(1 + feed.ahead + count + feed.ahead))
        with closing(feed.pipeline.batches(plans)) as batches:
            return _timed_batches(feed, batches, count)

    return turn


def _timed_batches(feed: Feed, batches: Iterator, count: int) -> float:
    """Seconds for the batches of `count` updates amid others, all of which are taken."""
    _take(batches, (1 + feed.ahead) * feed.per_update)
    elapsed_s = _timed(lambda: _take(batches, feed.per_update), count)
    _take(batches, feed.ahead * feed.per_update)
    assert next(batches, None) is None  # to the end, so that a graph of DALI's may be used again
    return elapsed_s


def _take(batches: Iterator, count: int) -> None:
    for _ in range(count):
        next(batches)


def _timed(update: Callable[[], object], count: int) -> float:
    def updates() -> None:
        for _ in range(count):
            update()

    return timed_on_device(updates)()


def _reading(feed: Feed, *, cold: bool) -> Turn:
    """As the pipeline reads: ahead in the order of the plan; torchvision's in its threads and each image once."""
    reader = CheckedReader(feed.index, lambda sample, error: None)
    threads = 1 if feed.name == "dali" else feed.threads

    def turn(count: int) -> float:
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
                    collections.deque(pool.map(reader.read, np.array_split(batch, threads)), maxlen=0)
                elapsed_s += time.perf_counter() - start_s
        return elapsed_s

    return turn


def rounds(plans: Iterator[BatchPlan]) -> Iterator[list[BatchPlan]]:
    """The plans up to where their positions begin again, and so on."""
    found: list[BatchPlan] = []
    for plan in plans:
        if found and plan.position <= found[-1].position:
            yield found
            found = []
        found.append(plan)
    yield found


def _once(plans: list[BatchPlan], per_update: int) -> Iterator[np.ndarray]:
    """The samples of each plan that have not come in the same update."""
    for start in range(0, len(plans), per_update):
        seen: set[int] = set()
        for plan in plans[start : start + per_update]:
            new = [sample for sample in dict.fromkeys(plan.sample.tolist()) if sample not in seen]
            seen.update(new)
            yield np.array(new, dtype=np.int32)


def _dali_decoding(feed: Feed) -> Turn:
    """Decoding alone as DaliPipeline's graph does it; its resize cannot be left out by a plan."""
    from nvidia.dali import fn, pipeline_def, types

    from pipelines.dali import _decode

    reader = CheckedReader(feed.index, lambda sample, error: None)
    plans: Iterator[BatchPlan] = iter(())
    alive: collections.deque[tuple] = collections.deque(maxlen=IN_WORK)  # DALI reads the bytes where they are

    def inputs() -> tuple:
        plan = next(plans)
        corner, extent = (np.ascontiguousarray(half) for half in (plan.crop[:, :2], plan.crop[:, 2:]))
        alive.append((reader.read(plan.sample), corner, extent))
        return alive[-1]

    @pipeline_def
    def graph():
        kinds = {"dtype": [types.UINT8, types.INT32, types.INT32], "ndim": [1, 1, 1]}
        nodes = fn.external_source(inputs, num_outputs=3, no_copy=True, **kinds)
        return _decode(*nodes, feed.decode, {"hw_decoder_load": feed.hw_decoder_load} if on_gpu else {})

    on_gpu = feed.device.type == "cuda"
    first = next(feed.plans(1))
    options = {"num_threads": feed.threads, "device_id": (feed.device.index or 0) if on_gpu else None}
    pipeline = graph(batch_size=len(first), prefetch_queue_depth=2, **options)
    pipeline.build()

    def turn(count: int) -> float:
        nonlocal plans
        updates = 1 + feed.ahead + count + feed.ahead
        plans = look_ahead(feed.plans(updates), PLANS_AHEAD, lambda plan: reader.will_need(plan.sample))
        return _timed_batches(feed, _runs(pipeline), count)

    return turn


def _runs(pipeline) -> Iterator[object]:
    """The outputs of a DALI pipeline up to the end of its source; then it can be run again."""
    while True:
        try:
            yield pipeline.run()
        except StopIteration:
            return pipeline.reset()


def to_device(feed: Feed) -> Turn:
    """What goes from the host to a GPU: encoded images for DALI, which decodes there, else finished batches."""
    plans = list(feed.plans(1))
    if feed.name == "dali":
        sizes = [int(feed.index.samples["nbytes"][plan.sample].sum()) for plan in plans]
        encoded = [torch.zeros(nbytes, dtype=torch.uint8).pin_memory() for nbytes in sizes]
        return lambda count: _timed(lambda: [content.to(feed.device, non_blocking=True) for content in encoded], count)
    maker = BatchMaker(feed.index, feed.device)
    pixels = [torch.zeros(len(plan), plan.image_size, plan.image_size, 3, dtype=torch.uint8) for plan in plans]
    return lambda count: _timed(lambda: list(map(maker.make, pixels, plans)), count)


# --- what the device does, and both together ---


def synthetic_batches(run: Run, plans: Callable[[int], Iterator[BatchPlan]]) -> Iterator[Batch]:
    """The micro-batches of one update on the device, with noise for pixels, again and again."""
    return itertools.cycle(list(SyntheticPipeline(run.plan.index, device=run.world.device).batches(plans(1))))


def step_turn(run: Run, plans: Callable[[int], Iterator[BatchPlan]]) -> Turn:
    """The updates of a run on synthetic batches."""
    batches = synthetic_batches(run, plans)
    return lambda count: _timed(lambda: run.step(batches, run.state.step), count)


def without_teacher(run: Run) -> Run:
    """The same run with its student alone, from new weights."""
    config = run.config
    distill = dataclasses.replace(config.distill, label_weight=config.distill.label_weight or 1.0)
    settings = dataclasses.replace(config.run, out=config.run.out / NOTHING, micro_batch=run.state.micro_batch)
    alone = dataclasses.replace(config, teacher=TeacherConfig(name=None), distill=distill, run=settings)
    return build(alone, run.world)


def teacher_turn(run: Run, plans: Callable[[int], Iterator[BatchPlan]]) -> Turn:
    """The teacher's forward passes of an update; its inputs are there already."""
    batch, step = next(synthetic_batches(run, plans)), run.step
    with torch.no_grad():
        inputs = step.inputs(batch).teachers

    @torch.no_grad()
    def update() -> None:
        for _ in range(step.num_micro_batches):
            step.teacher(inputs)

    return lambda count: _timed(update, count)


def all_reduce_turn(run: Run) -> Turn:
    """The gradients of an update, summed over the ranks with nothing else to do meanwhile."""
    total = sum(p.numel() for p in run.state.student.parameters() if p.requires_grad)
    gradients = torch.zeros(total, device=run.world.device).split(_BUCKET_BYTES // 4)

    def update() -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in gradients]:
            work.wait()

    return lambda count: _timed(update, count)


class WholeRun:
    """The whole as a stage: the updates of a run, fed by its pipeline. Nothing is written; the weights change.

    Attributes:
      waits: share of each turn in which the device had no work for want of a batch.
    """

    def __init__(self, run: Run, feed: Feed, *, cold: bool = False):
        self._run, self._feed, self._cold = run, feed, cold
        self.waits: list[float] = []

    def __call__(self, count: int) -> float:
        run, feed = self._run, self._feed
        updates = 1 + feed.ahead + count + feed.ahead
        if self._cold:
            drop_from_cache(feed.index, np.concatenate([plan.sample for plan in feed.plans(updates)]))
        run.set_learning_rate(run.state.step)
        with closing(feed.pipeline.batches(feed.plans(updates))) as batches:
            watched = InputWait(batches, run.world.device)
            for _ in range(1 + feed.ahead):
                run.step(watched, run.state.step)
            synchronize()
            watched.take_s()
            elapsed_s = _timed(lambda: run.step(watched, run.state.step), count)
            self.waits.append(watched.take_s() / elapsed_s)
            _take(batches, feed.ahead * feed.per_update)
        return elapsed_s


def plans_of_size(run: Run, size: int, *, again: bool = True) -> Callable[[int], Iterator[BatchPlan]]:
    """This rank's micro-batches of so many updates with images of `size` px, from the run's next update on.

    Args:
      again: begin again after some thousand images, so that all turns have the same; the copies of an image that a
        pipeline keeps are used up by then. Without it the updates go on to the end of that size.
    """
    per_epoch = run.plan.steps_per_epoch
    epochs = [epoch for epoch in range(run.config.schedule.total_epochs) if run.plan.image_size_at(epoch) == size]
    stop = (epochs[-1] + 1) * per_epoch
    epoch = next((epoch for epoch in epochs if (epoch + 1) * per_epoch > run.state.step), epochs[-1])  # not over yet
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


def evaluation_seconds(run: Run, images: int, seconds: float) -> float:
    """How long an evaluation of the run takes, from about `seconds` of it; a short one is gone through.

    Every rank must call it.

    Args:
      images: of the validation set.
    """
    batches = num_eval_batches(images, run.config.run.eval_batch, run.world)
    _, elapsed_s, done = _evaluated(run, 2)  # warm-up
    most = run.world.broadcast_object(max(2, round(seconds / elapsed_s * done)))
    starting_s, elapsed_s, done = _evaluated(run, most)
    return starting_s + elapsed_s / done * batches


def _evaluated(run: Run, most: int) -> tuple[float, float, int]:
    """Seconds until the first batch of an evaluation is there, and then for the next ones; how many, `most` of them."""
    stamps: list[float] = []

    def enough() -> bool:
        if len(stamps) in (0, most):  # at other times the host does not wait for the device
            synchronize()
        stamps.append(time.perf_counter())
        return len(stamps) > most

    start_s = time.perf_counter()
    complete = bool(run.evaluate(interrupted=enough))
    synchronize()
    end_s = time.perf_counter() if complete else stamps[-1]
    return stamps[0] - start_s, end_s - stamps[0], min(len(stamps), most)
