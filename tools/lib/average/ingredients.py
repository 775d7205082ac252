"""Checkpoints to average: read one after the other, and checked to be of one model."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipelines.common.errors import UserError
from tools.lib.common.terminal import tracked
from trainer.evaluation.trained import Kind
from trainer.models.checkpoint_format import is_of_trainer, not_finite
from trainer.models.files.weights import read_file, select_weights
from trainer.state.checkpoint_settings import with_defaults

Weights = dict[str, torch.Tensor]
# The fields about their run that OUT.pt takes over from one of the checkpoints.
_OF_THE_RUN = ("step", "format_version", "plan", "config", "audit", "classes", "software")


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """A checkpoint's weights.

    Attributes:
      path: the file.
      weights: by name; `kind` says which ones of the file: ema or raw.
      origin: the file's fields about its run (_OF_THE_RUN).
      differ: settings in which the files differ that it is an average of; [] for a run's own checkpoint.
    """

    path: Path
    weights: Weights
    kind: str
    origin: dict[str, Any]
    differ: list[str]


def read(path: Path, which: Kind) -> Ingredient:
    """One checkpoint's weights.

    Raises:
      UserError: it cannot be read, is damaged or not of this trainer, or its weights are not finite.
    """
    content: dict[str, Any] = read_file(path)
    if not is_of_trainer(content):
        raise UserError(f"{path}: not a checkpoint of this trainer. Give step-N.pt, best.pt or a run's folder")
    weights, kind = select_weights(path, content, which)
    if name := not_finite(weights.items()):
        raise UserError(f"{path}: '{name}' is not finite, and no average with it would be. Leave the file out")
    differ: list[str] = content.get("average", {}).get("differ", [])
    return Ingredient(path, weights, kind, {key: content[key] for key in _OF_THE_RUN if key in content}, differ)


def read_alike(paths: list[Path], which: Kind) -> Iterator[Ingredient]:
    """The checkpoints one after the other; only one of them is in memory.

    Raises:
      UserError: as `read`, or one of them is not of the first one's model, or its weights not of the same kind. The
        message names the first difference.
    """
    first = {}
    for path in tracked(paths, "reading"):
        each = read(path, which)
        identity = _identity(each)
        first = first or identity
        for name in (*first, *identity):
            if identity.get(name) != first.get(name):
                raise UserError(
                    f"{path}: does not fit {paths[0]}: {name} is {identity.get(name)}, there it is {first.get(name)}. "
                    "Average checkpoints of one model, and with --weights ema or raw one kind of weights"
                )
        yield each


def _identity(each: Ingredient) -> dict[str, object]:
    """Return the facts that averaged checkpoints must share, by their names in messages."""
    student = each.origin["config"]["student"]
    return {
        **{f"student.{key}": student.get(key) for key in ("name", "kwargs")},
        "the kind of weights": each.kind,
        **{f"the class of output {i}": name for i, name in enumerate(each.origin.get("classes") or ())},
        **{f"the shape of '{name}'": list(value.shape) for name, value in each.weights.items()},
    }


def differing(parts: list[Ingredient]) -> list[str]:
    """The settings in which the runs of checkpoints differ: run.seed, optim.lr, ...; plan.dataset is the dataset.

    Runs that differ in nothing else have another run.out; [] says that the checkpoints are of one run.
    """
    found = {name for each in parts for name in each.differ}
    first, *others = map(_settings, parts)
    for other in others:
        found |= {name for name in {**first, **other} if first.get(name) != other.get(name)}
    return sorted(found)


def _settings(each: Ingredient) -> dict[str, object]:
    config = with_defaults(each.origin["config"])
    settings = {f"{section}.{name}": value for section, values in config.items() for name, value in values.items()}
    return {**settings, "plan.dataset": each.origin.get("plan", {}).get("dataset")}
