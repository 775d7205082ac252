"""The fields of this trainer's own files, and what each must be.

A digest says that a file is what was written. Files of earlier versions have none, and whoever can write a file can
write its digest, so nothing here relies on it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn
from typing_extensions import NotRequired, TypedDict

from pipelines.common.errors import UserError, clipped
from pipelines.common.settings import fits, misfit
from trainer.config.natures import section_types
from trainer.config.recipe import AuditRow
from trainer.models.batch_norm import running_statistics
from trainer.models.files.torch_files import memory_for

FORMAT_VERSION = 1
# AdamW keeps these two tensors for each parameter, and the count "step". An optimizer with others changes this line.
OPTIMIZER_TENSORS = ("exp_avg", "exp_avg_sq")


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


class FieldError(ValueError):
    """A field that is missing, or is not what this trainer writes: the message names it."""


def is_plain(value: object) -> bool:
    """True for values as YAML has them, and lists and dictionaries of them."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _is_consistent(optimizer: dict) -> bool:
    """Whether each moment is of a parameter, which occurs once, and is what AdamW keeps."""
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len({*numbers}) < len(numbers) or not {*optimizer["state"]} <= {*numbers}:
        return False
    return all(
        {*state} == {"step", *OPTIMIZER_TENSORS}
        and state["step"].numel() == 1
        and all(state[name].is_floating_point() for name in OPTIMIZER_TENSORS)
        for state in optimizer["state"].values()
    )


def _are_numbers(metrics: dict) -> bool:
    """Whether all metrics are numbers; the loss may be infinite or NaN, which is written unchanged."""
    return all(isinstance(value, float) or fits(value, _Count) for value in metrics.values())


def _are_named(weights: dict) -> bool:
    return bool(weights) and all(isinstance(name, str) for name in weights)


_Count = Annotated[int, lambda value: 0 <= value <= 10**12]  # more steps than any run has
_Positive = Annotated[float, lambda value: 0 < value < 1e30]
_Percentage = Annotated[float, lambda value: 0 <= value <= 100]
_Kind = Literal["ema", "raw"]
_Weights = Annotated[dict[str, torch.Tensor], _are_named]
_Empty = Annotated[dict, lambda value: not value]


class _Best(TypedDict):
    step: _Count
    weights: _Kind
    top1: _Percentage


class _Group(TypedDict):
    params: list[_Count]


class _Optimizer(TypedDict):
    state: dict[int, dict[str, torch.Tensor]]
    param_groups: list[_Group]


class _Scaler(TypedDict):
    scale: _Positive
    growth_factor: _Positive
    backoff_factor: _Positive
    growth_interval: _Positive
    _growth_tracker: _Count


class _Metrics(TypedDict):
    images: _Count


class _AverageRow(TypedDict):
    step: _Count


class _Average(TypedDict):
    how: str
    of: list[_AverageRow]
    differ: NotRequired[list[str]]


class Content(TypedDict, total=False):
    """The fields of this trainer's files; TrainState documents what each is for. Other fields are left alone."""

    step: _Count
    config: Annotated[dict[str, dict], is_plain]
    plan: Annotated[dict[str, Any], is_plain]
    audit: list[AuditRow] | None
    stores: Annotated[dict[str, dict], is_plain]
    classes: list[str] | None
    software: dict[str, str] | None
    evaluated: _Count
    best: _Best | _Empty
    student: _Weights
    ema: _Weights | None
    optimizer: Annotated[_Optimizer, _is_consistent]
    scaler: _Scaler | _Empty
    micro_batch: _Count
    rank_statistics: list[list[torch.Tensor]]
    weights: _Kind
    top1: _Percentage
    metrics: Annotated[_Metrics, _are_numbers]
    state_dict: _Weights
    average: Annotated[_Average, is_plain]


# A run cannot be resumed without these.
RESUMED = ("step", "config", "plan", "student", "ema", "optimizer", "scaler")


def check_fields(content: dict) -> None:
    """Raise a FieldError that names the first field of a file that is not what it must be."""
    if name := misfit(content, Content):
        raise FieldError(f"'{name}' is {described(content[name])}, which this trainer never writes")


def check_resumable(content: dict, step: int) -> None:
    """Raise a FieldError if a run cannot be resumed from the content of a file, each part of which is checked.

    Args:
      step: that the file's name says.
    """
    if missing := [name for name in RESUMED if name not in content]:
        raise FieldError(f"'{missing[0]}' is missing")
    if content["step"] != step:
        raise FieldError(f"'step' is {content['step']:,}, and its name says {step:,}")
    if content.get("evaluated", 0) > step:
        raise FieldError(f"'evaluated' is {content['evaluated']:,}, and 'step' is {step:,}")
    if content["ema"] is None and content["config"].get("ema", {}).get("decay"):
        raise FieldError("'ema' is null, and its settings say that an EMA is kept")
    for state in content["optimizer"]["state"].values():
        if not 0 <= state["step"].item() <= step:
            raise FieldError(f"'optimizer' has done {state['step'].item():,} steps")
    if name := first_not_finite(content):
        raise FieldError(f"{name} is not finite")


