"""Command lines and YAML files that fill a dataclass of sections.

A program's settings are a dataclass whose fields, the sections, are dataclasses themselves, each with a default for
every key. `--config FILE` takes a YAML file of sections, `--section.key value` a single one; later wins. jsonargparse
reads both, and the sections check their values; here files are bounded and messages are made one line.
"""

import dataclasses
import difflib
import functools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader

from pipelines.common.errors import UserError, clipped, with_escaped_bytes
from pipelines.common.machine import expanded

T = TypeVar("T")

# A file of settings may have this many bytes, of which all settings take a five-hundredth; and values, and levels.
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS = 2**18, 10_000, 20
_MOST_CHARACTERS = 2000  # No value is longer.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load_yaml = get_loader("yaml")
# How jsonargparse begins a message about an unknown key, and the parts of its other messages that speak of Python.
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?:--)?([^\s=]+)"
    r"|Group '(\w+)' does not accept option '(.+)'"
    r"|Option '(.+)' is not accepted"
)
_OF_PYTHON = [
    (r'Parser key "([\w.]+)":', r"\1:"),
    (r"<class '([\w.]+)'>|typing\.", r"\1"),
    (r"Expected a Literal", "Expected one of "),
    (r"Problem with given class_path '[\w.]+': ", ""),
    (r"Does not validate against .*Subtypes: (.*) Errors: .*Given value: ", r"Expected one of \1. Got value: "),
]


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
    sections = sections_of(kind)
    parser = _parser(kind, prog, description, tuple((flags or {}).items()))
    files: dict[str, str] = {}
    try:
        given = list(_with_contents(sys.argv[1:] if arguments is None else arguments, list(sections), files))
        values = parser.instantiate(_with_home_folders(parser.parse_args(given)))
        return kind(**{name: values[name] for name in sections})
    except (ArgumentError, OverflowError, UserError) as error:
        keys = [f"{name}.{field.name}" for name, part in sections.items() for field in dataclasses.fields(part)]
        reason = _reason(str(error), keys)
        wrong = re.findall(r"[\w.]+", reason.partition("; did you mean")[0])  # The hint names a key that is right.
        file = next((f"{files[key]}: " for key in wrong if key in files), "")
        raise UserError(f"{file}{reason}") from error
    finally:
        vars(parser).pop("print_config", None)  # An error leaves it set, and the parser is used again.


def sections_of(kind: Any) -> dict[str, Any]:
    """The dataclass of each section by its name."""
    return {field.name: field.default_factory for field in dataclasses.fields(kind)}


@functools.cache
def _parser(kind: type, prog: str | None, description: str, flags: tuple[tuple[str, str], ...]) -> ArgumentParser:
    """The parser of `parse_settings`: to build it takes longer than to parse with it."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    for flag, meaning in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_argument("--config", action="config", help="YAML file with sections and keys as below")
    parser.add_class_arguments(kind)
    return parser


def _with_contents(arguments: list[str], sections: list[str], files: dict[str, str]) -> Iterator[str]:
    """The arguments with the content of files in place of their names: a file may be a pipe, to be read but once.

    Args:
      files: gets the file of each key whose value is from one.
    """
    waiting, option = iter(arguments), ""
    for argument in waiting:
        option = argument if argument.startswith("--") else f"{option} {argument}"
        if (shown := with_escaped_bytes(option)) != option:
            raise UserError(f"{shown}: not UTF-8, so no file can hold it. Rename it, or make a link to it")
        key, equals, name = argument.partition("=")
        if key not in ("--config", *(f"--{section}" for section in sections)):
            files.pop(key.removeprefix("--"), None)
            yield argument
            continue
        name = name if equals else next(waiting, "")
        content = read_yaml(expanded(name))
        found: dict[str, Any] = {}
        for section, keys in (content if key == "--config" else {key.removeprefix("--"): content}).items():
            if isinstance(keys, dict | None):  # All keys of a section may be commented out.
                found[f"{section}"] = {f"{each}": value for each, value in (keys or {}).items()}
                files |= {f"{section}.{each}": name for each in keys or ()}
            elif section in sections:
                raise UserError(f"{name}: section '{section}' holds {clipped(keys)}, not keys with values")
            else:
                found[f"{section}"], files[f"{section}"] = keys, name
        yield f"--config={yaml.safe_dump(found, default_flow_style=True)}"


def _with_home_folders(value: Any) -> Any:
    """Parsed settings with the home folder in place of ~ in every path; namespaces are changed in place."""
    if isinstance(value, Path):
        return value if "\0" in str(value) else expanded(value)  # The section refuses a zero byte and names its key.
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _with_home_folders(item))
    return [_with_home_folders(item) for item in value] if isinstance(value, list) else value


def _reason(message: str, keys: list[str]) -> str:
    """A message as one line. A key without its section, or with another's, is nearest the known one of its name."""
    reason = " ".join(message.split())
    if unknown := _UNKNOWN.match(reason):
        key = ".".join(filter(None, unknown.groups()))
        alike = [known for known in keys if known.partition(".")[2] == key.rpartition(".")[2]]
        nearest = alike or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "--help lists all keys"
        return f"unknown key '{clipped(key)}'; {hint}"
    for pattern, words in _OF_PYTHON:
        reason = re.sub(pattern, words, reason)
    return reason


def read_yaml(path: Path) -> dict:
    """The content of a file of settings, a mapping; {} of an empty one. Raises a UserError about anything else."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Name a file of settings") from error
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{path}: larger than {_MOST_BYTES >> 10} KiB, so not a file of settings. Name another one")
    try:
        text = raw.decode("utf-8-sig")
        _check_yaml(text)
        content = yaml.load(text, _SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}: not YAML: {clipped(getattr(error, 'problem', error), 300)}{where}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not sections with keys")
    return content


@dataclasses.dataclass
class _Part:
    """A mapping, a list or the document, while its events are read; `size` counts values, those of aliases, too."""

    anchor: str | None = None
    keys: set[str] | None = None  # A list has none.
    num_parts: int = 0
    size: float = 1


def _check_yaml(text: str) -> None:
    """Raise a YAMLError about a key that stands twice, whose first value YAML drops, or more than settings hold."""
    parts, sizes = [_Part()], {}
    for event in yaml.parse(text, _SafeLoader):
        done = _Part(getattr(event, "anchor", None))
        if isinstance(event, yaml.CollectionStartEvent):
            parts.append(_Part(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            done = parts.pop()
        elif isinstance(event, yaml.AliasEvent):
            done = _Part(size=sizes.get(event.anchor, math.inf))
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        sizes[done.anchor] = done.size
        whole = parts[-1]
        whole.num_parts += 1
        whole.size += done.size
        value = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if whole.keys is not None and whole.num_parts % 2 and value not in ("", "<<"):
            if value in whole.keys:
                raise yaml.YAMLError(f"'{clipped(value)}' stands twice, again in line {event.start_mark.line + 1}")
            whole.keys.add(value)
        if whole.size > _MOST_VALUES or len(parts) > _MOST_LEVELS or len(value) > _MOST_CHARACTERS:
            raise yaml.YAMLError(f"larger or deeper than settings in line {event.start_mark.line + 1}")


def _load_checked(text: str) -> Any:
    _check_yaml(text)
    return _load_yaml(text)


set_loader("yaml", _load_checked, (yaml.YAMLError, ValueError))
