"""Predictions of a trained model for a split, and the report about them, for commands that make or read one."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from typing_extensions import NotRequired

from pipelines.common.errors import UserError, clipped
from pipelines.common.settings import Section, setting
from pipelines.shards.index import ShardIndex
from tools.lib.common.terminal import tracked
from trainer.cluster.world import World
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
