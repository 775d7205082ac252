"""Command lines and YAML files that fill a dataclass of sections.

A program's settings are a dataclass whose fields, the sections, are dataclasses themselves, each with a default for
every key. `--config FILE` takes a YAML file of sections, `--section.key value` a single one; later wins.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from docstring_parser import parse as parse_docstring

from pipelines.common.errors import UserError, clipped, with_escaped_bytes
from pipelines.common.machine import expanded
from pipelines.common.settings import fits

T = TypeVar("T")

# A file of settings may be this large. All settings take a five-hundredth of it, and nest three levels deep.
_MOST_BYTES = 2**18
_MOST_CHARACTERS = 2000  # of a value
_MOST_LEVELS = 20
_KWARGS = re.compile(r"(\.kwargs)\..+")  # Behind it stands the name of an argument of a model.
_UNIONS = (typing.Union, types.UnionType)
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
      UserError: as `filled`.
      SystemExit: --help, or --print_config, which prints the configuration as YAML.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = _parser(kind, arguments, prog, description, flags or {}).parse_known_args(arguments)
    if unknown:
        raise UserError(_unknown(unknown[0].removeprefix("--").partition("=")[0], types_of_keys(kind)))
    settings = filled(kind, options.given)
    if options.print_config:
        print(to_yaml(settings), end="")
        sys.exit()
    return settings


def filled(kind: type[T], given: Iterable[tuple[str, Any]]) -> T:
    """The settings with other values than their defaults.

    Args:
      kind: the dataclass of sections.
      given: ("config", a YAML file) or (SECTION.KEY, a value), later wins. Text is read as YAML, unless the key takes
        text or a path.
    Raises:
      UserError: an unknown key (the nearest known one is named), a value of the wrong type or out of range, a missing
        or malformed file.
    """
    hints = types_of_keys(kind)
    values: dict[str, dict[str, Any]] = {section: {} for section in sections_of(kind)}
    files: dict[str, str] = {}  # How a message about a key begins.
    for full_key, value, file in _with_contents(given):
        key = _KWARGS.sub(r"\1", full_key)
        if key not in hints:
            raise UserError(file + _unknown(full_key, hints))
        section, name = key.split(".")
        try:
            value = _converted(_of_text(value, hints[key]) if isinstance(value, str) else value, hints[key])
        except UserError as error:
            raise UserError(f"{file}{key}: {error}") from error
        if key != full_key:
            others = values[section].get(name)
            value = {**(others if isinstance(others, dict) else {}), full_key.removeprefix(f"{key}."): value}
        values[section][name] = value
        files[key] = file
    try:
        return kind(**{section: part(**values[section]) for section, part in sections_of(kind).items()})
    except UserError as error:
        file = next(filter(None, map(files.get, re.findall(r"\w+\.\w+", str(error)))), "")
        raise UserError(f"{file}{error}") from error


def sections_of(kind: Any) -> dict[str, Any]:
    """The dataclass of each section by its name."""
    return {field.name: field.default_factory for field in dataclasses.fields(kind)}


def types_of_keys(kind: Any) -> dict[str, Any]:
    """The type of each SECTION.KEY."""
    found = {}
    for section, part in sections_of(kind).items():
        hints = typing.get_type_hints(part)
        found |= {f"{section}.{field.name}": hints[field.name] for field in dataclasses.fields(part)}
    return found


@functools.cache
def meanings(section: type) -> dict[str, str]:
    """What the documentation of a section, or of the section that it extends, says of each key."""
    params = [param for part in section.__mro__ for param in parse_docstring(part.__doc__ or "").params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


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
        content = _loaded(raw.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, a number of 5000 digits
        raise UserError(f"{path}: not YAML: {clipped(error, 300)}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not sections with keys")
    return content


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain values for YAML, JSON and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(settings))


def to_yaml(settings: Any) -> str:
    """Settings as a file that `--config` reads back to equal ones."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False)


