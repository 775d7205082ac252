"""Training runs as the benchmarks measure them: the recipe, with the models, images and batch that are asked for."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipelines.common.errors import UserError
from tools.lib.benchmark.results import Measured
from tools.lib.common.timing import timed_on_device
from trainer.builder import Run, build
from trainer.cluster.world import alone
from trainer.config.sections import Config, parse
from trainer.models.factory import create_model
from trainer.update.precision import PRECISIONS, resolve_precision

CLASSES = 1000
_FEWEST, _MOST = 3, 100  # A timed run makes at least and at most this many updates.
_GROUP = 128  # This is the recipe's mix_group.
LAST = 10**9  # No benchmark reaches this step.


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the rows of a table share.

    Attributes:
      model: the student.
      teacher: its name; None is no teacher.
      weights: the teacher's file.
      batch: images an update, in one forward pass.
      size: side of the images, pixels.
      precision: bf16, fp16 or fp32.
      compiled: whether the models are compiled.
      classes: how many classes the images have.
    """

    model: str
    teacher: str | None
    weights: Path | None
    batch: int
    size: int
    precision: str
    compiled: bool
    classes: int = CLASSES

    @property
    def title(self) -> str:
        """The setting in words; rows that share it are a table."""
        learns = f"{self.model} from {self.teacher}" if self.teacher else f"{self.model} alone"
        compiled = "compiled" if self.compiled else "not compiled"
        return f"{learns}, batches of {self.batch}, {self.size} px, {self.precision}, {compiled}"

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the forward passes."""
        return PRECISIONS[self.precision]

    def described(self) -> Measured:
        """The part of a row that says what was measured."""
        return {
            "setting": self.title,
            "model": self.model,
            "teacher": self.teacher,
            "batch": self.batch,
            "size": self.size,
            "precision": self.precision,
            "compiled": self.compiled,
        }


def resolve(precision: str, device: torch.device) -> str:
    """The benchmark's precision; auto is what a run takes on this device.

    Raises:
      UserError: another word.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision is '{precision}', not auto, bf16 or fp32")
    dtype = resolve_precision(precision, device)
    return next(name for name, other in PRECISIONS.items() if other == dtype)


def compiled_or_not(answer: str) -> tuple[bool, ...]:
    """Whether to compile, for each value of --compile; what takes minutes to compile comes last.

    Raises:
      UserError: another word.
    """
    answers = {"no": (False,), "yes": (True,), "both": (False, True)}
    if answer not in answers:
        raise UserError(f"--compile is '{answer}', not one of {', '.join(answers)}")
    return answers[answer]


def teacher_or_none(name: str) -> str | None:
    """The teacher that --teacher names; null is no teacher, as in the trainer."""
    return None if name == "null" else name


def random_weights(name: str, classes: int, size: int, folder: Path) -> Path:
    """Write random weights of a model to a file: how good a teacher is makes no difference to how fast it is."""
    torch.manual_seed(0)
    path = folder / f"{name}.pt"
    torch.save(create_model(name, classes, size, {}).state_dict(), path)
    return path


def open_run(setting: Setting, out: Path, data: Sequence[object] = ()) -> Run:
    """Build a run of the trainer that has trained nothing yet.

    Args:
      data: options of the trainer that name the images; without any they are synthetic.
    """
    return build(_config(setting, out, data), alone())


def _config(setting: Setting, out: Path, data: Sequence[object]) -> Config:
    group = _GROUP if setting.batch % _GROUP == 0 else setting.batch
    synthetic = ["--data.pipeline", "synthetic", "--data.synthetic_classes", setting.classes]
    teacher = ["--teacher.name", setting.teacher or "null"]
    arguments = [
        *(data or synthetic),
        *("--data.image_size", setting.size),
        *("--augment.mix_group", group),
        *("--student.name", setting.model),
        *(teacher if setting.weights is None else [*teacher, "--teacher.checkpoint", setting.weights]),
        *("--run.out", out),
        *("--run.global_batch", setting.batch),
        *("--run.micro_batch", setting.batch),
        *("--run.precision", setting.precision),
        *("--run.compile", str(setting.compiled).lower()),
        *("--run.checkpoint_every", LAST),
    ]
    return parse([str(argument) for argument in arguments])


def updates_per_timed_run(update: Callable[[], object], seconds: float) -> int:
    """How many updates take about `seconds`, within bounds; `update` makes one."""
    return max(_FEWEST, min(_MOST, round(seconds / timed_on_device(update)())))


def release_memory() -> None:
    """Give back the memory of models that are no longer used, and what was compiled for them."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
