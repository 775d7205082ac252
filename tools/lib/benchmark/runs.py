"""Training runs as the benchmarks measure them: the recipe, with the models, images and batch that are asked for."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipelines.common.errors import UserError
from tools.lib.common.timing import timed_on_device
from trainer.builder import Run, build
from trainer.cluster.world import alone
from trainer.config.sections import Config, parse
from trainer.models.factory import create_model

CLASSES = 1000
_FEWEST, _MOST = 3, 100  # updates of a turn
_GROUP = 128  # the recipe's mix_group
LAST = 10**9  # a step that no benchmark comes to


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the rows of a table share.

    Attributes:
      model: the student.
      teacher: its name; None is no teacher.
      weights: the teacher's file.
      batch: images an update, in one forward pass.
      size: side of the images, pixels.
      precision: bf16 or fp32.
      compiled: whether the models are.
      classes: of the images.
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
        learns = f"{self.model} from {self.teacher}" if self.teacher else f"{self.model} alone"
        compiled = "compiled" if self.compiled else "not compiled"
        return f"{learns}, batches of {self.batch}, {self.size} px, {self.precision}, {compiled}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward passes."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    def described(self) -> dict:
        """The part of a row that says what was measured."""
        fields = ("model", "teacher", "batch", "size", "precision", "compiled")
        return {"setting": self.title, **{name: getattr(self, name) for name in fields}}


def resolve(precision: str, device: torch.device) -> str:
    """The benchmark's precision; auto is bf16 on a GPU, fp32 on a CPU.

    Raises:
      UserError: another word.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision is '{precision}', not auto, bf16 or fp32")
    return precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def compiled_or_not(answer: str) -> tuple[bool, ...]:
    """What --compile asks for; what takes minutes to compile comes last.

    Raises:
      UserError: another word.
    """
    answers = {"no": (False,), "yes": (True,), "both": (False, True)}
    if answer not in answers:
        raise UserError(f"--compile is '{answer}', not one of {', '.join(answers)}")
    return answers[answer]


def teacher_or_none(name: str) -> str | None:
    """The teacher that --teacher names; null is no teacher, as for the trainer."""
    return None if name == "null" else name


def random_weights(name: str, classes: int, size: int, folder: Path) -> Path:
    """A file of random weights for a model: how good a teacher is makes no difference to how fast it is."""
    torch.manual_seed(0)
    path = folder / f"{name}.pt"
    torch.save(create_model(name, classes, size, {}).state_dict(), path)
    return path


def open_run(setting: Setting, out: Path, data: Sequence[object] = ()) -> Run:
    """A run of the product, built: over the images that `data`, options of the trainer, name, or over synthetic ones.

    Nothing has been trained yet.
    """
    world = alone()
    return build(_config(setting, out, data), world)


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


def updates_of_a_turn(update: Callable[[], object], seconds: float) -> int:
    """How many updates a candidate makes in a turn: so many seconds of what `update` makes one of, within bounds."""
    return max(_FEWEST, min(_MOST, round(seconds / timed_on_device(update)())))


def release_memory() -> None:
    """Give back the memory of models that nothing refers to any more, and forget what was compiled for them."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