class _Parser(argparse.ArgumentParser):
    """Raises a UserError where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help for the keys and their types")


def _parser(
    kind: Any, arguments: list[str], prog: str | None, description: str, flags: dict[str, str]
) -> argparse.ArgumentParser:
    """A parser whose `given` are pairs of a key and the text of its value, in their order."""
    usage = "%(prog)s [--config FILE] [--SECTION.KEY VALUE] ..."
    parser = _Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)

    def add(group: Any, key: str, metavar: str, meaning: str) -> None:
        pair = {"type": lambda text: (key, text), "action": "append", "dest": "given", "default": []}
        group.add_argument(f"--{key}", metavar=metavar, help=meaning.replace("%", "%%"), **pair)

    for flag, meaning in {**flags, "print_config": "print the resolved configuration as YAML, and end"}.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    add(parser, "config", "FILE", "YAML file with sections and keys as below; later files and options win")
    defaults, hints = to_dict(kind()), types_of_keys(kind)
    for section, part in sections_of(kind).items():
        group, said = parser.add_argument_group(section, part.__doc__.splitlines()[0]), meanings(part)
        for name, default in defaults[section].items():
            meaning = f"{said[name]} (default: {json.dumps(default)})"
            add(group, f"{section}.{name}", _word(hints[f"{section}.{name}"]), meaning)
    for argument in {argument.partition("=")[0].removeprefix("--") for argument in arguments}:
        if _KWARGS.search(argument):
            add(parser, argument, "VALUE", argparse.SUPPRESS)
    return parser


def _word(hint: Any) -> str:
    """A type in a word, as --help has it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "{" + ",".join(inner) + "}"
    if origin in _UNIONS:
        return "|".join(map(_word, inner))
    return {type(None): "NULL", tuple: "LIST"}.get(origin or hint, (origin or hint).__name__.upper())


def _unknown(key: str, known: Iterable[str]) -> str:
    """Words for an unknown key. One without its section, or with another's, is nearest the key of the same name."""
    alike = [each for each in known if each.partition(".")[2] == key.rpartition(".")[2]]
    nearest = alike or difflib.get_close_matches(key, known, n=1)
    return f"unknown key '{clipped(key)}'; " + (f"did you mean '{nearest[0]}'?" if nearest else "--help lists all keys")


def _with_contents(given: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, str]]:
    """(key, value, "FILE: "): what is given, with the content of files in place of their names; "" without a file."""
    for key, value in given:
        if key != "config":
            yield key, value, ""
            continue
        for section, keys in read_yaml(expanded(value)).items():
            if isinstance(keys, dict):
                yield from ((f"{section}.{name}", each, f"{value}: ") for name, each in keys.items())
            elif keys is not None:  # All keys of a section may be commented out.
                yield f"{section}", keys, f"{value}: "


def _of_text(text: str, hint: Any) -> Any:
    """A value that is given as text: the text itself where it may be one, else what it is in YAML."""
    if (shown := with_escaped_bytes(text)) != text:
        raise UserError(f"{shown}: not UTF-8. Rename it, or make a link to it")
    kinds = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else [hint]
    if str in kinds or Path in kinds or not text:
        return None if text == "null" and type(None) in kinds else text
    try:
        return _loaded(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"'{clipped(text)}' is not understood: {clipped(error, 200)}") from error


def _converted(value: Any, hint: Any) -> Any:
    """A plain value as its type has it. What is of another type stays, for the section refuses it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        found = ((_converted(value, part), part) for part in inner)
        return next((each for each, part in found if fits(each, part)), value)
    if hint is Path and isinstance(value, str):
        return expanded(value)
    if hint is float and fits(value, int) and abs(value) < 2**53:
        return float(value)
    if origin is list and isinstance(value, list):
        return [_converted(item, inner[0]) for item in value]
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return tuple(map(_converted, value, inner))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        try:
            return hint(**{name: _converted(each, hints.get(name)) for name, each in value.items()})
        except (AttributeError, TypeError) as error:
            first, *others = hints
            raise UserError(
                f"'{clipped(value)}' is no item: write {{{first}: VALUE}}, and what is needed of {', '.join(others)}"
            ) from error
    return value


class _Loader(_SafeLoader):
    """Plain values alone, and no key twice in a section: the first one would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return mapping


# PyYAML takes 1e-3 for text, as YAML 1.1 does.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def _loaded(text: str) -> Any:
    """What YAML says. Raises a YAMLError or ValueError, also about what settings never are and would take memory."""
    level = 0
    for event in yaml.parse(text, _SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        length = len(event.value) if isinstance(event, yaml.ScalarEvent) else 0
        if isinstance(event, yaml.AliasEvent) or level > _MOST_LEVELS or length > _MOST_CHARACTERS:
            raise yaml.YAMLError(
                f"an alias, more than {_MOST_LEVELS} levels or {_MOST_CHARACTERS} characters in line "
                f"{event.start_mark.line + 1}. Write each value out"
            )
    return yaml.load(text, _Loader)
