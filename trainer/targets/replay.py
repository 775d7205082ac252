"""Replays what teachers said: the stores of a run, whether they fit it, and the targets beside its batches."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pipelines import resolve_pipeline
from pipelines.batch import Batch, Pipeline
from pipelines.common.errors import UserError, clipped, counted
from pipelines.common.files import sha256_of
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.plan import TrainPlan
from trainer.cluster.code_version import software
from trainer.config.sections import Config, OtherTeacher, TeacherConfig
from trainer.models.teacher import RecordedTeacher
from trainer.targets.header import check_plan
from trainer.targets.store import TeacherStore


def open_stores(config: TeacherConfig) -> dict[str, TeacherStore]:
    """The stores of all teachers that have one, by their keys in TeacherConfig.members.

    Raises:
      UserError: as TeacherStore.
    """
    return {key: TeacherStore(each.store) for key, each in config.members if each.store is not None}


def provenances(stores: Mapping[str, TeacherStore]) -> dict[str, str]:
    """How the outputs in each store were computed and stored, for people."""
    return {key: store.header.provenance for key, store in stores.items()}


def with_recorded_settings(config: Config, stores: Mapping[str, TeacherStore]) -> Config:
    """The configuration with the name, arguments and image size of each recorded teacher as its store has them.

    Raises:
      UserError: the configuration names another teacher, or another precision, than what was recorded.
    """
    teacher, members = config.teacher, dict(config.teacher.members)
    for key, store in stores.items():
        members[key] = _recorded(key, members[key], store)
        # With live teachers beside the recorded ones it is theirs.
        if len(stores) == len(members) and teacher.precision not in ("auto", store.header.precision):
            raise _conflict(store, "teacher.precision", store.header.precision, teacher.precision)
    first = members.pop("teacher", teacher)
    return dataclasses.replace(config, teacher=dataclasses.replace(first, others=list(members.values())))


def _recorded(key: str, given: OtherTeacher, store: TeacherStore) -> Any:
    """One teacher's settings as its store has them. A setting that has its default was not given."""
    facts = store.header.teacher
    recorded = {name: getattr(facts, name) for name in ("name", "kwargs", "image_size")}
    defaults = {field.name: field.default for field in dataclasses.fields(type(given))} | {"kwargs": {}}
    for name, value in recorded.items():
        if getattr(given, name) not in (None, defaults[name], value):
            raise _conflict(store, f"{key}.{name}", value, getattr(given, name))
    file = given.checkpoint
    if file is not None and (not file.is_file() or sha256_of(file) != facts.checkpoint):
        recorded_file = f"a file of sha256 {facts.checkpoint}" if facts.checkpoint else "timm's own weights"
        raise _conflict(store, f"{key}.checkpoint", recorded_file, file)
    return dataclasses.replace(given, **recorded)


def _conflict(store: TeacherStore, setting: str, recorded: object, given: object) -> UserError:
    return UserError(
        f"{store.folder}: was recorded with {setting} {clipped(recorded, 150)}, and {clipped(given, 150)} is given. "
        f"Leave {setting} out, or give another store"
    )


def check_stores(config: Config, stores: Mapping[str, TeacherStore], plan: TrainPlan) -> None:
    """Raise a UserError if a store is of another plan, lacks steps, or does not serve the temperature.

    Args:
      plan: its fill colour is not compared where it is the student's, which `check_fill` compares later.
    """
    epochs = config.schedule.total_epochs
    num_epochs = min(epochs, config.augment.cycle_epochs or epochs)
    num_steps = plan.steps_per_epoch * num_epochs
    asked_by = f"schedule.epochs {config.schedule.epochs} and cooldown_epochs {config.schedule.cooldown_epochs}"
    if num_epochs < epochs:
        asked_by = f"augment.cycle_epochs {num_epochs}"
    temperature = config.distill.temperature
    for store in stores.values():
        fill = {"fill": store.header.plan.get("fill")} if config.augment.fill is None else {}
        check_plan(store.folder, store.header, {**plan.describe(), **fill}, plan.index.num_classes)
        if temperature != 1 and not store.codec.any_temperature:
            raise UserError(
                f"{store.folder}: is stored as {store.header.codec}, which serves no other temperature than 1, and "
                f"distill.temperature is {temperature:g}. Use that, or a store with another codec"
            )
        missing = store.coverage.first_missing(0, num_steps)
        if missing is not None:
            raise UserError(
                f"{store.folder}: step {missing} is not recorded, and the run needs the steps up to {num_steps}. The "
                f"store has the first {counted(missing / plan.steps_per_epoch, 'epoch')} of {plan.steps_per_epoch} "
                f"steps, and the run has {num_epochs}: {asked_by}. Lower schedule.epochs, set augment.cycle_epochs to "
                f"epochs that are recorded, or {store.header.how_to_add('the others')}"
            )


