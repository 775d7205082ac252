"""What students that are trained in one process share: the batches of their plan, and what the teacher says of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch

from pipelines.batch import Batch, Pipeline
from pipelines.common.errors import UserError
from pipelines.plan.plan import BatchPlan
from trainer.builder import Run
from trainer.config.natures import flat, setting_natures, settings_of_plan_field
from trainer.config.sections import Config
from trainer.feed import batches_of, open_configured_pipeline, rank_plans
from trainer.models.teacher import RecordedTeacher, Teachers
from trainer.targets.codec import open_codec
from trainer.targets.replay import open_stores, with_recorded_settings
from trainer.update.inputs import teacher_inputs

# Besides what concerns the images and the teacher: what all models on a device have in common, and what the teacher's
# logits depend on.
_SHARED = ("run.device", "run.precision", "run.tf32", "run.channels_last", "run.compile")


class SharedBatches(Pipeline):
    """Gives several students the batches of one plan, each of which is made when the first student asks for it.

    The batches of one update are kept. No student may ask for the next update before all others have had them.

    Args:
      open_at: makes the batches of the plan from an update on.
      per_update: how many of them an update has.
      global_batch: as in the plan.
    """

    def __init__(self, open_at: Callable[[int], Generator[Batch, None, None]], per_update: int, global_batch: int):
        self._open_at, self._per_update, self._global_batch = open_at, per_update, global_batch
        self._source: Generator[Batch, None, None] | None = None
        self._step, self._kept = -1, []  # The number of the update whose batches are kept.

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batches from the update of the first plan on; the other plans are not looked at."""
        step = next(iter(plans)).position // self._global_batch
        while True:
            yield from (self._batch(step, number) for number in range(self._per_update))
            step += 1

    def _batch(self, step: int, number: int) -> Batch:
        if step != self._step:
            if self._source is None or step != self._step + 1:  # A student may go back to its checkpoint.
                self.close()
                self._source = self._open_at(step)
            self._step, self._kept = step, []
        if number == len(self._kept):
            assert self._source is not None
            try:
                self._kept.append(next(self._source))
            except BaseException:
                self.close()  # The next student that asks tries again.
                raise
        return self._kept[number]

    def close(self) -> None:
        """Stop what prepares further batches."""
        if self._source is not None:
            self._source.close()
        self._source, self._step, self._kept = None, -1, []


def heard(run: Run) -> Teachers | None:
    """What stands for a run's teachers in all students: it takes their logits, as float32, for a recording."""
    if run.step.teachers is None:
        return None
    codec = open_codec("fp32", run.plan.index.num_classes)
    note = "; ".join(run.step.teachers.notes)
    return Teachers([RecordedTeacher(codec.decode, codec.row_bytes, note)], run.config.distill.temperature)


def connect(runs: Sequence[Run]) -> SharedBatches:
    """Make the runs take their images from one pipeline, and their targets from the teachers of the first run."""
    first = runs[0]
    plan, world, replay = first.plan, first.world, first.replay
    micro_batch, per_update = first.state.micro_batch, first.step.num_micro_batches
    teachers, teacher = first.step.teachers, first.step.teacher
    of, stop = _pipelines(runs, per_update), max(run.stop for run in runs)

    @torch.no_grad()
    def taught(batch: Batch) -> Batch:
        if teachers is None or teacher is None:
            return batch
        logits = teacher(teacher_inputs(teachers, batch)).float().contiguous()
        return dataclasses.replace(batch, targets=(logits.view(torch.uint8),))

    def open_at(step: int) -> Generator[Batch, None, None]:
        plans = rank_plans(plan, step, stop, world, micro_batch)
        with contextlib.closing(batches_of(of["train"], plans, replay)) as batches:
            yield from map(taught, batches)

    shared = SharedBatches(open_at, per_update, plan.global_batch)
    first.step.learn_from(heard(first))
    for run in runs:
        run.pipelines, run.replay = dataclasses.replace(run.pipelines, of={**of, "train": shared}), None
        if run.evaluate is not None:
            images = dataclasses.replace(run.evaluate.images, pipeline=of["val"])
            run.evaluate = dataclasses.replace(run.evaluate, images=images)
    return shared


def _pipelines(runs: Sequence[Run], per_update: int) -> dict[str, Pipeline]:
    """A pipeline over each split, which reports damaged samples to all runs."""
    first = runs[0]
    indices = {"train": first.plan.index} | ({"val": first.evaluate.images.plan.index} if first.evaluate else {})
    # The loader works on the next update while all students make this one.
    data = dataclasses.replace(first.config.data, prefetch=max(first.config.data.prefetch, per_update))
    found = {}
    for split, index in indices.items():
        collectors = [run.pipelines.quarantine.collector(split) for run in runs]

        def on_bad(sample: int, error: str, collectors=collectors) -> None:
            for collect in collectors:
                collect(sample, error)

        decode = first.pipelines.decode["decode"]
        found[split] = open_configured_pipeline(data, index, world=first.world, decode=decode, on_bad=on_bad)
    return found


def check_configs(configs: Sequence[Config]) -> None:
    """Raise a UserError if students of these configurations cannot be trained together."""
    configs = [with_recorded_settings(config, open_stores(config.teacher)) for config in configs]
    outs = [config.run.out.absolute() for config in configs]
    first = configs[0]
    of_plan = {name for name, nature in setting_natures().items() if nature.plan_field and name[:8] != "student."}
    shared = {*_SHARED, *of_plan} - {"augment.fill"}  # It may be the students' mean colour: see `check_runs`.
    if len(first.teacher.members) > 1:  # The mean of their probabilities is taken at this temperature.
        shared.add("distill.temperature")
    for config, out in zip(configs, outs, strict=True):
        if outs.count(out) > 1:
            raise UserError(f"run.out is {config.run.out} for {outs.count(out)} students: give each its own folder")
        if "wandb" in config.run.loggers and len(configs) > 1:
            raise UserError(
                f"run.loggers of {config.run.out} has wandb, which has one run in a process: leave it out, or train "
                "this student alone"
            )
        values = zip(flat(first).items(), flat(config).values(), strict=True)
        for (name, expected), found in values:
            if name in shared or name.startswith(("data.", "teacher.")):
                _check_equal(name, first, expected, config, found)


def check_runs(first: Run, other: Run) -> None:
    """Raise a UserError if two runs have other plans, or divide a batch in other ways."""
    found = other.plan.describe()
    for name, expected in first.plan.describe().items():
        _check_equal(settings_of_plan_field(name), first.config, expected, other.config, found[name])
    _check_equal("run.micro_batch", first.config, first.state.micro_batch, other.config, other.state.micro_batch)


def _check_equal(name: str, first: Config, expected: Any, other: Config, found: Any) -> None:
    if found != expected:
        raise UserError(
            f"{name} is {expected} for {first.run.out} and {found} for {other.run.out}: students that are trained "
            "together share it. Give both the same, or train them one after the other"
        )
