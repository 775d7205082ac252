"""Settings: what a dataclass's field takes and is to a run stands beside its default, and is checked when it is made.

@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    key = "optim"
    lr: float = setting(2e-3, at_least=0)
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typing_extensions

from pipelines.common.errors import UserError, clipped, naming

_MOST = 2**31 - 1  # Numbers end up in NumPy's and C's types, and more seconds overflow somewhere.
_KEY = "setting"
_NOT_LACKING = object()  # Every plan has had the field.
OnResume = Literal["refused", "reported", "ignored"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The values that a setting may have, besides its type, and what it is to a run.

    Attributes:
      at_least, at_most: of a number, or of each number in a list; above, below: the same without the bound itself.
      may_be_empty: whether an empty text has a meaning.
      recipe: it belongs to the recipe, so the audit reports another value than the recipe's.
      per_machine: the machines of a run may have different values, because it changes no result.
      one_per_process: runs that are trained together in one process must have the same value.
      on_resume: what happens where a value differs from the checkpoint's: the checkpoint is "refused", because the
        setting decides what the plan is; the change is "reported"; or it is "ignored". None stands for the section's.
      plan_field: the plan's name of what the setting decides, "" for SECTION.NAME or where nothing is refused.
      in_old_plans: the value that plans had before the field existed; their files lack it.
    """

    at_least: float = -_MOST
    above: float | None = None
    at_most: float = _MOST
    below: float | None = None
    may_be_empty: bool = False
    recipe: bool = True
    per_machine: bool = False
    one_per_process: bool = False
    on_resume: OnResume | None = None
    plan_field: str = ""
    in_old_plans: object = _NOT_LACKING

    def complaint(self, value: object) -> str:
        """Return the end of a sentence that says what is wrong with a number or text; "" if it is allowed."""
        if isinstance(value, str) and ("\0" in value or not (value or self.may_be_empty)):
            return "; it must not be empty or hold a zero byte"
        if not isinstance(value, (int, float)):
            return ""
        fits_low = value >= self.at_least if self.above is None else value > self.above
        fits_high = value <= self.at_most if self.below is None else value < self.below
        if fits_low and fits_high:  # NaN does not.
            return ""
        low = f"[{self.at_least}" if self.above is None else f"({self.above}"
        high = f"{self.at_most}]" if self.below is None else f"{self.below})"
        return f"; it must lie in {low}, {high}"


def setting(default: object = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **facts: Any) -> Any:
    """A field of a dataclass with a default, and with the `facts` of a Setting."""
    return dataclasses.field(default=default, default_factory=factory, metadata={_KEY: Setting(**facts)})


def natures(kind: Any) -> dict[str, Setting]:
    """Return what each field is to a run, by its name. `kind` is a section, or the dataclass of a setting's items."""
    found = {}
    for field in dataclasses.fields(kind):
        nature = field.metadata.get(_KEY, Setting())
        on_resume = nature.on_resume or getattr(kind, "on_resume", "ignored")
        plan_field = (nature.plan_field or f"{kind.key}.{field.name}") if on_resume == "refused" else ""
        found[field.name] = dataclasses.replace(nature, on_resume=on_resume, plan_field=plan_field)
    return found


def values_in_old_plans(kind: Any) -> dict[str, object]:
    """The fields of a dataclass that files of old plans lack, and the values that these plans had."""
    values = {field.name: field.metadata.get(_KEY, Setting()).in_old_plans for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not _NOT_LACKING}


@dataclasses.dataclass(frozen=True)
class Section:
    """A base of dataclasses whose instances have only values of the declared types and ranges.

    Attributes:
      key: the name of the section in messages; "" where its fields are arguments of their own.
      on_resume: as for Setting, of settings that do not say it themselves.
    """

    key: ClassVar[str] = ""
    on_resume: ClassVar[OnResume] = "ignored"

    def __post_init__(self):
        check(self, self.key)


