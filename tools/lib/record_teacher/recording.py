"""Everything that a recording is built of. It is checked and built as for a run, and nothing is written."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from pipelines.common.errors import UserError
from pipelines.common.files import sha256_of
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import ShardIndex
from trainer.builder import place, train_plan
from trainer.cluster.world import World
from trainer.config.sections import Config, Precision
from trainer.feed import Pipelines, open_pipelines, open_splits
from trainer.models.checkpoint_format import digest_of
from trainer.models.class_names import order_doubt
from trainer.models.preprocessing import preprocessing
from trainer.models.student import build_student
from trainer.models.teacher import Teacher, Teachers, build_teacher, build_teachers
from trainer.targets import replay
from trainer.targets.codec import Codec, open_codec
from trainer.targets.header import StoreHeader, TeacherFacts, check_store_folder
from trainer.update.precision import PRECISIONS

_BLOCK_STEPS = 64  # Steps of a piece: the recipe's have 65 MB with one byte a class.
_BLOCK_BYTES = 1 << 28  # A piece has fewer steps where it would be larger, because it is held in memory.


@dataclasses.dataclass(frozen=True)
class Recording:
    """Holds all that a process needs to record any blocks of steps.

    Attributes:
      header: describes what the store is recorded from; codec: encodes its rows.
      total_steps: the store is to hold the steps [0, total_steps).
      block_steps: steps of a piece.
      micro_batch: the most images of a forward pass.
      rows: the rows of the global batch that each forward pass takes, int64 on the device.
      device: where the teacher computes.
    """

    header: StoreHeader
    codec: Codec
    plan: TrainPlan
    teachers: Teachers
    pipelines: Pipelines
    total_steps: int
    block_steps: int
    micro_batch: int
    rows: list[torch.Tensor]
    device: torch.device


def build_recording(config: Config, store: Path, *, codec: str, epochs: int, world: World) -> Recording:
    """Check and build everything. Writes nothing.

    Args:
      epochs: the first ones of the plan; 0 is all of a run's that have images of their own.
    Raises:
      UserError: what the configuration asks for cannot be recorded.
    """
    check_one_teacher(config)
    check_store_folder(store)
    epochs = epochs_to_record(config, epochs)
    # Damaged samples are named in the store, where a run names them in its folder.
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=store))
    splits, classes = open_splits(config.data)
    index = splits["train"]
    opened = open_codec(codec, index.num_classes)
    plan = train_plan(config, index, _fill(config, index, classes))
    teachers, facts = _build_teacher(config, index, classes)
    name = _resolved(config.teacher.precision, world.device)
    # What the header calls fp32 is float32: no rounded factors, whatever the students' runs do.
    place([teachers], dataclasses.replace(config.run, tf32=False), world.device)
    teachers.to_precision(PRECISIONS[name])
    pipelines = open_pipelines(config, {"train": index}, world)
    micro_batch = whole_groups(config.run.eval_batch, config.augment.mix_group)
    made_with = {
        "steps_per_epoch": plan.steps_per_epoch,
        "decode": pipelines.decode["decode"],
        "device": world.device_name,
        **replay.made_with(config, world.device),
    }
    return Recording(
        header=StoreHeader(plan.describe(), index.num_classes, facts, codec, name, made_with),
        codec=opened,
        plan=plan,
        teachers=teachers,
        pipelines=pipelines,
        total_steps=plan.steps_per_epoch * epochs,
        block_steps=max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // (plan.global_batch * opened.row_bytes))),
        micro_batch=micro_batch,
        rows=[torch.from_numpy(rows).to(world.device) for rows in plan.division(1, micro_batch).rows(0)],
        device=world.device,
    )


def check_one_teacher(config: Config) -> None:
    """Raise a UserError unless the configuration names exactly one teacher."""
    if config.teacher.store is not None:
        raise UserError(f"teacher.store is {config.teacher.store}: it is recorded already. Leave teacher.store out")
    if config.teacher.name is None:
        raise UserError("teacher.name is null: there is nothing to record. Name a teacher with --teacher.name")
    if config.teacher.others:
        raise UserError(
            f"teacher.others names {len(config.teacher.others)} more: a store is of one teacher. Record each alone, as "
            "teacher without others, into a store of its own"
        )


def epochs_to_record(config: Config, epochs: int) -> int:
    """The number of epochs to record; `epochs` as for `build_recording`."""
    cycle = config.augment.cycle_epochs
    if cycle and epochs > cycle:
        raise UserError(
            f"--epochs is {epochs}, and augment.cycle_epochs is {cycle}, so that later epochs repeat the images of the "
            "first ones and need no recording. Leave --epochs out"
        )
    return epochs or cycle or config.schedule.total_epochs


def whole_groups(num_images: int, group: int) -> int:
    """The most whole groups that `num_images` images hold, at least one, in images."""
    return max(num_images // group, 1) * group


def _fill(config: Config, index: ShardIndex, classes: list[str] | None) -> tuple[int, int, int]:
    """The plan's fill colour, for which a student is built only where it is the student's."""
    if config.augment.fill is not None:
        return config.augment.fill
    doubt = order_doubt(config.data.root)
    return preprocessing(
        build_student(config.student, index.num_classes, config.data.train_sizes[-1], classes, doubt)
    ).fill


def _build_teacher(config: Config, index: ShardIndex, classes: list[str] | None) -> tuple[Teachers, TeacherFacts]:
    """The teacher as a run has it, on the CPU, and what its logits depend on.

    It is built twice. A run's teacher has its BatchNorms folded into convolutions, whose last bits may depend on the
    machine, while the digest in the header must be the same on every one.
    """
    doubt = order_doubt(config.data.root)
    unfolded = build_teacher(config.teacher, index.num_classes, config.data.train_sizes[-1], names=classes, doubt=doubt)
    facts = teacher_facts(config, unfolded)
    del unfolded
    teachers = build_teachers(config, index.num_classes, classes, doubt)
    assert teachers is not None
    return teachers, facts


def teacher_facts(config: Config, teacher: Teacher) -> TeacherFacts:
    """What the logits of the configuration's first teacher depend on.

    Args:
      teacher: as build_teacher returns it.
    """
    said = config.teacher
    order = None if teacher.order is None else teacher.order.tolist()
    return TeacherFacts(
        name=str(said.name),
        kwargs=dict(said.kwargs),
        image_size=said.image_size,
        weights=digest_of(teacher.model.state_dict()),
        checkpoint=sha256_of(said.checkpoint) if said.checkpoint is not None else None,
        order=None if order is None else hashlib.sha256(json.dumps(order).encode()).hexdigest(),
    )


def _resolved(precision: Precision, device: torch.device) -> str:
    """The teacher's precision; auto is fp16 on a GPU and fp32 on a CPU.

    bf16 is no default anywhere: it moves the outputs of some teachers by more than a codec of half a byte a class does.
    """
    if precision != "auto":
        return precision
    return "fp16" if device.type == "cuda" else "fp32"
