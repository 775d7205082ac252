"""Builds a run: checks everything, makes everything, and sets it to the newest checkpoint. Writes nothing."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from pipelines.common.errors import UserError, naming_settings
from pipelines.common.files import check_can_be_made
from pipelines.ops.torch_ops import kernel_error
from pipelines.plan.plan import IMAGENET_MEAN_RGB, EvalPlan, TrainPlan
from pipelines.shards.index import ShardIndex
from pipelines.shards.manifest import MANIFEST, read_manifest
from trainer.cluster.code_version import code_version, source_hash
from trainer.cluster.preemption import Preemption
from trainer.cluster.world import World, alone
from trainer.config.natures import shared_settings
from trainer.config.recipe import audit
from trainer.config.sections import Config, DistillConfig, RunConfig, TeacherConfig, to_dict
from trainer.evaluation.predict import EvalPass
from trainer.feed import Feed, Pipelines, open_pipelines, open_splits
from trainer.micro_batch import choose_micro_batch, resolve_micro_batch
from trainer.models.batch_norm import batch_norms, synchronize_batch_norms
from trainer.models.checks import check_student
from trainer.models.class_names import order_doubt
from trainer.models.ema import ModelEma
from trainer.models.files.model_folders import model_contents
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing
from trainer.models.student import build_student
from trainer.models.teacher import Teachers, build_teachers
from trainer.monitor.run_files import Evaluation
from trainer.monitor.sinks import Sink, open_sinks
from trainer.state.resume import resume
from trainer.state.train_state import TrainState
from trainer.state.writer import CheckpointStore
from trainer.targets.header import read_header
from trainer.targets.replay import (
    Replay,
    check_fill,
    check_stores,
    open_stores,
    pipeline_and_versions,
    provenances,
    recorded_teachers,
    with_recorded_settings,
)
from trainer.targets.store import TeacherStore
from trainer.update.compiler import Compiler, choose_compiler
from trainer.update.optimizer import build_optimizer, set_learning_rate
from trainer.update.precision import PRECISIONS, allow_tf32, resolve_precision
from trainer.update.schedule import learning_rate
from trainer.update.step import TrainStep
from trainer.update.warm_up import warmed_up_step


@dataclasses.dataclass
class Run:
    """Everything that a run is built of.

    Attributes:
      teachers: what the student learns from, on the device; None without.
      step: the update; state: what it changes.
      evaluate: gives the metrics of the raw and the EMA weights; None without a validation set.
      preemption: stops all ranks at the same step.
      checkpoints: where the state is saved.
      replay: gives the batches the targets of recorded teachers; None without.
      sinks: get every record that metrics.jsonl gets.
      precision: of the forward passes.
      notes: what the user should know before it begins, in sentences.
      source: hash of the source files.
      title: begins every line on the screen, where runs share it.
    """

    config: Config
    world: World
    plan: TrainPlan
    pipelines: Pipelines
    state: TrainState
    teachers: Teachers | None
    step: TrainStep
    evaluate: "Evaluator | None"
    preemption: Preemption
    checkpoints: CheckpointStore
    replay: Replay | None
    sinks: list[Sink]
    precision: torch.dtype
    notes: list[str]
    source: str
    title: str = ""

    @property
    def total_steps(self) -> int:
        """The updates of the whole run."""
        return self.plan.steps_per_epoch * self.config.schedule.total_epochs

    @property
    def validation(self) -> str:
        """The digest of the validation set, "" without one."""
        return self.evaluate.images.plan.index.digest if self.evaluate is not None else ""

    @property
    def stop(self) -> int:
        """The step after which this process ends."""
        return min(self.total_steps, self.config.run.stop_after_steps or self.total_steps)

    @property
    def evaluation_due(self) -> bool:
        """True if the present weights are to be evaluated, and have not been."""
        state, epoch_steps = self.state, self.plan.steps_per_epoch
        if self.evaluate is None or state.step == 0 or state.step % epoch_steps or state.evaluated >= state.step:
            return False
        return state.step // epoch_steps % self.config.run.eval_every == 0 or state.step == self.total_steps

    def feed(self, start: int, preview: Path | None = None) -> Feed:
        """This rank's batches from update `start` on; close it to stop early.

        Args:
          preview: as for Feed.
        """
        pipeline, micro_batch = self.pipelines.of["train"], self.state.micro_batch
        return Feed(
            self.plan,
            pipeline,
            self.world,
            micro_batch=micro_batch,
            start=start,
            stop=self.stop,
            replay=self.replay,
            preview=preview,
        )

    def set_learning_rate(self, step: int) -> None:
        """Set the optimizer to the learning rate of an update."""
        epoch = step // self.plan.steps_per_epoch
        set_learning_rate(self.state.optimizer, learning_rate(epoch, self.config.optim, self.config.schedule))


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a run reads of its dataset and its teacher stores before a model is built.

    Attributes:
      splits: the index of train and, if there is one, of val.
      classes: the ids of the classes in the order of their labels; None where they have only numbers.
      stores: of the recorded teachers, by their keys in TeacherConfig.members.
    """

    splits: dict[str, ShardIndex]
    classes: list[str] | None
    stores: dict[str, TeacherStore]