def check(section: Any, key: str) -> None:
    """Raise a UserError about the first field of a dataclass whose value is not of its type or out of its range."""
    for field in dataclasses.fields(section):
        value, hint = getattr(section, field.name), _hints(type(section))[field.name]
        allowed = field.metadata.get(_KEY, Setting())
        if isinstance(value, dict):
            allowed = dataclasses.replace(allowed, may_be_empty=True)
        reason = next(filter(None, map(allowed.complaint, _leaves(value))), "")
        if not fits(value, hint):
            reason = f"; it must be {_name_of(hint)}"
        if reason:
            raise UserError(f"{key}.{field.name}".lstrip(".") + f" is {clipped(repr(value))}{reason}")


def filled(kind: Any, content: object) -> Any:
    """An instance of a dataclass with the values of a file, also where its fields are dataclasses or lists of these.

    Raises:
      UserError: the content is no mapping, a key is unknown (the nearest known one is named) or missing, or a value is
        wrong. It begins with the keys that lead there, such as students[0].
    """
    if not isinstance(content, dict):
        raise UserError(f"is {clipped(content)}, not keys with values")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(fields)}"
            raise UserError(f"unknown key '{clipped(key)}'; {hint}")
    for name, field in fields.items():
        if field.default is field.default_factory and name not in content:  # Both are MISSING.
            raise UserError(f"'{name}' is missing")
    return kind(**{name: _filled_field(name, _hints(kind)[name], value) for name, value in content.items()})


def _filled_field(name: str, hint: Any, value: Any) -> Any:
    kind = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
    if kind is None or value is None:
        return value
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{name} is {clipped(repr(value))}; it must be a list, [...]")
        return [_filled_field(f"{name}[{number}]", kind, each) for number, each in enumerate(value)]
    with naming(name):
        return filled(kind, value)


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return typing_extensions.get_type_hints(kind, include_extras=True)


def _leaves(value: object) -> Iterator[object]:
    """The values in nested lists and dictionaries; a path is text."""
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield str(value) if isinstance(value, Path) else value


def _name_of(hint: Any) -> str:
    """Name a type in a message: a Literal by its choices, and a class as Python writes it."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(str(choice) for choice in inner if choice != '')}"
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_name_of, inner))
    if kind is list:
        return f"a list, [...], each {_name_of(inner[0])}"
    if kind is dict or dataclasses.is_dataclass(kind):
        return "keys with values"
    if kind is types.NoneType:
        return "null"
    return hint.__name__ if type(hint) is type else str(hint)


def misfit(values: Mapping, kind: Any) -> str:
    """The first key that a dictionary of plain values lacks or has with a value of another type; "" for none.

    Args:
      kind: a TypedDict, or a dataclass, whose fields with a default may be absent. Other keys are left alone.
    """
    if dataclasses.is_dataclass(kind):
        required = {
            field.name: field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(kind)
        }
    else:
        required = {name: name in kind.__required_keys__ for name in _hints(kind)}
    for name, is_required in required.items():
        is_fine = fits(values[name], _hints(kind)[name], is_plain=True) if name in values else not is_required
        if not is_fine:
            return name
    return ""


def fits(value: object, hint: Any, is_plain: bool = False) -> bool:
    """Whether a value is of a type, a whole number also where any number is wanted, and true and false nowhere else.

    Args:
      hint: the type. In Annotated[X, predicate] the predicate must hold, too.
      is_plain: the value is as files have it: text where a path is wanted, and keys where a dataclass is.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Annotated, typing_extensions.NotRequired):
        return fits(value, inner[0], is_plain) and all(predicate(value) for predicate in inner[1:])
    if is_plain and hint is Path:
        return isinstance(value, str)
    if hasattr(hint, "__required_keys__") or is_plain and dataclasses.is_dataclass(hint):
        return isinstance(value, dict) and not misfit(value, hint)
    each = functools.partial(fits, is_plain=is_plain)
    if hint is Any or value is None:
        return hint is Any or type(None) in inner
    if origin in (typing.Union, types.UnionType):
        return any(map(each, [value] * len(inner), inner))
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(each, value, inner))
    if origin is list:
        return isinstance(value, list) and all(map(each, value, inner * len(value)))
    if origin is dict:
        return isinstance(value, dict) and all(map(each, value.values(), inner[1:] * len(value)))
    return (hint is bool or not isinstance(value, bool)) and isinstance(value, (int, float) if hint is float else hint)
