"""Everything that a recording is built of. It is checked and built as for a run, and nothing is written."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from pipelines.common.errors import UserError, clipped
from pipelines.common.files import sha256_of
from pipelines.plan.plan import TrainPlan
from trainer.builder import place_teachers, train_plan
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.feed import Pipelines, open_pipelines, open_splits
from trainer.models.checkpoint_format import digest_of
from trainer.models.class_names import order_doubt
from trainer.models.files.model_folders import named_folder
from trainer.models.preprocessing import preprocessing
from trainer.models.student import build_student
from trainer.models.teacher import Teacher, Teachers, build_teacher, check_and_fold
from trainer.targets.codec import open_codec
from trainer.targets.header import HEADER_FILE, StoreHeader, TeacherFacts, check_store_folder, read_header
from trainer.targets.pieces import BLOCK_STEPS
from trainer.targets.replay import pipeline_and_versions
from trainer.update.precision import PRECISIONS

_BLOCK_BYTES = 1 << 28  # A piece has fewer steps where it would be larger, because it is held in memory.


@dataclasses.dataclass(frozen=True)
class Recording:
    """Holds all that a process needs to record any blocks of steps.

    Attributes:
      header: describes what the store is recorded from.
      total_steps: the store is to hold the steps [0, total_steps).
      block_steps: the most steps of a piece.
      micro_batch: the most images of a forward pass.
      rows: the rows of the global batch that each forward pass takes, int64 on the teacher's device.
    """

    header: StoreHeader
    plan: TrainPlan
    teachers: Teachers
    pipelines: Pipelines
    total_steps: int
    block_steps: int
    micro_batch: int
    rows: list[torch.Tensor]


def build_recording(config: Config, store: Path, *, codec: str, epochs: int, world: World) -> Recording:
    """Check and build everything. Writes nothing.

    Args:
      codec: "" is that of the store, and int8 for a new one.
      epochs: the first ones of the plan; 0 is all of a run's that have images of their own.
    Raises:
      UserError: what the configuration asks for cannot be recorded.
    """
    _check_settings(config, epochs)
    stored = _stored_header(store, config)
    codec = codec or (stored.codec if stored else "int8")
    # Damaged samples are named in the store, where a run names them in its folder. What the header calls fp32 is
    # float32: no rounded factors, whatever the students' runs do.
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=store, tf32=False))
    splits, classes = open_splits(config.data)
    index, size, doubt = splits["train"], config.data.train_sizes[-1], order_doubt(config.data.root)
    opened, fill = open_codec(codec, index.num_classes), config.augment.fill
    if fill is None:  # It is that of the student, which is built for nothing else.
        fill = preprocessing(build_student(config.student, index.num_classes, size, classes, doubt)).fill
    plan = train_plan(config, index, fill)
    teacher = build_teacher(config.teacher, index.num_classes, size, names=classes, doubt=doubt)
    facts = teacher_facts(config, teacher)  # The last bits of folded weights may depend on the machine.
    check_and_fold(teacher, config.teacher, "teacher", config.data.train_sizes)
    teachers = Teachers([teacher], config.distill.temperature)
    precision = config.teacher.precision
    if precision == "auto":  # bf16 would move the outputs of some teachers by more than half a byte a class does.
        precision = "fp16" if world.device.type == "cuda" else "fp32"
    place_teachers(teachers, config, PRECISIONS[precision], world.device)
    torch.backends.cudnn.benchmark = False  # Timing must not choose the kernels: they decide the last bits.
    pipelines = open_pipelines(config, {"train": index}, world)
    micro_batch = _micro_batch(config)
    rows = plan.division(1, micro_batch).rows(0)
    made = {
        "steps_per_epoch": plan.steps_per_epoch,
        "decode": pipelines.decode["decode"],
        "device": world.device_name,
        "forward_batch": max(map(len, rows)),  # Its size chooses kernels, and so the last bits of a row.
        **pipeline_and_versions(config, world.device),
    }
    return Recording(
        header=StoreHeader(plan.describe(), index.num_classes, facts, codec, precision, made),
        plan=plan,
        teachers=teachers,
        pipelines=pipelines,
        total_steps=plan.steps_per_epoch * (epochs or config.augment.cycle_epochs or config.schedule.total_epochs),
        block_steps=max(1, min(BLOCK_STEPS, _BLOCK_BYTES // (plan.global_batch * opened.row_bytes))),
        micro_batch=micro_batch,
        rows=[torch.from_numpy(each).to(world.device) for each in rows],
    )


def _stored_header(store: Path, config: Config) -> StoreHeader | None:
    """The header of the store that is there. Raises a UserError if it is of a teacher of another name, or no store."""
    check_store_folder(store)
    if not (store / HEADER_FILE).exists():
        return None
    stored, name = read_header(store), config.teacher.name
    if stored.teacher.name != name:
        file = ", and its file with --teacher.checkpoint" if stored.teacher.checkpoint else ""
        raise UserError(
            f"{store}: is of the teacher {clipped(stored.teacher.name)}, and teacher.name is {name}. Give "
            f"--teacher.name {clipped(stored.teacher.name)}{file}, or name another store"
        )
    return stored


def _micro_batch(config: Config) -> int:
    """The most images of a forward pass, at most run.eval_batch: whole mixing groups, or pairs where no group fits."""
    size, group = config.run.eval_batch, config.augment.mix_group
    return size // group * group or max(size - size % 2, 2)


def _check_settings(config: Config, epochs: int) -> None:
    """Raise a UserError unless there is exactly one live teacher, and the epochs have images of their own."""
    teacher, cycle = config.teacher, config.augment.cycle_epochs
    if teacher.store is not None:
        raise UserError(f"teacher.store is {teacher.store}: it is recorded already. Leave teacher.store out")
    if teacher.name is None:
        raise UserError("teacher.name is null: there is nothing to record. Name a teacher with --teacher.name")
    if teacher.others:
        raise UserError(
            f"teacher.others names {len(teacher.others)} more: a store is of one teacher. Record each alone, as "
            "teacher without others, into a store of its own"
        )
    if cycle and epochs > cycle:
        raise UserError(
            f"--epochs is {epochs}, and augment.cycle_epochs is {cycle}, so that later epochs repeat the images of the "
            "first ones and need no recording. Leave --epochs out"
        )


def teacher_facts(config: Config, teacher: Teacher) -> TeacherFacts:
    """Collect what decides the logits of the configuration's first teacher, as build_teacher returns it."""
    said = config.teacher
    order = None if teacher.order is None else json.dumps(teacher.order.tolist()).encode()
    expects, folder = preprocessing(teacher.model), named_folder(str(said.name))
    described = {} if folder is None else {"architecture": folder.architecture, "kwargs": folder.kwargs}
    return TeacherFacts(
        name=str(said.name),
        kwargs=dict(said.kwargs),
        image_size=said.image_size,
        weights=digest_of(teacher.model.state_dict()),
        checkpoint=sha256_of(said.checkpoint) if said.checkpoint is not None else None,
        order=None if order is None else hashlib.sha256(order).hexdigest(),
        model={"mean": [*expects.mean], "std": [*expects.std], **described},
    )