def build(
    config: Config, world: World | None = None, preemption: Preemption | None = None, first: Run | None = None
) -> Run:
    """Check everything, build everything, and set it to the newest checkpoint. Writes nothing.

    Args:
      world: the ranks; None is this process alone. preemption: None makes one. Every rank must do the same.
      first: another run of this process with the same data and teachers: this one takes its teachers and DALI's decode
        path.
    Raises:
      UserError: what the configuration asks for cannot be done.
    """
    world = world or alone(config.run.device)
    config, sources = open_sources(config, world)
    sinks = open_sinks(config) if world.is_main else []
    index, teachers = sources.splits["train"], first.teachers if first else None
    student, teachers = build_models(config, index.num_classes, sources.classes, world, sources.stores, teachers)
    expects, precision = preprocessing(student), resolve_precision(config.run.precision, world.device)
    plan = train_plan(config, index, expects.fill)
    check_fill(sources.stores, plan)
    pipelines = open_pipelines(config, sources.splits, world, first.pipelines.decode if first else None)
    place([student], config.run, world.device)
    place_teachers(teachers, config, precision, world.device)
    normalize = Normalize(expects.mean, expects.std, precision).to(world.device)
    state = build_state(config, plan, student, precision, sources, world)
    evaluator = open_evaluator(config, sources.splits, pipelines, expects.interpolation, normalize, state, world)
    make_step = functools.partial(TrainStep, config, state, normalize, teachers)
    compiler, compiler_note = choose_compiler(config.run.compile, student, world)
    notes = [*(teachers.notes if teachers else []), compiler_note, kernel_note(world)]
    notes += resume(config.run, state, plan.steps_per_epoch * config.schedule.total_epochs, world)
    step, step_notes = build_step(make_step, compiler, config, plan, state, pipelines, evaluator, world)
    state.audit = audit(config, batch_norm_sizes(config, step, student), provenances(sources.stores))
    state.restore_rank_statistics(world.rank, world.size)  # DDP has overwritten them with rank 0's.
    return Run(
        config=config,
        world=world,
        plan=plan,
        pipelines=pipelines,
        state=state,
        teachers=teachers,
        step=step,
        evaluate=evaluator,
        preemption=preemption or Preemption(world),
        checkpoints=CheckpointStore(config.run, world),
        replay=Replay(list(sources.stores.values()), plan, world.device) if sources.stores else None,
        sinks=sinks,
        precision=precision,
        notes=list(filter(None, [*notes, *step_notes])),
        source=source_hash(),
    )


def build_for_check(config: Config, num_classes: int | None = None) -> Run:
    """Build a run as `build` does, on the CPU, without its teachers and without a checkpoint, to check that it can be.

    What depends on the machine of the run, such as its GPUs, is left to the run.

    Args:
      num_classes: of synthetic images, which stand for a dataset that is not there yet; None takes the dataset.
    Raises:
      UserError: as `build`.
    """
    batch_norm = "reduce" if config.run.batch_norm == "sync" else config.run.batch_norm  # The former needs GPUs.
    elsewhere = {"out": config.run.out / "check", "device": "cpu", "compile": False, "loggers": []}
    run = dataclasses.replace(config.run, batch_norm=batch_norm, **elsewhere)
    data = dataclasses.replace(config.data, pipeline="torchvision")
    if num_classes is not None:
        synthetic = {"synthetic_classes": num_classes, "synthetic_samples": run.global_batch}
        data = dataclasses.replace(data, root=None, pipeline="synthetic", **synthetic)
    teacher, distill = TeacherConfig(name=None), DistillConfig()
    return build(dataclasses.replace(config, data=data, run=run, teacher=teacher, distill=distill))


