"""Command lines and YAML files that fill a dataclass of sections.

A program's settings are a dataclass whose fields, the sections, are dataclasses themselves, each with a default for
every key. `--config FILE` takes a YAML file of sections, `--section.key value` a single one; later wins.
"""

import dataclasses
import difflib
import functools
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from pipelines.common.errors import UserError, clipped, with_escaped_bytes
from pipelines.common.machine import expanded

T = TypeVar("T")
_LISTS = "a list is written [1,2], a list of pairs [[0,128],[100,160]], a list of items with keys [{name: resnet50}]"
_ITEM = "is not an item with keys: write {name: resnet50}"
_GOT = r"Got value: ?(.*)"
# The messages of jsonargparse, and what is printed instead.
_IN_WORDS = [
    (f"Expected a <class 'int'>. {_GOT}", r"'\1' is not a whole number"),
    (f"Expected a <class 'float'>. {_GOT}", r"'\1' is not a number"),
    (f"Expected a <class 'bool'>. {_GOT}", r"'\1' is neither true nor false"),
    (f"Expected a <class 'str'>. {_GOT}", r"'\1' is not text: in YAML, put it in quotes"),
    (f"Expected a <class 'dict'>. {_GOT}", r"'\1' is not a mapping: write {key: value}"),
    (f"Expected a <class '(?:list|tuple)'>. {_GOT}", rf"'\1' is not a list: {_LISTS}"),
    (rf"Expected a typing.Literal\[(?:'', )?(.*)\]. {_GOT}", lambda found: _not_among(found[1], found[2])),
    (f"Expected a tuple with (\\d+) elements. {_GOT}", r"'\2' is not a list of \1 values"),
    (f"Not a valid subclass of .*?{_GOT} Subclass types .*", rf"'\1' {_ITEM}"),
    ("Expected a dot import path string: (.*)", rf"'\1' {_ITEM}"),
    ("Not of type Path: .*", "not a path: in YAML, put it in quotes"),
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
    arguments, flags = sys.argv[1:] if arguments is None else arguments, flags or {}
    keys = _Keys(kind, flags)
    arguments = keys.checked(arguments)
    parser = _parser(kind, prog, description, tuple(flags.items()))
    try:
        values = parser.instantiate(_with_home_folders(parser.parse_args(arguments)))
    except ArgumentError as error:
        reason = _reason(str(error), _item_fields(kind))
        raise UserError(f"{keys.file_of(reason)}{reason}. See --help for the keys and their types") from error
    except UserError as error:
        raise UserError(f"{keys.file_of(str(error))}{error}") from error
    finally:
        vars(parser).pop("print_config", None)  # an error leaves it set, and the parser is used again
    return kind(**{name: values[name] for name in _sections(kind)})


@functools.cache
def _parser(kind: type, prog: str | None, description: str, flags: tuple[tuple[str, str], ...]) -> ArgumentParser:
    """The parser of `parse_settings`: to build it takes longer than to parse with it."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    for flag, meaning in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_argument("--config", action="config", help="YAML file with sections and keys as below")
    parser.add_class_arguments(kind)
    return parser


def _with_home_folders(value: Any) -> Any:
    """Parsed settings with the home folder in place of ~ in every path; namespaces are changed in place."""
    if isinstance(value, Path):
        return value if "\0" in str(value) else expanded(value)  # The section refuses a zero byte and names its key.
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _with_home_folders(item))
    return [_with_home_folders(item) for item in value] if isinstance(value, list) else value


def _reason(message: str, item_fields: list[str]) -> str:
    """Jsonargparse's message as one line, in words that need no Python."""
    reason = re.sub(r'(?:Parser key|Group) "([\w.]+)":', r"--\1:", " ".join(message.split()))
    reason = re.sub(r"Problem with given class_path '[\w.]+': ", "", reason)
    reason = re.sub(r"Option '(\w+)' is not accepted", lambda match: _unknown_in_item(match[1], item_fields), reason)
    if union := re.search("Does not validate against any of the Union subtypes(.*)Given value: (.*)", reason):
        lists = f"; {_LISTS}" if re.search("list|tuple", union[1]) else ""
        return f"{reason[: union.start()]}'{union[2]}' is not understood{lists}"
    for pattern, words in _IN_WORDS:
        reason = re.sub(pattern, words, reason)
    return reason


def _not_among(choices: str, value: str) -> str:
    """Words for a value that is none of the choices, which are given as 'one', 'other'."""
    return f"'{value}' is not one of " + choices.replace("'", "")


def _item_fields(kind: type) -> list[str]:
    """The keys that items of lists have, where they have keys."""
    hints = [hint for section in _sections(kind).values() for hint in typing.get_type_hints(section).values()]
    items = [item for hint in hints for item in typing.get_args(hint) if dataclasses.is_dataclass(item)]
    return [field.name for item in items for field in dataclasses.fields(item)]


def _unknown_in_item(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{nearest[0]}'" if nearest else f"there are {', '.join(known)}"
    return f"unknown key '{key}' in an item; {hint}"


_MOST_BYTES = 2**18  # A file of settings may be this large; all settings take a five-hundredth of it.
_MOST_VALUES = 10_000


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """Plain values alone, and no key twice in a section: the first one would be lost in silence.

    What `<<` merges into a section may stand there as well: the section's own value wins.
    """

    _merged = 0  # pairs of mappings, each counted as often as it is merged or read

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        seen, todo = set(), [root]
        while todo:
            node = todo.pop()
            if isinstance(node, yaml.CollectionNode) and node not in seen:
                seen.add(node)
                pairs = node.value if isinstance(node, yaml.MappingNode) else []
                self._check_keys([key for key, _ in pairs])
                todo += [part for pair in pairs for part in pair] or node.value
        return root

    def _check_keys(self, nodes: list[yaml.Node]) -> None:
        seen = set()
        for node in nodes:
            # `<<` has no constructor, for it is no key; a list or a mapping is refused as a key later.
            if isinstance(node, yaml.ScalarNode) and node.tag in self.yaml_constructors:
                key = self.construct_object(node)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", node.start_mark)
                seen.add(key)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"merges more than {_MOST_VALUES} values")


def read_yaml(path: Path, option: str = "config") -> dict:
    """The content of a file of settings, a mapping; {} of an empty one. Raises a UserError about anything else."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"--{option} {path}: {error.strerror}") from error
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{path}: larger than {_MOST_BYTES >> 10} KiB, so not a file of settings. Name another one")
    try:
        content = yaml.load(raw.decode("utf-8-sig"), _Loader)  # a safe loader
        _check_bounds(content, path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a number of 5000 digits
        if isinstance(error, UserError):
            raise
        advice = ". YAML is indented with spaces, not with tabs" if b"\t" in raw else ""
        raise UserError(f"{path}: not YAML: {clipped(error, 300)}{advice}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not sections with keys")
    return content


def _check_text(value: str, option: list[str]) -> None:
    """Raise a UserError about a value, of the option in the list, that is no UTF-8, so that no file can hold it."""
    if with_escaped_bytes(value) != value:
        raise UserError(
            f"{' '.join(option)} {with_escaped_bytes(value)}: not UTF-8. Rename it, or make a link to it".strip()
        )


def _check_bounds(value: object, where: object) -> None:
    """Raise a UserError if a value, or text that YAML reads as one, grows beyond bounds by its aliases."""
    if isinstance(value, str):
        if "*" not in value:
            return
        try:
            value = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            return  # said later, with its key
    count, todo = 0, [value]
    while todo:
        part = todo.pop()
        inner = [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, (list, set)) else ()
        count += 1 + len(inner)
        if count > _MOST_VALUES:
            raise UserError(f"{where}: holds more than {_MOST_VALUES} values, so not settings")
        todo.extend(inner)


def _keys_of(path: str, content: dict, sections: dict[str, type]) -> Iterator[str]:
    """The 'section.key's of a file."""
    for section, keys in content.items():
        if section not in sections:
            yield clipped(section)
        elif isinstance(keys, dict):
            yield from (f"{section}.{clipped(key)}" for key in keys)
        else:
            raise UserError(f"{path}: section '{section}' holds {clipped(keys)}, not keys with values")


def _sections(kind: Any) -> dict[str, Any]:
    """The dataclass of each section by its name."""
    return {field.name: field.default_factory for field in dataclasses.fields(kind)}


class _Keys:
    """The keys of a dataclass of sections; refuses others, naming the nearest known one."""

    def __init__(self, kind: type, flags: dict[str, str]):
        self._sections = _sections(kind)
        self._keys = [
            f"{name}.{field.name}" for name, section in self._sections.items() for field in dataclasses.fields(section)
        ]
        self._free = [key for key in self._keys if key.endswith(".kwargs")]
        self._files: dict[str, str] = {}  # key -> the file that has its value
        self._flags = {"help", "print_config", *flags, *(f"{key}.help" for key in self._keys)}

    def file_of(self, message: str) -> str:
        """The beginning of a message about the value of a key: its file, "" where the command line has it."""
        keys = re.findall(rf"\b(?:{'|'.join(self._sections)})\.\w+", message)
        return next((f"{self._files[key]}: " for key in keys if key in self._files), "")

    def checked(self, arguments: list[str]) -> list[str]:
        """The arguments with the content of files in place of their names: a file may be a pipe, to be read but once.

        Raises:
          UserError: an unknown key on the command line or in a file that it names, or a file that cannot be read.
        """
        checked, waiting = [], iter(arguments)
        for argument in waiting:
            checked.append(argument)
            if not argument.startswith("--"):
                _check_text(argument, checked[-2:-1])
                _check_bounds(argument, clipped(argument))
                continue
            key, equals, value = argument[2:].partition("=")
            key = key.removesuffix("+")  # adds to a list
            if key == "config" or key in self._sections:
                name = value if equals else next(waiting, "")
                checked[-1:] = [f"--{key}", self._content(key, name)]
            elif key not in self._flags:
                _check_text(value, [f"--{key}"])
                self._check(key, "", "--")
                self._files.pop(".".join(key.split(".")[:2]), None)
                _check_bounds(value, f"--{key}")
        return checked

    def _content(self, key: str, name: str) -> str:
        """The content of the file of --config, or of the section `key`, whose keys are known."""
        if key == "config" and not name:
            raise UserError("--config: which file? Give its path")
        if key != "config" and not expanded(name).is_file():
            raise UserError(f"--{key} takes a YAML file, and {name or 'nothing'} is none; did you mean '--{key}.KEY'?")
        content = read_yaml(expanded(name), key)
        if key == "config":  # all keys of a section may be commented out
            content = {section: {} if keys is None else keys for section, keys in content.items()}
        for file_key in _keys_of(name, content if key == "config" else {key: content}, self._sections):
            self._check(file_key, f"{name}: ", "")
            self._files[file_key] = name
        return yaml.safe_dump(content, default_flow_style=True, width=_MOST_BYTES)

    def _check(self, key: str, where: str, dashes: str) -> None:
        if key in self._sections or key in self._keys or key.rpartition(".")[0] in self._free:
            return
        # a key without its section, or with another one's, is near the key of the same name
        alike = [known for known in self._keys if known.partition(".")[2] == key.rpartition(".")[2]]
        nearest = alike or difflib.get_close_matches(key, [*self._keys, *self._sections])
        hint = f"; did you mean '{dashes}{nearest[0]}'?" if nearest else ". See --help for the keys"
        raise UserError(f"{where}unknown key '{dashes}{key}'{hint}")
