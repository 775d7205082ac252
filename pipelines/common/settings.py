"""Ranges of settings: declared beside the default of a dataclass's field, checked when the dataclass is made.

@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    key = "optim"
    lr: float = setting(2e-3, at_least=0)
"""

import dataclasses
import functools
import math
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipelines.common.errors import UserError, clipped

_MOST_WHOLE = 2**31 - 1  # whole numbers end up in NumPy's and C's types
_MOST = 1e9  # more is a slip of the keyboard; seconds, weights and rates beyond it overflow somewhere
_RANGE, _NATURE, _IN_OLD_PLANS = "range", "nature", "in_old_plans"
_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "keys with plain values",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a setting may have, besides its type.

    Attributes:
      at_least, at_most: of a number, or of each number in a list; above, below: the same without the bound itself.
      among: the only texts; () allows any that is not empty.
      may_be_empty: whether an empty text has a meaning.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    among: tuple[str, ...] = ()
    may_be_empty: bool = False

    def complaint(self, value: object) -> str:
        """Return the end of a sentence that says what is wrong with a number or text; "" if it is allowed."""
        if isinstance(value, str):
            return self._of_text(value)
        return self._of_number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""

    def _of_text(self, text: str) -> str:
        if "\0" in text:
            return "; it must not hold a zero byte. Write it without one"
        if not text and not self.may_be_empty:
            return "; it must not be empty"
        return not_among(self.among) if self.among and text not in self.among and text else ""

    def _of_number(self, number: float) -> str:
        if isinstance(number, float) and not math.isfinite(number):
            return "; it must be a finite number"
        if not (self._is_low(number) or self._is_high(number)):
            return self._beyond_any_range(number)
        has_low = self.at_least is not None or self.above is not None
        has_high = self.at_most is not None or self.below is not None
        if has_low and has_high:
            low = f"({self.above}" if self.at_least is None else f"[{self.at_least}"
            high = f"{_power(self.below)})" if self.at_most is None else f"{self.at_most}]"
            return f"; it must lie in {low}, {high}"
        return f"; it must {self._lower_bound() if has_low else self._upper_bound()}"

    def _is_low(self, number: float) -> bool:
        return (self.at_least is not None and number < self.at_least) or (
            self.above is not None and number <= self.above
        )

    def _is_high(self, number: float) -> bool:
        return (self.at_most is not None and number > self.at_most) or (self.below is not None and number >= self.below)

    def _beyond_any_range(self, number: float) -> str:
        most = _MOST_WHOLE if isinstance(number, int) else _MOST
        if abs(number) <= most or self.at_most is not None or self.below is not None:
            return ""
        return f"; it must be at most {most}" if number > 0 else f"; it must be at least {-most}"

    def _lower_bound(self) -> str:
        if self.at_least is None:
            return "be positive" if not self.above else f"be above {self.above}"
        return "not be negative" if not self.at_least else f"be at least {self.at_least}"

    def _upper_bound(self) -> str:
        return f"be below {_power(self.below)}" if self.at_most is None else f"be at most {self.at_most}"


def not_among(choices: typing.Sequence[object]) -> str:
    """The end of a sentence about a value that is none of the choices; an empty one goes without saying."""
    named = [str(choice) for choice in choices if choice != ""]
    return f", not {' or '.join(named) if len(named) < 3 else 'one of ' + ', '.join(named)}"


def _power(bound: float | None) -> str:
    """A bound as people know it: 2**63 for 9223372036854775808."""
    if isinstance(bound, int) and bound > _MOST_WHOLE and bound == 2 ** (bound.bit_length() - 1):
        return f"2**{bound.bit_length() - 1}"
    return str(bound)


OnResume = Literal["refused", "reported", "ignored"]


@dataclasses.dataclass(frozen=True)
class Nature:
    """What a setting is to a run, besides its value.

    Attributes:
      recipe: it belongs to the recipe, so the audit reports another value than the recipe's.
      per_machine: the machines of a run may have different values, because it changes no result.
      on_resume: what happens where a value differs from the checkpoint's: the checkpoint is "refused", because the
        setting decides what the plan is; the change is "reported"; or it is "ignored". None stands for the section's.
      plan_field: the plan's name of what the setting decides, "" for SECTION.NAME or where nothing is refused.
    """

    recipe: bool = True
    per_machine: bool = False
    on_resume: OnResume | None = None
    plan_field: str = ""