def facts_to_compare(config: Config, device: torch.device) -> dict:
    """What must be equal on all ranks: {name: value}, values as JSON has them.

    The configuration without what each machine has of its own, the digests of the dataset, the content of models, a
    hash of every source file, versions, and what `auto` resolves to.

    Raises:
      UserError: there is no dataset here, or it is damaged.
    """
    splits = read_manifest(config.data.root)["splits"] if config.data.root is not None else {}
    digests = {f"dataset digest of '{split}'": entry["digest"][:12] for split, entry in splits.items()}
    precision = {"the precision": str(resolve_precision(config.run.precision, device))}
    recorded = {key: teacher.store for key, teacher in config.teacher.members if teacher.store is not None}
    stores = {f"content of {key}.store": read_header(store).identity[:12] for key, store in recorded.items()}
    return {**shared_settings(config), **digests, **model_contents(config), **stores, **code_version(), **precision}


def open_sources(config: Config, world: World) -> tuple[Config, Sources]:
    """Open the dataset and the teacher stores, after checking whatever can be checked without a model.

    Returns:
      the configuration with what the stores say of their teachers, and the sources.
    Raises:
      UserError: the run folder cannot be made, the global batch cannot be divided, something is missing or damaged, or
        a store is of another run.
    """
    check_writable(config.run.out)
    resolve_micro_batch(config, world)
    stores = open_stores(config.teacher)
    config = with_recorded_settings(config, stores)
    splits, classes = open_splits(config.data)
    check_stores(config, stores, train_plan(config, splits["train"], IMAGENET_MEAN_RGB))
    return config, Sources(splits, classes, stores)


def check_writable(out: Path) -> None:
    """Raise a UserError, before anything is built, if the run folder cannot be made or holds a dataset."""
    if (out / MANIFEST).exists():
        raise UserError(
            f"{out}: is a dataset, for it has a {MANIFEST}. Give the run a folder of its own with --run.out"
        )
    check_can_be_made(out, "Change --run.out")


def build_models(
    config: Config,
    num_classes: int,
    classes: list[str] | None,
    world: World,
    stores: Mapping[str, TeacherStore],
    teachers: Teachers | None,
) -> tuple[nn.Module, Teachers | None]:
    """Student and teachers on the CPU, after checking that they take the images they will get, of every size.

    A model that takes one size only is built for the last one, or for teacher.image_size. Classes are the dataset's.
    Teachers that are given are left unchanged.
    """
    torch.manual_seed(config.student_seed)
    doubt = order_doubt(config.data.root)
    student = build_student(config.student, num_classes, config.data.train_sizes[-1], classes, doubt)
    check_student(student, config)
    if config.run.batch_norm == "sync":
        student = synchronize_batch_norms(student, world)
    if teachers is None:
        recorded = recorded_teachers(stores, pipeline_and_versions(config, world.device))
        teachers = build_teachers(config, num_classes, classes, doubt, recorded)
    return student, teachers


def train_plan(config: Config, index: ShardIndex, fill: tuple[int, int, int]) -> TrainPlan:
    """The plan of the configuration; `fill` as for TrainPlan."""
    with naming_settings(global_batch="run.global_batch", image_size="data.image_size"):
        return TrainPlan(
            index=index,
            augment=config.augment,
            seed=config.run.seed,
            global_batch=config.run.global_batch,
            image_size=config.data.image_size,
            fill=fill,
            window_shards=config.data.window_shards if config.data.shuffle == "window" else 0,
        )


def place(models: list[nn.Module], config: RunConfig, device: torch.device) -> None:
    """Move models to their device and into their memory format, and set up the device for them."""
    if device.type == "cuda":
        allow_tf32(config.tf32)
        torch.backends.cudnn.benchmark = True  # Shapes stay the same, so a search for the fastest algorithms pays.
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    for model in models:
        model.to(device=device, memory_format=memory_format)  # pyright: ignore[reportCallIssue]  (It has no stub.)


def place_teachers(teachers: Teachers | None, config: Config, precision: torch.dtype, device: torch.device) -> None:
    """Move the teachers, if there are any, to their device, and into teacher.precision, which may be the student's."""
    if teachers is None:
        return
    place([teachers], config.run, device)
    own = config.teacher.precision
    teachers.to_precision(precision if own == "auto" else PRECISIONS[own])


