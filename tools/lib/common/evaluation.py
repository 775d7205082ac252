"""Predictions of a trained model for a split, the settings of that, and the report, for commands that need these."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import torch
from typing_extensions import NotRequired

from pipelines.common.errors import UserError, clipped
from pipelines.common.files import check_parent_folder
from pipelines.common.settings import Section, setting
from pipelines.plan.plan import LARGEST_SIDE
from pipelines.shards.index import ShardIndex
from tools.lib.common.terminal import tracked
from trainer.cluster.world import World
from trainer.config.model_arguments import Kwargs, check_kwargs
from trainer.config.sections import Device, ImagesConfig, Precision
from trainer.evaluation.metrics import Predictions, RealAccuracy, Summary
from trainer.evaluation.predict import Classifier, EvalPass, num_eval_batches
from trainer.evaluation.trained import TrainedModel
from trainer.feed import choose_decode, open_configured_pipeline
from trainer.models.normalize import Normalize
from trainer.update.precision import allow_tf32, resolve_precision

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ForwardConfig(Section):
    """The forward pass.

    Attributes:
      device: auto, cuda or cpu.
      precision: auto, bf16, fp16 or fp32; auto is bf16 on GPUs that have it, fp16 on others, fp32 on CPUs.
      tf32: GPUs may round the factors of float32 matrix products and convolutions to TensorFloat-32.
      channels_last: memory format.
      batch: images a forward pass on one rank.
    """

    key = "run"
    device: Device = "auto"
    precision: Precision = "auto"
    tf32: bool = True
    channels_last: bool = True
    batch: int = setting(128, at_least=1)


@dataclasses.dataclass(frozen=True)
class EvalDataConfig(ImagesConfig):
    """The images.

    Attributes:
      root: dataset folder made by tools/shard_imagenet.py.
      pipeline: auto, dali or torchvision; auto is DALI with a GPU, torchvision without.
      split: the name of one of the dataset's splits.
      image_size: side of the image, pixels; 0 is the model's own.
      crop_pct: the image is resized to floor(image_size / crop_pct) before the crop; 0 is the model's own.
      crop_mode: center resizes the short side, squash both; empty is the model's own.
      interpolation: bicubic or bilinear; empty is the model's own.
      real_labels: JSON file with several labels for each image, or none: ImageNet-ReaL's real.json, or an object
        {key: [classes]}; the word imagenet takes the copy of ReaL's that timm ships.
    """

    root: Path | None = None
    pipeline: Literal["auto", "dali", "torchvision"] = "auto"
    split: str = "val"
    image_size: int = setting(0, at_least=0, at_most=LARGEST_SIDE)
    crop_pct: float = setting(0.0, at_least=0)  # EvalTransform has the upper bound, and says why.
    crop_mode: Literal["", "center", "squash"] = setting("", may_be_empty=True)
    interpolation: Literal["", "bicubic", "bilinear"] = setting("", may_be_empty=True)
    real_labels: Path | None = None

    @property
    def transform(self) -> dict[str, Any]:
        """The fields of EvalTransform that are not to be the model's own."""
        fields = ("image_size", "crop_pct", "crop_mode", "interpolation")
        return {name: getattr(self, name) for name in fields if getattr(self, name)}


@dataclasses.dataclass(frozen=True)
class EvalStudentConfig(Section):
    """The model.

    Attributes:
      name: timm's name; a checkpoint of this trainer and an exported folder say it themselves. Without a checkpoint
        timm's pretrained weights are downloaded.
      checkpoint: file of weights, a run's folder (its best weights), or a folder that tools/export.py wrote.
      weights: ema, raw, or auto: the EMA if there is one, and of a run the best.
      kwargs: passed to timm.create_model, besides or instead of what the checkpoint says.
      classes: text file that names the outputs in their order, one on a line, as the dataset's manifest names classes;
        there may be more of them than the dataset has. Without it a checkpoint of this trainer names them itself.
    """

    key = "student"
    name: str | None = None
    checkpoint: Path | None = None
    weights: Literal["auto", "ema", "raw"] = "auto"
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    classes: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        check_kwargs("student", self.kwargs)


