"""Command lines and YAML files that fill a dataclass of sections.

A program's settings are a dataclass whose fields, the sections, are dataclasses themselves, each with a default for
every key. `--config FILE` takes a YAML file of sections, `--section.key value` a single one; later wins.
"""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from pipelines.errors import UserError
from pipelines.machine import expanded

T = TypeVar("T")
_NOTATION = (
    "a list is written [1,2], a list of pairs [[0,128],[100,160]], a list of items with keys [{name: resnet50}], "
    "a switch true or false"
)


def parse_settings(
    kind: type[T],
    arguments: list[str] | None = None,
    *,
    prog: str | None,
    description: str,
    flags: dict[str, str] | None = None,
) -> T:
    """The settings of a command line: `--config FILE` any number of times, and `--section.key value`; later wins.

    Args:
      kind: the dataclass of sections.
      arguments: sys.argv's where there are none.
      flags: switches besides, with what --help says of them; they are accepted and left to the caller.
    Raises:
      UserError: an unknown key (the nearest known one is named), a value of the wrong type or out of range, a missing
        or malformed file.
      SystemExit: --help.
    """
    arguments, flags = sys.argv[1:] if arguments is None else arguments, flags or {}
    _Keys(kind, flags).check(arguments)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    for flag, meaning in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_argument("--config", action="config", help="YAML file with sections and keys as below")
    parser.add_class_arguments(kind)
    try:
        values = parser.instantiate(_with_home_folders(parser.parse_args(arguments)))
    except ArgumentError as error:
        reason = _reason(str(error), _item_fields(kind))
        raise UserError(f"{reason}. See --help for the keys and their types; {_NOTATION}") from error
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _with_home_folders(value: object) -> object:
    """Parsed settings with the home folder in place of ~ in every path; namespaces are changed in place."""
    if isinstance(value, Path):
        return expanded(value)
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _with_home_folders(item))
    return [_with_home_folders(item) for item in value] if isinstance(value, list) else value


def _reason(message: str, item_fields: list[str]) -> str:
    """jsonargparse's message as one line, without the types that a union was tried with."""
    reason = re.sub(r'(?:Parser key|Group) "([\w.]+)":', r"--\1:", " ".join(message.split()))
    reason = re.sub(r"Problem with given class_path '[\w.]+': ", "", reason)
    reason = re.sub(r"Option '(\w+)' is not accepted", lambda match: _unknown_in_item(match[1], item_fields), reason)
    return re.sub(r"Does not validate against any of the Union subtypes.*Given value: ", "not understood: ", reason)


def _item_fields(kind: type) -> list[str]:
    """The keys that items of lists have, where they have keys."""
    hints = [hint for section in _sections(kind).values() for hint in typing.get_type_hints(section).values()]
    items = [item for hint in hints for item in typing.get_args(hint) if dataclasses.is_dataclass(item)]
    return [field.name for item in items for field in dataclasses.fields(item)]


def _unknown_in_item(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{nearest[0]}'" if nearest else f"there are {', '.join(known)}"
    return f"unknown key '{key}' in an item; {hint}"


def _sections(kind: type) -> dict[str, type]:
    return {field.name: field.default_factory for field in dataclasses.fields(kind)}


class _Keys:
    """The keys of a dataclass of sections; refuses others, naming the nearest known one."""

    def __init__(self, kind: type, flags: dict[str, str]):
        self._sections = _sections(kind)
        self._keys = [
            f"{name}.{field.name}" for name, section in self._sections.items() for field in dataclasses.fields(section)
        ]
        self._free = [key for key in self._keys if key.endswith(".kwargs")]
        self._flags = {"help", "print_config", *flags, *(f"{key}.help" for key in self._keys)}

    def check(self, arguments: list[str]) -> None:
        """Raise a UserError about an unknown key on the command line or in a file that it names."""
        for i, argument in enumerate(arguments):
            if not argument.startswith("--"):
                continue
            key, _, value = argument[2:].partition("=")
            key = key.removesuffix("+")  # adds to a list
            value = value or "".join(arguments[i + 1 : i + 2])
            if key in self._sections and not expanded(value).is_file():
                raise UserError(
                    f"--{key} takes a YAML file, and {value or 'nothing'} is none; did you mean '--{key}.KEY'?"
                )
            if key == "config":
                if not value:
                    raise UserError("--config: which file? Give its path")
                for file_key in self._in_file(expanded(value)):
                    self._check(file_key, f"{value}: ", "")
            elif key not in self._flags:
                self._check(key, "", "--")

    def _in_file(self, path: Path) -> Iterator[str]:
        """The 'section.key's of a YAML file."""
        try:
            sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--config {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not YAML: {error}") from error
        if not isinstance(sections, dict):
            found = "nothing" if sections is None else type(sections).__name__
            raise UserError(f"{path}: holds {found}, not sections with keys")
        for section, keys in sections.items():
            if section not in self._sections:
                yield str(section)
            elif isinstance(keys, dict):
                yield from (f"{section}.{key}" for key in keys)
            else:
                raise UserError(f"{path}: section '{section}' holds {keys!r}, not keys with values")

    def _check(self, key: str, where: str, dashes: str) -> None:
        if key in self._sections or key in self._keys or key.rpartition(".")[0] in self._free:
            return
        # a key without its section, or with another one's, is near the key of the same name
        alike = [known for known in self._keys if known.partition(".")[2] == key.rpartition(".")[2]]
        nearest = alike or difflib.get_close_matches(key, [*self._keys, *self._sections])
        hint = f"; did you mean '{dashes}{nearest[0]}'?" if nearest else ". See --help for the keys"
        raise UserError(f"{where}unknown key '{dashes}{key}'{hint}")
