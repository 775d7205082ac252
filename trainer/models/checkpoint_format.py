"""The fields of this trainer's own files, and what each must be: one table, whoever reads one.

A digest says that a file is what was written. Files of earlier versions have none, and whoever can write a file can
write its digest, so nothing here relies on it.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.common.errors import UserError, clipped
from pipelines.common.settings import misfit
from trainer.config.natures import section_types
from trainer.config.recipe import are_audit_rows
from trainer.models.batch_norm import running_statistics
from trainer.models.files.torch_files import memory_for

FORMAT_VERSION = 1
_MOST_STEPS = 10**12
# AdamW keeps these two tensors for each parameter, and the count "step". An optimizer with others changes this line.
OPTIMIZER_TENSORS = ("exp_avg", "exp_avg_sq")


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


class FieldError(ValueError):
    """A field that is missing, or is not what this trainer writes: the message names it."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field must be.

    Attributes:
      fits: whether a value is that; words: the same for people.
      is_required: without it a file cannot be used at all.
      resumes: a run cannot be resumed without it.
    """

    fits: Callable[[object], bool]
    words: str
    is_required: bool = False
    resumes: bool = False


def is_count(value: object) -> bool:
    """True for a whole number from 0 up to more steps than any run has."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS


def is_number(value: object) -> bool:
    """True for a finite number; whole ones of up to 64 bits."""
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() <= 64
    return isinstance(value, float) and math.isfinite(value)


