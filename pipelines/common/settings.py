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
from typing import ClassVar

from pipelines.common.errors import UserError, clipped

_MOST_WHOLE = 2**31 - 1  # whole numbers end up in NumPy's and C's types
_MOST = 1e9  # more is a slip of the keyboard; seconds, weights and rates beyond it overflow somewhere
_RANGE = "range"
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
        if self.among and text not in self.among and not (self.may_be_empty and not text):
            return f", not {' or '.join(self.among) if len(self.among) < 3 else 'one of ' + ', '.join(self.among)}"
        return ""

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


def _power(bound: float) -> str:
    """A bound as people know it: 2**63 for 9223372036854775808."""
    is_known = bound <= _MOST_WHOLE or bound != 2 ** (bound.bit_length() - 1)
    return str(bound) if is_known else f"2**{bound.bit_length() - 1}"


def setting(default: object = dataclasses.MISSING, *, factory: object = dataclasses.MISSING, **bounds: object):
    """A field of a dataclass with a default and the bounds of a Range."""
    metadata = {_RANGE: Range(**bounds)}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """A base of dataclasses whose instances have only values of the declared types and ranges.

    Attributes:
      key: the name of the section in messages.
    """

    key: ClassVar[str]

    def __post_init__(self):
        check(self, self.key)


def check(section: object, key: str) -> None:
    """Raise a UserError about the first field of a dataclass whose value is not of its type or out of its range."""
    hints = _hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if reason := _complaint(value, hints[field.name], field.metadata.get(_RANGE, Range())):
            raise UserError(f"{key}.{field.name} is {_shown(value)}{reason}")


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return typing.get_type_hints(kind)


def _complaint(value: object, hint: object, allowed: Range) -> str:
    """Return the end of a sentence that says what is wrong with a value; "" if it is allowed."""
    if not fits(value, hint):
        return f"; it must be {_noun(hint)}"
    if isinstance(value, Path):
        return Range().complaint(str(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    if parts is None:
        return allowed.complaint(value)
    inner = dataclasses.replace(allowed, may_be_empty=True) if isinstance(value, dict) else allowed
    return next(filter(None, (_complaint(part, typing.Any, inner) for part in parts)), "")


def misfit(values: dict, kind: type) -> str:
    """The first field of a dataclass that keys with plain values lack or have of another type; "" for none.

    Fields that have a default may be absent, and other keys are left alone.
    """
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not fits(values[field.name], hints[field.name], is_plain=True) if field.name in values else not has_default:
            return field.name
    return ""


def fits(value: object, hint: object, is_plain: bool = False) -> bool:
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
    return "a list" if origin is list else _NOUNS.get(origin or hint, "keys")


def _shown(value: object) -> str:
    """A value as a YAML file has it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = clipped(value)
    if not text.isprintable():  # what it holds must not reach a terminal
        return ascii(text)
    return f"'{text}'" if isinstance(value, str) else text
