"""What students that are trained in one process share: the batches of their plan, and the teachers' logits of them."""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch

from pipelines.batch import Batch, Pipeline
from pipelines.common.errors import UserError
from pipelines.plan.plan import BatchPlan
from trainer.builder import Run
from trainer.config.natures import flat, plan_settings, setting_natures, settings_of_plan_field
from trainer.config.sections import Config
from trainer.feed import batches_of, open_configured_pipeline, rank_plans
from trainer.targets.replay import open_stores, with_recorded_settings


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


class LogitsCache(dict[int, torch.Tensor]):
    """The teachers' logits [B, C] of the newest micro-batches, by the positions of these.

    A position decides the images and so the logits: what a student finds here is what it would compute itself.

    Args:
      capacity: how many are kept.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity

    def __setitem__(self, position: int, logits: torch.Tensor) -> None:
        super().__setitem__(position, logits)
        if len(self) > self._capacity:
            del self[next(iter(self))]


def use_shared_batches(runs: Sequence[Run]) -> SharedBatches:
    """Make runs of one plan take their images from one pipeline, and show each batch to their teachers once."""
    first = runs[0]
    pipelines, stop, per_update = _shared_pipelines(runs), max(run.stop for run in runs), first.step.num_micro_batches
    # `open_at` must not hold a run, whose memory is freed when it ends.
    plan, replay, world, micro_batch = first.plan, first.replay, first.world, first.state.micro_batch

    def open_at(step: int) -> Generator[Batch, None, None]:
        return batches_of(pipelines["train"], rank_plans(plan, step, stop, world, micro_batch), replay)

    batches, logits_cache = SharedBatches(open_at, per_update, plan.global_batch), LogitsCache(per_update)
    for run in runs:
        run.step.logits_cache = logits_cache
        run.pipelines = dataclasses.replace(run.pipelines, of={**pipelines, "train": batches})
        run.replay = None  # The shared batches come with their targets.
        if run.evaluate is not None:
            images = dataclasses.replace(run.evaluate.images, pipeline=pipelines["val"])
            run.evaluate = dataclasses.replace(run.evaluate, images=images)
    return batches


def _shared_pipelines(runs: Sequence[Run]) -> dict[str, Pipeline]:
    """A pipeline over each split, which reports damaged samples to all runs."""
    first = runs[0]
    indices = {"train": first.plan.index} | ({"val": first.evaluate.images.plan.index} if first.evaluate else {})
    # The loader works on the next update while all students make this one.
    prefetch = max(first.config.data.prefetch, first.step.num_micro_batches)
    data, decode = dataclasses.replace(first.config.data, prefetch=prefetch), first.pipelines.decode["decode"]

    def opened(split: str) -> Pipeline:
        collectors = [run.pipelines.quarantine.collector(split) for run in runs]

        def on_bad(sample: int, error: str) -> None:
            for collect in collectors:
                collect(sample, error)

        return open_configured_pipeline(data, indices[split], world=first.world, decode=decode, on_bad=on_bad)

    return {split: opened(split) for split in indices}


def check_configs(configs: Sequence[Config]) -> None:
    """Raise a UserError if students of these configurations cannot be trained together."""
    configs = [with_recorded_settings(config, open_stores(config.teacher)) for config in configs]
    outs = [config.run.out.absolute() for config in configs]
    first, in_common = configs[0], settings_in_common(configs[0])
    for config, out in zip(configs, outs, strict=True):
        if outs.count(out) > 1:
            raise UserError(f"run.out is {config.run.out} for {outs.count(out)} students: give each its own folder")
        if "wandb" in config.run.loggers and len(configs) > 1:
            raise UserError(
                f"run.loggers of {config.run.out} has wandb, which has one run in a process: leave it out, or train "
                "this student alone"
            )
        found = flat(config)
        for name, expected in in_common.items():
            _check_equal(name, first, expected, config, found[name])


def grouping_key(config: Config) -> dict[str, Any] | None:
    """Students of equal keys can be trained together. None is for a student that is trained alone.

    It is known before anything is built. So a student is alone whose model decides what all would share: its mean
    colour the fill, or its need of memory the micro-batch.
    """
    if "wandb" in config.run.loggers or config.augment.fill is None or config.run.micro_batch == "auto":
        return None
    compared_later = {"augment.fill": config.augment.fill, "run.micro_batch": config.run.micro_batch}  # By check_runs.
    return settings_in_common(config) | compared_later


def settings_in_common(config: Config) -> dict[str, Any]:
    """The settings that must be equal for all students, of whom this is the first, by SECTION.NAME."""
    of_plan = plan_settings(config)

    def is_shared(name: str) -> bool:
        if name == "distill.temperature":  # The mean of several teachers' probabilities is taken at this temperature.
            return len(config.teacher.members) > 1
        if name == "augment.fill":  # It may be left to the student's mean colour: `check_runs` compares the colours.
            return False
        return name.startswith(("data.", "teacher.")) or setting_natures()[name].one_per_process or name in of_plan

    return {name: value for name, value in flat(config).items() if is_shared(name)}


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