def is_plain(value: object) -> bool:
    """True for values as YAML has them, and lists and dictionaries of them."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def are_weights(value: object) -> bool:
    """True for tensors by name, at least one."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and torch.is_tensor(each) for key, each in value.items())


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_versions(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _are_rows(value: object) -> bool:
    return isinstance(value, list) and are_audit_rows(value)


def _is_best(value: object) -> bool:
    fits = {"step": is_count, "weights": _is_kind, "top1": _is_percentage}
    return isinstance(value, dict) and (not value or all(each(value.get(name)) for name, each in fits.items()))


def _is_kind(value: object) -> bool:
    return isinstance(value, str) and value in ("ema", "raw")


def _is_percentage(value: object) -> bool:
    return isinstance(value, (int, float)) and is_number(value) and 0 <= value <= 100


def _are_metrics(value: object) -> bool:
    """True for the metrics of an evaluation; the loss may be infinite or NaN, which is written unchanged."""
    if not isinstance(value, dict) or not is_count(value.get("images")):
        return False
    return all(isinstance(each, float) or is_number(each) for each in value.values())


def _are_settings(value: object) -> bool:
    """Whether a value is sections of settings; what types they had is the business of the version that wrote them."""
    if not isinstance(value, dict) or not is_plain(value):
        return False
    return all(isinstance(value.get(section, {}), dict) for section in section_types())


def _is_average(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    rows = value.get("of")
    return (
        is_plain(value)
        and isinstance(value.get("how"), str)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and is_count(row.get("step")) for row in rows)
        and _are_names(value.get("differ", []))
    )


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups, states = value.get("param_groups"), value["state"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
    lists = [group.get("params") for group in groups]
    if not all(isinstance(each, list) and all(map(is_count, each)) for each in lists):
        return False
    numbers = [number for each in lists for number in each]
    return len({*numbers}) == len(numbers) and {*states} <= {*numbers} and all(map(_is_state, states.values()))


def _is_state(value: object) -> bool:
    """Whether a value is what AdamW knows of a parameter."""
    if (
        not isinstance(value, dict)
        or {*value} != {"step", *OPTIMIZER_TENSORS}
        or not all(map(torch.is_tensor, value.values()))
    ):
        return False
    return value["step"].numel() == 1 and all(value[name].is_floating_point() for name in OPTIMIZER_TENSORS)


def _is_scaler(value: object) -> bool:
    numbers = ("scale", "growth_factor", "backoff_factor", "growth_interval")
    if not isinstance(value, dict) or not value:
        return isinstance(value, dict)
    fits = all(is_number(value.get(name)) and value[name] > 0 for name in numbers)
    return fits and is_count(value.get("_growth_tracker"))


def _are_statistics(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, list) and all(map(torch.is_tensor, each)) for each in value)


_COUNT = "a whole number, 0 or more"
_WEIGHTS = "tensors by name"
# TrainState documents what each field is for. `step` and `config` also distinguish these files from others.
FIELDS = {
    "step": Field(is_count, _COUNT, is_required=True, resumes=True),
    "config": Field(_are_settings, "sections of plain settings", is_required=True, resumes=True),
    "plan": Field(lambda value: isinstance(value, dict) and is_plain(value), "what the data depends on", resumes=True),
    "audit": Field(lambda value: value is None or _are_rows(value), "settings that differ from the recipe"),
    "classes": Field(lambda value: value is None or _are_names(value), "a list of names, or null"),
    "software": Field(lambda value: value is None or _are_versions(value), "versions by name"),
    "evaluated": Field(is_count, _COUNT),
    "best": Field(_is_best, "the best evaluation: step, weights, top1"),
    "student": Field(are_weights, _WEIGHTS, resumes=True),
    "ema": Field(lambda value: value is None or are_weights(value), f"{_WEIGHTS}, or null", resumes=True),
    "optimizer": Field(_is_optimizer, "AdamW's state", resumes=True),
    "scaler": Field(_is_scaler, "the state of a GradScaler", resumes=True),
    "micro_batch": Field(is_count, _COUNT),
    "rank_statistics": Field(_are_statistics, "lists of tensors"),
    "weights": Field(_is_kind, "ema or raw"),
    "top1": Field(_is_percentage, "a percentage"),
    "metrics": Field(_are_metrics, "the numbers of an evaluation"),
    "state_dict": Field(are_weights, _WEIGHTS),
    "average": Field(_is_average, "how weights were averaged"),
}


def check_fields(content: dict) -> None:
    """Raise a FieldError that names the first field of a file that is missing or is not what it must be.

    Fields that the table does not have are left alone.
    """
    for name, field in FIELDS.items():
        if name not in content:
            if field.is_required:
                raise FieldError(f"it has no '{name}'")
        elif not field.fits(content[name]):
            raise FieldError(f"'{name}' is {_described(content[name])}, not {field.words}")


def check_resumable(content: dict, step: int) -> None:
    """Raise a FieldError if a run cannot be resumed from the content of a file, each part of which is checked.

    Args:
      step: that the file's name says.
    """
    missing = [name for name, field in FIELDS.items() if field.resumes and name not in content]
    if missing:
        raise FieldError(f"it has no '{missing[0]}'")
    if content["step"] != step:
        raise FieldError(f"'step' is {content['step']:,}, and its name says {step:,}")
    if content.get("evaluated", 0) > step:
        raise FieldError(f"'evaluated' is {content['evaluated']:,}, and 'step' is {step:,}")
    if content["ema"] is None and content["config"].get("ema", {}).get("decay"):
        raise FieldError("'ema' is null, and its settings say that an EMA is kept")
    states = content["optimizer"]["state"]
    if late := [number for number, state in states.items() if not 0 <= state["step"].item() <= step]:
        raise FieldError(f"'optimizer' has done {states[late[0]]['step'].item():,} steps")
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


def lacks_moments(content: dict) -> bool:
    """True if the optimizer knows something of some parameters and nothing of others."""
    optimizer = content.get("optimizer", {"state": {}})
    return bool(optimizer["state"]) and len(optimizer["state"]) < sum(
        len(group["params"]) for group in optimizer["param_groups"]
    )


def check_weights(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Raise a FieldError if weights are not those of a model, by name, shape and kind of number."""
    own = model.state_dict()
    if other := sorted(own.keys() ^ weights.keys()):
        raise FieldError(f"'{clipped(other[0])}' is {'missing' if other[0] in own else 'unknown'}")
    for name, value in own.items():
        found = weights[name]
        if found.shape != value.shape or found.is_floating_point() != value.is_floating_point():
            raise FieldError(f"'{name}' is {_kind(found)}, here it is {_kind(value)}")


def _kind(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


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
            return f"{section}.{name} = {_described(values[name])}"
    return ""


def _described(value: object) -> str:
    """A value in a few words."""
    if torch.is_tensor(value):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (dict, list, tuple)) and len(value) > 3:
        return f"a {type(value).__name__} of {len(value):,}"
    return clipped(value) if isinstance(value, (int, float, str)) else f"{type(value).__name__} {clipped(value, 40)}"


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
    """What was read from a checkpoint of this trainer, without its digest; each field has the type of FIELDS.

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
        if digest is None and lacks_moments(content):
            raise FieldError("'optimizer' has lost the moments of some parameters")
    except FieldError as error:
        raise DamagedError(f"{path}: damaged ({error})") from error
    return content
