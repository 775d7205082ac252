"""The configuration: frozen dataclasses, filled from YAML files and `--section.key value` overrides.

Every default stands here (or beside what it configures) once; the defaults are the USI recipe.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines import PipelineConfig
from pipelines.common.errors import UserError, naming_settings
from pipelines.common.settings import Section, check, setting
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import LARGEST_SIDE, check_cycle, size_schedule
from trainer.config.cli import parse_settings
from trainer.config.model_arguments import Kwargs, check_kwargs

Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
_MOST_EPOCHS = 10**6


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class ImagesConfig(PipelineConfig):
    """Where images come from, whatever they are for, and how they are decoded.

    Attributes:
      root: dataset folder made by tools/shard_imagenet.py. Only the synthetic pipeline needs none.
    """

    key = "data"
    root: Path | None = setting(None, recipe=False, per_machine=True)

    def option(self, name: str, value: object) -> str:
        """How a message advises another value of a setting."""
        return f"--data.{name} {value}"


@dataclasses.dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """The images of a run.

    Attributes:
      max_bad_fraction: of the images of a split; the run ends when more are damaged. A single one never ends it, unless
        this is 0.
      shuffle: global shuffles all training images together; window shuffles the shards, then the images of
        window_shards shards that follow each other, so that fewer files are read from at a time.
      window_shards: shards in a window, where shuffle is window.
      image_size: side of the training image, pixels; or a list of [epoch, size], each size from its epoch on.
      eval_image_size: side of the validation image, pixels; 0 is image_size, the last one of a list.
      eval_crop_pct: validation resizes the short side to floor(eval_image_size / eval_crop_pct).
      synthetic_samples: images in the synthetic dataset, where there is no root.
      synthetic_classes: its classes.
    """

    max_bad_fraction: float = setting(0.001, at_least=0, at_most=1, recipe=False)
    shuffle: Literal["global", "window"] = setting("global", on_resume="refused", plan_field="window_shards")
    window_shards: int = setting(16, at_least=1, recipe=False, on_resume="refused", plan_field="window_shards")
    image_size: int | list[tuple[int, int]] = setting(224, on_resume="refused", plan_field="image_size")
    eval_image_size: int = setting(0, at_least=0, at_most=LARGEST_SIDE)
    eval_crop_pct: float = setting(0.95, above=0, at_most=1)
    synthetic_samples: int = setting(1_281_167, at_least=1, at_most=10**8, recipe=False)
    synthetic_classes: int = setting(1000, at_least=1, at_most=10**6, recipe=False)

    def __post_init__(self):
        super().__post_init__()
        with naming_settings(image_size="data.image_size"):
            size_schedule(self.image_size)

    @property
    def train_sizes(self) -> list[int]:
        """Sides of the training images, pixels, in the order of the run."""
        return [size for _, size in size_schedule(self.image_size)]

    @property
    def eval_size(self) -> int:
        """Side of the validation image, pixels."""
        return self.eval_image_size or self.train_sizes[-1]


@dataclasses.dataclass(frozen=True)
class StudentConfig(Section):
    """The model that is trained.

    Attributes:
      name: any timm model; also hf-hub:ORGANISATION/REPOSITORY, or local-dir:FOLDER.
      checkpoint: weights to start from; random where there is none. Where they are of other classes than the dataset,
        the classifier starts from scratch.
      pretrained: start from timm's weights, which are downloaded; the same holds for their classifier.
      kwargs: passed to timm.create_model.
      classes: text file that names the outputs of the weights to start from in their order, one class on a line, as the
        dataset's manifest names them; the classifier is put into the dataset's order. Without it a checkpoint of this
        trainer names them itself.
      seed: of the initial weights and dropout, and not of the images, which run.seed decides; null is run.seed.
    """

    key = "student"
    name: str = setting("resnet50", recipe=False, on_resume="refused")
    checkpoint: Path | None = setting(None, per_machine=True)
    pretrained: bool = False
    kwargs: Kwargs = setting(factory=dict, on_resume="refused")
    classes: Path | None = setting(None, recipe=False, per_machine=True)
    seed: int | None = setting(None, at_least=0, below=2**63, recipe=False, on_resume="refused")

    def __post_init__(self):
        super().__post_init__()
        check_kwargs("student", self.kwargs)
        _require(
            self.classes is None or self.pretrained or self.checkpoint is not None,
            f"student.classes is {self.classes}, and there are no weights whose outputs it could name: set "
            "student.checkpoint or student.pretrained, or leave student.classes out",
        )
        _require(
            not self.pretrained or self.checkpoint is None,
            f"student.pretrained is true and student.checkpoint is {self.checkpoint}: start from one of them",
        )


@dataclasses.dataclass(frozen=True)
class OtherTeacher:
    """A frozen model that is learned from.

    Attributes:
      name: any timm model, the authors' tresnet_l_v2, hf-hub:ORGANISATION/REPOSITORY, or local-dir:FOLDER; no teacher
        means labels alone.
      checkpoint: its weights: timm's, the authors' own file, or a checkpoint of this trainer, of which the EMA
        is taken; without it timm's pretrained weights are downloaded.
      kwargs: passed to timm.create_model.
      image_size: side of the image it sees, pixels, throughout the run; the mixed image is resized. 0 is the student's.
      classes: text file that names its outputs in their order, one class on a line, as the dataset's manifest names
        them; it may have more classes than the dataset. Without it a checkpoint of this trainer names them itself, and
        the outputs of any other are taken to be in the dataset's order.
      store: folder with its recorded outputs (tools/record_teacher.py), which are replayed: no model is built. The
        store then says what the other settings are; one that is given here must be the same.
    """

    name: str | None
    checkpoint: Path | None = setting(None, recipe=False, per_machine=True)
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    image_size: int = setting(0, at_least=0, at_most=LARGEST_SIDE)
    classes: Path | None = setting(None, recipe=False, per_machine=True)
    store: Path | None = setting(None, per_machine=True)


@dataclasses.dataclass(frozen=True)
class TeacherConfig(OtherTeacher, Section):
    """The frozen model, or models, that are learned from.

    Attributes:
      precision: of the teachers' forward passes, auto, bf16, fp16 or fp32; auto is the student's in a run, and fp16 on
        a GPU when a teacher is recorded. In bf16 the outputs of networks with depthwise convolutions move much more
        than in fp16 (docs/teacher-store.md).
      others: further teachers, each with name, checkpoint, kwargs, image_size, classes and store of its own; the
        student learns from the mean of all probabilities.
    """

    key, on_resume = "teacher", "reported"
    name: str | None = "tresnet_v2_l"
    precision: Precision = "auto"
    others: list[OtherTeacher] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        for key, teacher in self.members:
            check(teacher, key)
            check_kwargs(key, teacher.kwargs)
            _require(
                teacher.name is not None or teacher.store is not None,
                f"{key}.name is null: name the model, or leave the teacher out",
            )
            _require(
                teacher.store is None or teacher.classes is None,
                f"{key}.classes is {teacher.classes} and {key}.store is {teacher.store}: recorded outputs are in the "
                f"dataset's order already. Leave {key}.classes out",
            )
        for name in ("checkpoint", "image_size", "classes", "others"):
            _require(
                self.name is not None or self.store is not None or not getattr(self, name),
                f"teacher.{name} is {getattr(self, name)}, but teacher.name is null: name the model, or leave both out",
            )

    @property
    def members(self) -> list[tuple[str, OtherTeacher]]:
        """Every teacher under its key: the first one, without its others, is `teacher`."""
        is_there = self.name is not None or self.store is not None
        first: list[tuple[str, OtherTeacher]] = [("teacher", self)] if is_there else []
        return first + [(f"teacher.others[{i}]", other) for i, other in enumerate(self.others)]

    @property
    def title(self) -> str | None:
        """All names in one."""
        names = [f"{teacher.name}{', recorded' if teacher.store else ''}" for _, teacher in self.members]
        return " + ".join(names) or None


@dataclasses.dataclass(frozen=True)
class DistillConfig(Section):
    """The loss: label_weight x cross-entropy + weight x temperature^2 x KL(teacher || student).

    Attributes:
      weight: of the divergence from the teacher.
      label_weight: of the cross-entropy with the mixed labels; 0 learns from the teacher alone.
      temperature: divides both models' logits in the divergence.
      label_smoothing: fraction of each label that is spread evenly over all classes, in the cross-entropy.
    """

    key, on_resume = "distill", "reported"
    weight: float = setting(5.0, at_least=0)
    label_weight: float = setting(1.0, at_least=0)
    temperature: float = setting(1.0, above=0)
    label_smoothing: float = setting(0.0, at_least=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.weight > 0 or self.label_weight > 0,
            "distill.weight and distill.label_weight are both 0: nothing would be learned. Raise one of them",
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW.

    Attributes:
      lr: peak learning rate; not scaled with the batch size.
      betas: decay of the running averages.
      eps: added to the root of the second moment.
      weight_decay: decoupled; none on 1-D parameters, biases and what the model itself excludes.
      clip_norm: norm that the gradients of all parameters together are cut to; 0 cuts nothing.
      clip_agc: adaptive clipping: fraction of the norm of each unit's weights that the norm of its gradient is cut to,
        the classifier left out (0.01 in arXiv 2102.06171); 0 cuts nothing. Not together with clip_norm.
    """

    key, on_resume = "optim", "reported"
    lr: float = setting(2e-3, at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), at_least=0, below=1)
    eps: float = setting(1e-8, at_least=0)
    weight_decay: float = setting(2e-2, at_least=0)
    clip_norm: float = setting(0.0, at_least=0)
    clip_agc: float = setting(0.0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        _require(
            not (self.clip_norm and self.clip_agc),
            f"optim.clip_norm is {self.clip_norm} and optim.clip_agc is {self.clip_agc}: set one of them to 0",
        )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Section):
    """The learning rate, a step function of the epoch.

    Attributes:
      epochs: length of the cosine, warm-up included.
      warmup_epochs: linear from warmup_lr towards optim.lr.
      warmup_lr: at epoch 0.
      min_lr: end of the cosine, and the rate of the cooldown.
      cooldown_epochs: added after the cosine.
    """

    key, on_resume = "schedule", "reported"
    epochs: int = setting(300, at_least=1, at_most=_MOST_EPOCHS)
    warmup_epochs: int = setting(5, at_least=0)
    warmup_lr: float = setting(1e-4, at_least=0)
    min_lr: float = setting(1e-6, at_least=0)
    cooldown_epochs: int = setting(10, at_least=0, at_most=_MOST_EPOCHS)

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.warmup_epochs < self.epochs,
            f"schedule.warmup_epochs is {self.warmup_epochs}; it must be shorter than schedule.epochs, {self.epochs}",
        )

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, with the cooldown."""
        return self.epochs + self.cooldown_epochs


@dataclasses.dataclass(frozen=True)
class EmaConfig(Section):
    """The exponential moving average of the weights, BatchNorm buffers included.

    Attributes:
      decay: decay of the EMA at every update; 0 keeps no EMA.
      warmup: lower at first, (1 + t) / (10 + t) after t updates until that reaches decay, so that the initial weights
        are soon forgotten.
    """

    key, on_resume = "ema", "reported"
    decay: float = setting(0.99996, at_least=0, below=1)
    warmup: bool = False


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """The run itself.

    Attributes:
      out: run folder: config.yaml, checkpoints, metrics.jsonl, summary.json. A run that is there is resumed.
      seed: of the plan, and of the student where student.seed is null.
      device: auto, cuda or cpu.
      global_batch: images an update, over all ranks and micro-batches.
      micro_batch: the most images a forward pass on one rank, an even number; 0 is a mixing group; auto is the largest
        that fits the GPU's memory, which is tried before a run begins. BatchNorm sees a micro-batch at a time, so with
        it the result depends on this.
      precision: auto, bf16, fp16 or fp32; auto is bf16 on GPUs that have it, fp16 on others, fp32 on CPUs.
      tf32: GPUs may round the factors of float32 matrix products and convolutions to TensorFloat-32.
      batch_norm: which running statistics BatchNorm has after an update. reduce: the mean over all ranks; broadcast:
        rank 0's; none: each rank its own, also in evaluation; sync: layers normalise over the micro-batches of all
        ranks together (SyncBatchNorm, GPUs alone). On a rank always the mean over its micro-batches.
      channels_last: memory format of both models.
      compile: whether both models and the loss go through torch.compile; auto does it on GPUs,
        where it works, but not with run.batch_norm sync. It takes a minute or so before the first step, less where
        torch's cache is warm.
      eval_every: epochs between evaluations; the last epoch is always evaluated.
      eval_batch: validation images a forward pass on one rank (micro_batch auto makes room), or a recorder's images.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of the newest are kept; the best weights are in best.pt besides.
      keep_every: keep every n-th checkpoint permanently; 0 keeps none.
      on_nonfinite: what a loss that is not finite does: stop ends the run; rollback goes back to the newest checkpoint
        and tries again once, then ends the run.
      log_every: steps between lines in metrics.jsonl.
      loggers: who gets these lines, too: tensorboard, wandb.
      stop_after_steps: end early, with a checkpoint, once the run has done this many steps in all; 0 never does.
      ready_s: seconds within which all ranks must have come, and then have made their first collective.
      watchdog_s: seconds without progress after which the run is ended, naming the rank that stopped; 0 never does it.
    """

    key = "run"
    out: Path = setting(Path("runs/default"), recipe=False, per_machine=True)
    seed: int = setting(0, at_least=0, below=2**63, recipe=False, on_resume="refused", plan_field="seed")
    device: Device = setting("auto", recipe=False, per_machine=True, one_per_process=True)
    global_batch: int = setting(1024, at_least=1, on_resume="refused", plan_field="global_batch")
    micro_batch: int | Literal["auto"] = setting(0, at_least=0, on_resume="reported")
    precision: Precision = setting("auto", one_per_process=True, on_resume="reported")
    # The recipe computes in half precision, and what autocast leaves in float32 loses no more than that: TF32 has the
    # 10 bits of fp16's mantissa and float32's range. PyTorch's own default is true for convolutions and false for
    # products; the authors left both alone, on GPUs without TF32.
    tf32: bool = setting(True, recipe=False, one_per_process=True, on_resume="reported")
    batch_norm: Literal["reduce", "broadcast", "none", "sync"] = setting("reduce", on_resume="reported")
    channels_last: bool = setting(True, recipe=False, one_per_process=True)
    compile: bool | Literal["auto"] = setting("auto", one_per_process=True)
    eval_every: int = setting(1, at_least=1, recipe=False)
    eval_batch: int = setting(128, at_least=1, recipe=False)
    checkpoint_every: int = setting(1000, at_least=1, recipe=False)
    keep_checkpoints: int = setting(2, at_least=1, recipe=False)
    keep_every: int = setting(0, at_least=0, recipe=False)
    on_nonfinite: Literal["stop", "rollback"] = setting("stop", recipe=False)
    log_every: int = setting(50, at_least=1, recipe=False)
    loggers: list[Literal["tensorboard", "wandb"]] = setting(factory=list, recipe=False)
    stop_after_steps: int = setting(0, at_least=0, recipe=False)
    ready_s: float = setting(60, above=0, recipe=False)
    watchdog_s: float = setting(900, at_least=0, recipe=False)

    def __post_init__(self):
        super().__post_init__()
        _require(not 0 < self.watchdog_s < 1, f"run.watchdog_s is {self.watchdog_s}; it is 0 or at least 1")
        _require(len({*self.loggers}) == len(self.loggers), f"run.loggers is {self.loggers}: name each once")
        _require(self.out != Path(), "run.out is empty: name the run's folder")
        _require(
            self.micro_batch != "auto" or self.batch_norm != "sync",
            "run.micro_batch is auto and run.batch_norm is sync, whose layers wait for all ranks, so that none can try "
            "alone: set run.micro_batch to a number",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections; each goes to the builder that needs it and to nothing else."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self):
        _require(
            self.teacher.members or self.distill.label_weight > 0,
            "distill.label_weight is 0 and teacher.name is null: nothing would be learned. Name a teacher, or raise it",
        )
        epoch, size = size_schedule(self.data.image_size)[-1]
        _require(
            epoch < self.schedule.total_epochs,
            f"data.image_size: {size} px begin with epoch {epoch}, but the run ends after "
            f"{self.schedule.total_epochs} epochs: let them begin earlier, or raise schedule.epochs",
        )
        with naming_settings(image_size="data.image_size"):
            check_cycle(self.data.image_size, self.augment.cycle_epochs)

    @property
    def student_seed(self) -> int:
        """The seed of the student's initial weights and dropout."""
        return self.run.seed if self.student.seed is None else self.student.seed

    @classmethod
    def load(cls, path: Path | str | None = None, overrides: Mapping[str, object] | None = None) -> "Config":
        """The configuration in a YAML file, or the defaults, with some settings changed.

        Args:
          overrides: SECTION.NAME -> value, as Python has it.
        Raises:
          UserError: as for the command line.
        """
        arguments = [] if path is None else ["--config", str(path)]
        for name, value in (overrides or {}).items():
            text = str(value) if isinstance(value, (str, Path)) else json.dumps(value)  # JSON is YAML.
            arguments.append(f"--{name}={text}")
        return parse(arguments)


def parse(arguments: list[str] | None = None, prog: str | None = None) -> Config:
    """The configuration of a command line, as `parse_settings`; `--audit` is a flag that it lets pass."""
    flags = {"audit": "list what differs from the USI recipe, and train nothing"}
    return parse_settings(Config, arguments, prog=prog, description="Train a student from a teacher.", flags=flags)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values for YAML, JSON and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The configuration as a file that `--config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
