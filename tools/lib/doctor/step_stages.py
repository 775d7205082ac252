"""The stages on the device, each alone, and the complete run: its updates fed by its pipeline."""

import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np
import torch
import torch.distributed as dist

from pipelines.batch import Batch
from pipelines.common.files import open_regular
from pipelines.plan.plan import BatchPlan
from pipelines.synthetic import SyntheticPipeline
from tools.lib.common.timing import synchronize
from tools.lib.doctor.input_stages import Plans, drop_from_cache, updates_ahead
from tools.lib.doctor.stages import NOTHING, Stage, take, timed_updates
from trainer.builder import Run, build
from trainer.config.sections import TeacherConfig
from trainer.evaluation.predict import num_eval_batches
from trainer.feed import batches_of
from trainer.monitor.clock import InputWait
from trainer.targets.replay import Replay

_BUCKET_BYTES = 25 << 20  # DDP sends gradients in pieces of this size.


def synthetic_batches(run: Run, plans: Plans) -> Iterator[Batch]:
    """The micro-batches of one update on the device, with noise for pixels, without end."""
    batches = SyntheticPipeline(run.plan.index, device=run.world.device).batches(plans(1))
    return itertools.cycle(list(map(run.step.with_blank_targets, batches)))


def step_stage(run: Run, plans: Plans) -> Stage:
    """The updates of a run on synthetic batches."""
    batches = synthetic_batches(run, plans)
    return lambda count: timed_updates(lambda: run.step(batches, run.state.step), count)


def without_teacher(run: Run) -> Run:
    """The same run with its student alone, from new weights."""
    config = run.config
    distill = dataclasses.replace(config.distill, label_weight=config.distill.label_weight or 1.0)
    settings = dataclasses.replace(config.run, out=config.run.out / NOTHING, micro_batch=run.state.micro_batch)
    alone = dataclasses.replace(config, teacher=TeacherConfig(name=None), distill=distill, run=settings)
    return build(alone, run.world)


def teacher_stage(run: Run, plans: Plans) -> Stage:
    """The teacher's forward passes of an update; its inputs lie on the device already."""
    batch, step = next(synthetic_batches(run, plans)), run.step
    assert step.teachers is not None  # Otherwise there is nothing to measure.
    teachers = step.teachers
    with torch.no_grad():
        inputs = step.inputs(batch).teachers

    @torch.no_grad()
    def update() -> None:
        for _ in range(step.num_micro_batches):
            teachers(inputs)

    return lambda count: timed_updates(update, count)


def store_stage(run: Run, plans: Plans) -> Stage:
    """Reading the targets of recorded teachers from storage: a run reads each of them once."""
    assert run.replay is not None  # Otherwise there is nothing to read.
    replay = run.replay

    def stage(count: int) -> float:
        planned = list(plans(count))
        drop_targets_from_cache(replay, planned)
        start_s = time.perf_counter()
        for plan in planned:
            replay.read(plan)
        return time.perf_counter() - start_s

    return stage


def drop_targets_from_cache(replay: Replay, plans: Iterable[BatchPlan]) -> None:
    """Drop the pieces that hold the rows of plans from the page cache, as far as the file system allows it."""
    positions = np.unique(replay.plan.views(np.concatenate([plan.positions for plan in plans])))
    for store in replay.stores:
        places = zip(*(each.tolist() for each in np.divmod(positions, store.header.global_batch)), strict=True)
        for piece in {piece for step, row in places for piece in store.coverage.holding(step, row)}:
            with open(open_regular(store.folder / piece.name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def all_reduce_stage(run: Run) -> Stage:
    """The gradients of an update, summed over the ranks while nothing else is computed."""
    total = sum(p.numel() for p in run.state.student.parameters() if p.requires_grad)
    gradients = torch.zeros(total, device=run.world.device).split(_BUCKET_BYTES // 4)

    def update() -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in gradients]:
            work.wait()

    return lambda count: timed_updates(update, count)


class WholeRun:
    """The complete run as a stage: its updates, fed by its pipeline. It writes nothing, but the weights change.

    Attributes:
      waits: the fraction of each timed run in which the device had no work because no batch was ready.
    """

    def __init__(self, run: Run, plans: Plans, *, cold: bool = False):
        self._run, self._plans, self._cold = run, plans, cold
        self.waits: list[float] = []

    def __call__(self, count: int) -> float:
        """Seconds for `count` updates."""
        run, ahead = self._run, updates_ahead(self._run)
        updates = 1 + ahead + count + ahead
        if self._cold:
            drop_from_cache(run.plan.index, np.concatenate([plan.sample for plan in self._plans(updates)]))
        if run.replay is not None:
            drop_targets_from_cache(run.replay, self._plans(updates))
        run.set_learning_rate(run.state.step)
        with closing(batches_of(run.pipelines.of["train"], self._plans(updates), run.replay)) as batches:
            watched = InputWait(batches, run.world.device)
            for _ in range(1 + ahead):
                run.step(watched, run.state.step)
            synchronize()
            watched.take_s()
            elapsed_s = timed_updates(lambda: run.step(watched, run.state.step), count)
            self.waits.append(watched.take_s() / elapsed_s)
            take(batches, ahead * run.step.num_micro_batches)
        return elapsed_s


def evaluation_seconds(run: Run, seconds: float) -> float:
    """How long an evaluation of the run takes, judged by about `seconds` of it; a shorter one is run completely.

    Every rank must call it.
    """
    assert run.evaluate is not None  # Otherwise there is nothing to evaluate.
    batches = num_eval_batches(len(run.evaluate.images.plan.index), run.config.run.eval_batch, run.world)
    _, elapsed_s, done = _evaluated(run, 2)  # The first evaluation warms up.
    most = run.world.broadcast_object(max(2, round(seconds / elapsed_s * done)))
    starting_s, elapsed_s, done = _evaluated(run, most)
    return starting_s + elapsed_s / done * batches


def _evaluated(run: Run, most: int) -> tuple[float, float, int]:
    """Seconds until an evaluation's first batch, seconds for the next ones, and how many these were, at most `most`."""
    stamps: list[float] = []

    def enough() -> bool:
        if len(stamps) in (0, most):  # Otherwise the host does not wait for the device.
            synchronize()
        stamps.append(time.perf_counter())
        return len(stamps) > most

    assert run.evaluate is not None  # Otherwise there is nothing to measure.
    start_s = time.perf_counter()
    complete = bool(run.evaluate(interrupted=enough))
    synchronize()
    end_s = time.perf_counter() if complete else stamps[-1]
    return stamps[0] - start_s, end_s - stamps[0], min(len(stamps), most)