def first_not_finite(content: dict) -> str:
    """The first tensor in a file that must be finite and is not, in words; "" for none. Fields may be absent."""
    for part in ("student", "ema", "state_dict"):
        if name := not_finite((content.get(part) or {}).items()):
            return f"'{name}' in '{part}'"
    for number, state in content.get("optimizer", {}).get("state", {}).items():
        if name := not_finite((name, state[name]) for name in OPTIMIZER_TENSORS if name in state):
            return f"'{name}' of parameter {number} in 'optimizer'"
    return ""


def check_moments(saved: dict, optimizer: torch.optim.Optimizer) -> None:
    """Raise a FieldError if what an optimizer knows is not of the parameters that another one has."""
    groups, present = saved["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
        raise FieldError("'optimizer' has other groups of parameters")
    for theirs, ours in zip(groups, present, strict=True):
        for number, parameter in zip(theirs["params"], ours["params"], strict=True):
            moments = saved["state"].get(number, {})
            for name, value in moments.items():
                if name != "step" and value.shape != parameter.shape:
                    shapes = f"{list(value.shape)}, the parameter {list(parameter.shape)}"
                    raise FieldError(f"'{name}' of parameter {number} in 'optimizer' has the shape {shapes}")


def check_statistics(saved: list[list[torch.Tensor]], model: nn.Module) -> None:
    """Raise a FieldError if running statistics are not those of a model, or of a model and its average."""
    own = [value.shape for value in running_statistics(model)]
    for rank, statistics in enumerate(saved):
        if [value.shape for value in statistics] not in (own, own * 2):
            raise FieldError(f"'rank_statistics' of rank {rank} have other shapes")


def wrong_setting(config: dict, names: Iterable[str]) -> str:
    """The first of some settings in a file that is of another type than the program's, in words; "" for none.

    Other versions may have had other types, so this is asked of the settings alone that are used.

    Args:
      config: as `check_fields` has let it pass; sections and settings that it lacks are left alone.
      names: SECTION.NAME of each.
    """
    kinds = section_types()
    for section, name in (each.split(".") for each in names):
        values = {key: value for key, value in config.get(section, {}).items() if key == name}
        if misfit(values, kinds[section]):
            return f"{section}.{name} = {described(values[name])}"
    return ""


def described(value: object) -> str:
    """A value in a few words."""
    if torch.is_tensor(value):
        return f"a tensor {list(value.shape)}"
    return f"{type(value).__name__} {clipped(value, 40)}"


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds an infinity or a NaN; whole numbers hold none."""
    return next((name for name, value in weights if value.is_floating_point() and not _is_finite(value)), None)


def _is_finite(value: torch.Tensor) -> bool:
    """Mostly one pass over the memory: a sum is finite only if all that is summed is."""
    value = value.float() if value.itemsize == 1 else value  # float8 has no arithmetic
    total = value.sum(dtype=torch.float32 if value.itemsize < 4 else None)
    return bool(total.isfinite()) or bool(value.isfinite().all())


def digest_of(content: Any) -> str:
    """sha256 over names, types, shapes and bytes of nested dictionaries, lists, tensors and plain values, in hex."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if torch.is_tensor(value):
            sha.update(f"{value.dtype} {list(value.shape)};".encode())
            value = value.resolve_conj().resolve_neg().contiguous()
            sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            sha.update(f"{len(value)} entries;".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, (list, tuple)):
            sha.update(f"{len(value)} items;".encode())
            for item in value:
                feed(item)
        else:
            sha.update(f"{value!r};".encode())

    feed(content)
    return sha.hexdigest()


def is_of_trainer(content: object) -> bool:
    """True if what a file holds is a checkpoint of this trainer, of any version, that names its student."""
    if not isinstance(content, dict) or not {"format_version", "config", "step"} <= content.keys():
        return False
    student = content["config"].get("student") if isinstance(content["config"], dict) else None
    return isinstance(student, dict) and "name" in student


def checked(path: Path, content: dict) -> dict:
    """What was read from a checkpoint of this trainer, without its digest; each field has the type of Content.

    Raises:
      UserError: it is of another format, or does not fit into memory.
      DamagedError: it is not what was written, or a field is not what that field must be.
    """
    version = content.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {clipped(version)}, this program reads {FORMAT_VERSION}. Use the version of the "
            "program that wrote it, or start a new run with another --run.out"
        )
    digest = content.pop("digest", None)  # Files of earlier versions have no digest.
    try:
        with memory_for(path):
            if digest is not None and digest != digest_of(content):
                raise FieldError(f"its content does not have the hash {clipped(digest, 15)} it was written with")
        check_fields(content)
        # Parameters without a gradient have no moments, so only files without a digest are refused for that.
        optimizer = content.get("optimizer", {"state": {}, "param_groups": []})
        num_parameters = sum(len(group["params"]) for group in optimizer["param_groups"])
        if digest is None and 0 < len(optimizer["state"]) < num_parameters:
            raise FieldError("'optimizer' has lost the moments of some parameters")
    except FieldError as error:
        raise DamagedError(f"{path}: damaged ({error})") from error
    return content
