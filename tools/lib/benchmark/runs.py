"""Training runs as the benchmarks measure them: the recipe, with the models, images and batch that are asked for."""

import dataclasses
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from tools.lib.common.hardware import first_device
from tools.lib.common.timing import timed_on_device
from trainer.builder import Run, build
from trainer.cluster.world import alone
from trainer.config.sections import Config, parse
from trainer.models.factory import create_model
from trainer.update.precision import PRECISIONS, resolve_precision

CLASSES = 1000
LAST = 10**9  # No benchmark reaches this step.
_FEWEST, _MOST = 3, 100  # A timed run makes at least and at most this many updates.
_GROUP = 128  # This is the recipe's mix_group.


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the rows of a table share.

    Attributes:
      model: the student.
      teacher: its name; "null" is no teacher.
      weights: the teacher's file, if there is one.
      batch: images an update, in one forward pass.
      size: side of the images, pixels.
      precision: bf16, fp16 or fp32.
      compiled: whether the models are compiled.
    """

    model: str
    teacher: str
    weights: Path | None
    batch: int
    size: int
    precision: str
    compiled: bool

    @property
    def title(self) -> str:
        """The setting in words."""
        learns = f"{self.model} from {self.teacher}" if self.weights else f"{self.model} alone"
        compiled = "compiled" if self.compiled else "not compiled"
        return f"{learns}, batches of {self.batch}, {self.size} px, {self.precision}, {compiled}"


def settings(
    models: Sequence[str],
    teachers: Iterable[str],
    folder: Path,
    *,
    batch: int,
    size: int,
    precision: str,
    compile: str,
    classes: int = CLASSES,
) -> Iterator[Setting]:
    """Each model with each teacher, "null" for none; what takes minutes to compile is given last.

    Teachers get random weights, in `folder`: how good one is makes no difference to how fast it is. When the next
    setting is asked for, the memory of the last one's models is given back.

    Args:
      precision: auto, bf16 or fp32.
      compile: no, yes or both.
      classes: how many classes the images have.
    """
    dtype = resolve_precision(precision, first_device())
    resolved = next(name for name, other in PRECISIONS.items() if other == dtype)
    weights = {name: _random_weights(name, classes, size, folder) for name in teachers if name != "null"}
    compiled: list[bool] = {"no": [False], "yes": [True], "both": [False, True]}[compile]
    for is_compiled, model, teacher in itertools.product(compiled, models, teachers):
        yield Setting(model, teacher, weights.get(teacher), batch, size, resolved, is_compiled)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _random_weights(name: str, classes: int, size: int, folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / f"{name}.pt"
    torch.save(create_model(name, classes, size, {}).state_dict(), path)
    return path


def open_run(setting: Setting, folder: Path, data: Sequence[object] = ()) -> Run:
    """Build a run of the trainer that has trained nothing yet; the arguments are those of `run_config`."""
    return build(run_config(setting, folder, data), alone())


def run_config(setting: Setting, folder: Path, data: Sequence[object] = ()) -> Config:
    """The configuration of a run with a new folder in `folder`.

    Args:
      data: options of the trainer that name the images; without any they are synthetic.
    """
    group = _GROUP if setting.batch % _GROUP == 0 else setting.batch
    arguments = [
        *(data or ["--data.pipeline", "synthetic", "--data.synthetic_classes", CLASSES]),
        *("--data.image_size", setting.size),
        *("--augment.mix_group", group),
        *("--student.name", setting.model),
        *("--teacher.name", setting.teacher),
        *(["--teacher.checkpoint", setting.weights] if setting.weights else []),
        *("--run.out", tempfile.mkdtemp(dir=folder)),
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
