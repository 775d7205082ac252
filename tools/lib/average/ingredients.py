"""Checkpoints to average: read one after the other, and checked to be of one model."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from pipelines.common.errors import UserError
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
    """The checkpoints one after the other; only one of them and the first are in memory.

    Raises:
      UserError: as `read`, or one of them is not of the first one's model, or its weights not of the same kind.
    """
    first, console = None, Console(stderr=True)
    for path in track(paths, "reading", console=console, transient=True, disable=not console.is_terminal):
        each = read(path, which)
        first = first or each
        check_same_model(each, first)
        if each.kind != first.kind:
            raise UserError(
                f"{each.path}: gives {each.kind} weights, {first.path} {first.kind} ones. Choose with --weights ema or "
                "--weights raw, or leave one of them out"
            )
        yield each


def check_same_model(other: Ingredient, first: Ingredient) -> None:
    """Raise a UserError that names the first thing in which two checkpoints' models differ."""
    names = [f"{each.path}" for each in (other, first)]
    for key in ("name", "kwargs"):
        ours, theirs = (each.origin["config"]["student"].get(key) for each in (other, first))
        _check_equal(f"student.{key}", ours, theirs, *names)
    ours, theirs = (each.origin.get("classes") or [] for each in (other, first))
    _check_equal("the number of classes", len(ours), len(theirs), *names)
    for output, pair in enumerate(zip(ours, theirs, strict=True)):
        _check_equal(f"the class of output {output}", *pair, *names)
    ours, theirs = ({name: list(value.shape) for name, value in each.weights.items()} for each in (other, first))
    for name in [*theirs, *ours]:
        _check_equal(f"the shape of '{name}'", ours.get(name), theirs.get(name), *names)


def _check_equal(what: str, ours: object, theirs: object, path: str, other: str) -> None:
    if ours != theirs:
        raise UserError(
            f"{path}: of another model than {other}: {what} is {ours}, there it is {theirs}. Average checkpoints of "
            "one model"
        )


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