def setting(
    default: object = dataclasses.MISSING,
    *,
    factory: Any = dataclasses.MISSING,
    recipe: bool = True,
    per_machine: bool = False,
    on_resume: OnResume | None = None,
    plan_field: str = "",
    in_old_plans: object = dataclasses.MISSING,
    **bounds: Any,
) -> Any:
    """A field of a dataclass with a default, the bounds of a Range, and what a Nature says.

    Args:
      in_old_plans: what plans did that were written before the field existed; their files lack it.
    """
    nature = Nature(recipe, per_machine, on_resume, plan_field)
    metadata = {_RANGE: Range(**bounds), _NATURE: nature, _IN_OLD_PLANS: in_old_plans}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def natures(kind: Any) -> dict[str, Nature]:
    """The nature of each field of a section, or of a dataclass that is an item of a setting, by the field's name."""
    found = {}
    for field in dataclasses.fields(kind):
        nature = field.metadata.get(_NATURE, Nature())
        on_resume = nature.on_resume or getattr(kind, "on_resume", "ignored")
        plan_field = (nature.plan_field or f"{kind.key}.{field.name}") if on_resume == "refused" else ""
        found[field.name] = dataclasses.replace(nature, on_resume=on_resume, plan_field=plan_field)
    return found


def values_in_old_plans(kind: type) -> dict[str, object]:
    """What plans did before a field of this dataclass existed, by the field's name, where a field says it."""
    values = {field.name: field.metadata.get(_IN_OLD_PLANS, dataclasses.MISSING) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True)
class Section:
    """A base of dataclasses whose instances have only values of the declared types and ranges.

    Attributes:
      key: the name of the section in messages; "" where its fields are arguments of their own.
      on_resume: as for Nature, of settings that do not say it themselves.
    """

    key: ClassVar[str] = ""
    on_resume: ClassVar[OnResume] = "ignored"

    def __post_init__(self):
        check(self, self.key)


def check(section: Any, key: str) -> None:
    """Raise a UserError about the first field of a dataclass whose value is not of its type or out of its range."""
    hints = _hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if reason := _complaint(value, hints[field.name], field.metadata.get(_RANGE, Range())):
            raise UserError(f"{key}.{field.name}".lstrip(".") + f" is {_shown(value)}{reason}")


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return typing.get_type_hints(kind)


def _complaint(value: object, hint: object, allowed: Range) -> str:
    """Return the end of a sentence that says what is wrong with a value; "" if it is allowed."""
    if not fits(value, hint):
        is_choice = typing.get_origin(hint) is typing.Literal and isinstance(value, str)
        return not_among(typing.get_args(hint)) if is_choice else f"; it must be {_noun(hint)}"
    if isinstance(value, Path):
        return Range().complaint(str(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    if parts is None:
        return allowed.complaint(value)
    inner = dataclasses.replace(allowed, may_be_empty=True) if isinstance(value, dict) else allowed
    return next(filter(None, (_complaint(part, typing.Any, inner) for part in parts)), "")


def misfit(values: dict, kind: Any) -> str:
    """The first field of a dataclass that keys with plain values lack or have of another type; "" for none.

    Fields that have a default may be absent, and other keys are left alone.
    """
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not fits(values[field.name], hints[field.name], is_plain=True) if field.name in values else not has_default:
            return field.name
    return ""


def fits(value: object, hint: Any, is_plain: bool = False) -> bool:
    """Whether a value is of a type, a whole number also where any number is wanted, and true and false nowhere else.

    Args:
      is_plain: the value is as files have it: text where a path is wanted, keys where a dataclass is, and any plain
        values in a dictionary.
    """
    if is_plain and hint is Path:
        return isinstance(value, str)
    if is_plain and dataclasses.is_dataclass(hint):
        return isinstance(value, dict) and not misfit(value, hint)
    each = functools.partial(fits, is_plain=is_plain)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any or value is None:
        return hint is typing.Any or type(None) in inner
    if origin in (typing.Union, types.UnionType):
        return any(each(value, part) for part in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(each, value, inner))
    if origin is list:
        return isinstance(value, list) and all(each(part, inner[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict) and (is_plain or all(each(part, inner[1]) for part in value.values()))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _noun(hint: object) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_noun(part) for part in inner if part is not type(None))
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        return f"a list of {len(inner)} numbers"
    if origin is list:
        is_of_choices = typing.get_origin(inner[0]) is typing.Literal
        return f"a list of {_noun(inner[0])}" if is_of_choices else "a list"
    return _NOUNS.get(origin or hint, "keys")


def _shown(value: object) -> str:
    """A value as a YAML file has it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = clipped(value)
    if not text.isprintable():  # Control characters must not reach a terminal.
        return ascii(text)
    return f"'{text}'" if isinstance(value, str) else text