def check_fill(stores: Mapping[str, TeacherStore], plan: TrainPlan) -> None:
    """Raise a UserError if the plan of a run has another fill colour than the plan of a store."""
    for store in stores.values():
        fill, own = store.header.plan.get("fill"), plan.describe()["fill"]
        if fill != own:
            raise UserError(
                f"{store.folder}: was recorded with the fill colour {clipped(fill)}, and the student's mean colour is "
                f"{own}. Give the colour of the store: --augment.fill '{clipped(fill)}'"
            )


def pipeline_and_versions(config: Config, device: torch.device) -> dict[str, Any]:
    """What a teacher's outputs depend on a little, besides its device: plain values by their names.

    On a CPU the number of threads decides in which order sums are formed; torchrun sets it, too.
    """
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"pipeline": resolve_pipeline(config.data.pipeline, device), **threads, **software()}


def recorded_teachers(stores: Mapping[str, TeacherStore], now: Mapping[str, Any]) -> dict[str, RecordedTeacher]:
    """The teachers that decode the stores' rows, by the teacher's key, with a note on each.

    Args:
      now: as `pipeline_and_versions`; the notes say with what else a store was recorded.
    """
    found = {}
    for key, store in stores.items():
        note = f"{key}: {store.header.provenance}; replayed from {store.folder}"
        if other := store.header.made_otherwise(now):
            note += f"; it {other}"
        if num_damaged := store.num_quarantined():
            note += f"; {num_damaged} of its images were damaged and are gray"
        found[key] = RecordedTeacher(store.codec.decode, store.codec.row_bytes, note)
    return found


@dataclasses.dataclass(frozen=True)
class Replay:
    """Puts the targets of recorded teachers beside the batches of a plan.

    Attributes:
      stores: in the order of the teachers.
      plan: which every store is of.
      device: where the targets are wanted.
    """

    stores: Sequence[TeacherStore]
    plan: TrainPlan
    device: torch.device

    def batches(self, pipeline: Pipeline, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan with its targets, which are read as soon as the pipeline takes the plan."""
        waiting: collections.deque[Future[list[torch.Tensor]]] = collections.deque()
        with ThreadPoolExecutor(1, thread_name_prefix="targets") as thread:

            def announced() -> Iterator[BatchPlan]:
                for plan in plans:
                    waiting.append(thread.submit(self.read, plan))
                    yield plan

            batches: Any = pipeline.batches(announced())  # A generator, which Pipeline.batches does not promise.
            try:
                with contextlib.closing(batches):
                    for batch in batches:
                        rows = [each.to(self.device, non_blocking=True) for each in waiting.popleft().result()]
                        yield dataclasses.replace(batch, targets=tuple(rows))
            finally:
                thread.shutdown(cancel_futures=True)

    def read(self, plan: BatchPlan) -> list[torch.Tensor]:
        """The encoded rows of a plan from each store: uint8 [B, row_bytes], ready to be copied to the device.

        Raises:
          UserError: as TeacherStore.read.
        """
        positions = self.plan.views(plan.positions)
        rows = [store.read(positions) for store in self.stores]
        return [each.pin_memory() for each in rows] if self.device.type == "cuda" else rows