def build_state(
    config: Config,
    plan: TrainPlan,
    student: nn.Module,
    precision: torch.dtype,
    sources: Sources,
    world: World,
) -> TrainState:
    """The state of a run that has not begun."""
    settings = to_dict(config)
    return TrainState(
        student=student,
        ema=ModelEma(student) if config.ema.decay else None,
        optimizer=build_optimizer(student, config.optim),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16),
        plan={
            "student.name": config.student.name,
            "student.kwargs": settings["student"]["kwargs"],
            # Checkpoints from before the setting existed lack it, and run.seed is the same said otherwise.
            "student.seed": None if config.student_seed == config.run.seed else config.student.seed,
            **plan.describe(),
        },
        config=settings,
        audit=audit(config),
        classes=sources.classes,
        stores={key: store.header.facts for key, store in sources.stores.items()},
        ranks_differ=config.run.batch_norm == "none" and world.size > 1,
    )


def kernel_note(world: World) -> str:
    """A note if Triton does not work on the GPU of some rank, else "". Every rank must call it."""
    mine = kernel_error() if world.device.type == "cuda" else ""
    error = next(filter(None, world.all_gather([mine])), "")
    return (
        f"without Triton, which does not work here ({error}), mixing and DALI's RandAugment are slower" if error else ""
    )


def batch_norm_sizes(config: Config, step: TrainStep, student: nn.Module) -> list[int]:
    """The numbers of images over which BatchNorm normalises if it is not over a mixing group; [] if it is."""
    sizes = step.division.all_sizes
    is_recipe = sizes == [config.augment.mix_group] or config.run.batch_norm == "sync" or not batch_norms(student)
    return [] if is_recipe else sizes


def batch_norm_note(sizes: list[int], group: int) -> str:
    """What `batch_norm_sizes` found as a note for the user; "" for []."""
    if not sizes:
        return ""
    return (
        f"BatchNorm normalises over {' or '.join(map(str, sizes))} images; the recipe's is a mixing group, here {group}"
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates the raw and the EMA weights of a run: `evaluator()`. Every rank must call it."""

    state: TrainState
    images: EvalPass

    def __call__(self, interrupted: Callable[[], bool] = lambda: False) -> Evaluation:
        """The metrics of each kind of weights; {} if `interrupted` returned True, on all ranks at once."""
        weights = {"raw": self.state.student}
        if self.state.ema is not None:
            weights["ema"] = self.state.ema.module
        return cast(Evaluation, self.images.accuracy(weights, interrupted))  # metrics.jsonl stores it as a plain dict.

    def one_batch(self) -> Evaluation:
        """The metrics of the first validation images, on this rank alone."""
        plan, world = self.images.plan.first(self.images.batch), self.images.world.by_itself()
        return Evaluator(self.state, dataclasses.replace(self.images, plan=plan, world=world))()


def open_evaluator(
    config: Config,
    splits: dict[str, ShardIndex],
    pipelines: Pipelines,
    interpolation: str,
    normalize: Normalize,
    state: TrainState,
    world: World,
) -> Evaluator | None:
    """The evaluator, in the precision of the normalised images; None without a validation set."""
    if "val" not in splits:
        return None
    plan = EvalPlan(splits["val"], config.data.eval_size, config.data.eval_crop_pct, interpolation)
    images = EvalPass(normalize, pipelines.of["val"], plan, config.run.eval_batch, normalize.dtype, world)
    return Evaluator(state, images)


def build_step(
    make_step: Callable[..., TrainStep],
    compiler: Compiler,
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    pipelines: Pipelines,
    evaluator: Evaluator | None,
    world: World,
) -> tuple[TrainStep, list[str]]:
    """The update, with the micro-batch that it sets in the state, and notes for the user, which may be "".

    Raises:
      UserError: as `choose_micro_batch` and `warmed_up_step`.
    """
    try_evaluation = evaluator.one_batch if evaluator is not None else lambda: None
    micro_batch_note = choose_micro_batch(config, plan, state, pipelines, world, make_step, try_evaluation)
    step, warm_up_note = warmed_up_step(make_step, config, plan, state, world, compiler)
    sizes = batch_norm_sizes(config, step, state.student)
    return step, [micro_batch_note, batch_norm_note(sizes, config.augment.mix_group), warm_up_note]