@dataclasses.dataclass(frozen=True)
class EvalRunConfig(ForwardConfig):
    """How it is computed.

    Attributes:
      json: file for the whole report.
      predictions: file, NAME.npz, for what the model says of each image, in the order of the split: arrays of NumPy
        sample and label (int64 [N]), top (int64 [N, K], the best classes, best first), confidence and loss (float32
        [N]).
      ready_s: seconds within which all ranks must have come.
    """

    json: Path | None = None
    predictions: Path | None = None
    ready_s: float = setting(60, above=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("json", "predictions"):
            if (path := getattr(self, name)) is not None:
                check_parent_folder(path, f"run.{name} is {path}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """All settings of tools/evaluate.py."""

    data: EvalDataConfig = dataclasses.field(default_factory=EvalDataConfig)
    student: EvalStudentConfig = dataclasses.field(default_factory=EvalStudentConfig)
    run: EvalRunConfig = dataclasses.field(default_factory=EvalRunConfig)


# A class that images of another class are taken for, and how many percent of these.
TakenFor = TypedDict("TakenFor", {"class": str, "percent": float})
# A class: its words, number of images, top-1 in percent (None without images), and what it is taken for.
ClassRow = TypedDict(
    "ClassRow", {"class": str, "words": str, "images": int, "top1": float | None, "taken_for": list[TakenFor]}
)


class Origin(TypedDict("_Transform", {"view": dict[str, Any]})):
    """What the numbers of a report belong to.

    The fields of the EvalTransform are under `view`; `weights` is ema, raw or "", and `digest` is the split's.
    """

    model: str
    source: str
    weights: str
    weights_digest: str
    step: int | None
    parameters: int
    outputs: int
    dataset: str
    split: str
    digest: str
    pipeline: str
    precision: str
    device: str
    ranks: int
    software: dict[str, str]


class Report(Origin, Summary):
    """What tools/evaluate.py writes with --run.json; `real` where labels for it were given."""

    real: NotRequired[RealAccuracy]
    classes: list[ClassRow]
    damaged: list[str]


def read_report(path: Path, use: Callable[[Report], T]) -> T:
    """Return what `use` makes of a file that tools/evaluate.py wrote with --run.json.

    Raises:
      UserError: the file cannot be read, or has not what `use` needs.
    """
    try:
        return use(json.loads(path.read_text(encoding="utf-8")))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else clipped(repr(error), 80)
        raise UserError(
            f"{clipped(path, 120)}: not an evaluation ({reason}). Write it with python tools/evaluate.py --run.json"
        ) from error


def predict_split(
    trained: TrainedModel,
    index: ShardIndex,
    order: list[int] | None,
    *,
    images: ImagesConfig,
    forward: ForwardConfig,
    world: World,
) -> tuple[Predictions, list[str]]:
    """Predictions for every image of a split, the same on every rank. Every rank must call it.

    Args:
      order: as of TrainedModel.order_of.
    Returns:
      The predictions; and a line for each sample that any rank has replaced by gray, with what is wrong with it.
    """
    module, normalize, precision = on_device(trained, world.device, forward)
    mine: list[tuple[int, str]] = []
    decode = choose_decode(images, index, world)["decode"]
    pipeline = open_configured_pipeline(images, index, world=world, decode=decode, on_bad=lambda *bad: mine.append(bad))
    eval_pass = EvalPass(normalize, pipeline, trained.transform.plan(index), forward.batch, precision, world)
    total = num_eval_batches(len(index), forward.batch, world)
    shown = functools.partial(tracked, description="evaluating", total=total, hidden=not world.is_main)
    found = eval_pass.predict({"": _in_order(module, order, world.device)}, shown=shown)
    everywhere = dict(world.all_gather(mine))
    return found[""], [f"{index.name(sample)}: {error}" for sample, error in sorted(everywhere.items())]


def on_device(
    trained: TrainedModel, device: torch.device, forward: ForwardConfig
) -> tuple[torch.nn.Module, Normalize, torch.dtype]:
    """The model and its normalisation on a device, and the precision of the forward pass."""
    precision = resolve_precision(forward.precision, device)
    if device.type == "cuda":
        allow_tf32(forward.tf32)
    memory_format = torch.channels_last if forward.channels_last else torch.contiguous_format
    return (
        in_memory_format(trained.module.to(device), memory_format),
        trained.normalize(precision).to(device),
        precision,
    )


def in_memory_format(module: torch.nn.Module, memory_format: torch.memory_format) -> torch.nn.Module:
    """The module, with its parameters in this format of memory."""
    return module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]: torch's stubs lack this argument


def _in_order(module: torch.nn.Module, order: list[int] | None, device: torch.device) -> Classifier:
    """The module with its outputs in the dataset's order of classes."""
    if order is None:
        return module
    outputs = torch.tensor(order, device=device)
    return lambda pixels: module(pixels).index_select(1, outputs)
