"""Checks that what was read from a file is what annotations of types say."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch

from pipelines.common.errors import clipped

_MISSING = object()


def wrong_part(value: object, kind: Any, name: str = "") -> str:
    """Say which part of a value is the first that is not what an annotation says; "" if all of it is.

    Args:
      kind: a class, Any, None, a union, a Literal of texts, list[X], dict[K, X], tuple[X, Y] for a list of this length,
        a TypedDict, which leaves other keys alone, or Annotated[X, predicate]. A float may be a whole number; whole
        numbers have at most 64 bits.
      name: of the value; its parts are called NAME.KEY and NAME[INDEX].
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    wrong = "is missing" if value is _MISSING else f"is {described(value)}"
    if origin is Annotated:
        return wrong_part(value, inner[0], name) or ("" if inner[1](value) else f"'{name}' {wrong}")
    if origin in (typing.Union, types.UnionType):
        return f"'{name}' {wrong}" if all(wrong_part(value, each, name) for each in inner) else ""
    if value is _MISSING or not _is_of(value, dict if typing.is_typeddict(kind) else origin or kind, inner):
        return f"'{name}' {wrong}"
    return next(filter(None, (wrong_part(*part) for part in _parts(value, kind, name))), "")


def _is_of(value: object, kind: Any, inner: tuple) -> bool:
    """Whether a value is of a type, whatever its parts are."""
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is int or (kind is float and isinstance(value, int)):
        return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64
    if kind is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(inner)
    return kind is Any or isinstance(value, kind)


def _parts(value: Any, kind: Any, name: str) -> Iterator[tuple[object, Any, str]]:
    """The parts of a value, each with its annotation and its name."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        for key, hint in typing.get_type_hints(kind, include_extras=True).items():
            if key in value or key in kind.__required_keys__:
                yield value.get(key, _MISSING), hint, f"{name}.{key}".lstrip(".")
    elif origin is dict:
        for key, each in value.items():
            yield key, inner[0], f"a key of {name}"
            yield each, inner[1], f"{name}.{clipped(key, 40)}"
    elif origin in (list, tuple):
        for index, each in enumerate(value):
            yield each, inner[0 if origin is list else index], f"{name}[{index}]"


def described(value: object) -> str:
    """A value in a few words."""
    if torch.is_tensor(value):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (dict, list, tuple)) and len(value) > 3:
        return f"a {type(value).__name__} of {len(value):,}"
    return clipped(value) if isinstance(value, (int, float, str)) else f"{type(value).__name__} {clipped(value, 40)}"
