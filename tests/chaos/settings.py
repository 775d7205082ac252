"""Settings by chance: values of all kinds for every key, and files that are not what --config asks for."""

import dataclasses
import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import yaml

from chaos.attempts import Attempt, isolated
from pipelines.common.errors import exit_on_user_error
from tools.lib.common.evaluation import EvalConfig
from trainer import run as trainer
from trainer.config.cli import parse_settings
from trainer.config.sections import Config, parse

T = TypeVar("T")
PROMISE = (
    "Any value for any setting of a run or an evaluation, on the command line or in a file, is accepted, or refused in "
    "one line that names the key. Any file for --config is read, or refused in one line. A run whose settings are "
    "accepted but cannot be used ends in one line before anything is written."
)
VALUES = [
    *(None, "", "text", "null", "a\0b", "~nobody/x", "\ud800", True, -1, 0, 1, 10**30, -(10**30), 0.5, 1e300, 1e-300),
    *(math.nan, math.inf, -math.inf, [], {}, [1], [None], [[1, 2]], [0.1, 0.2], {"a": 1}, "x" * 5000),
]
_SMALL_RUN = [
    *("--data.pipeline", "synthetic", "--data.synthetic_samples", "64", "--data.image_size", "32"),
    *("--student.name", "test_resnet", "--teacher.name", "null", "--augment.mix_group", "8", "--run.device", "cpu"),
    *("--run.global_batch", "16", "--data.synthetic_classes", "10", "--run.stop_after_steps", "1"),
]


_ENDS_IT = ("run", "stop_after_steps")  # Such a run would take long without it.


@functools.cache
def keys(kind: type) -> list[tuple[str, str]]:
    """All (section, name)s of a configuration."""
    sections = [(field.name, field.default_factory) for field in dataclasses.fields(kind)]
    return [(name, field.name) for name, section in sections for field in dataclasses.fields(section)]


def as_text(value: object) -> str:
    """A value as the command line takes it."""
    return (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9).split("\n")[0]
    )


def _parsed(kind: type[T], arguments: list[str]) -> T:
    with exit_on_user_error():
        return parse_settings(kind, arguments, prog="settings", description="")


def _value(folder: Path, chance: random.Random, in_file: bool) -> str:
    """A value for a key. Returns how it fell."""
    kind = chance.choice([Config, Config, EvalConfig])
    (section, name), value = chance.choice(keys(kind)), chance.choice(VALUES)
    arguments = [f"--{section}.{name}", as_text(value)]
    if in_file:
        path = folder / "value.yaml"
        path.write_text(yaml.safe_dump({section: {name: value}}))
        arguments = ["--config", str(path)]
    ended = isolated(lambda: _parsed(kind, arguments))
    complaint = ended.complaint()
    if ended.code == 1 and f"{section}.{name}" not in ended.text and "not YAML" not in ended.text:
        complaint = complaint or f"the key is not named: {ended.last_line[:200]}"
    return f"{section}.{name} = {value!r}: {complaint}" if complaint else ""


def _bomb(depth: int = 30) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth))]
    return "student:\n  kwargs:\n" + "".join(f"    {line}\n" for line in lines)


DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "only a comment": b"# nothing\n",
    "a list": b"- 1\n- 2\n",
    "broken brackets": b"optim: {lr: [1, 2\n",
    "a tab": b"optim:\n\tlr: 1\n",
    "a byte order mark": "\ufeffoptim: {lr: 0.5}\n".encode(),
    "UTF-16": "optim: {lr: 0.5}\n".encode("utf-16"),
    "Latin-1": b"student: {name: caf\xe9}\n",
    "binary": bytes(range(256)) * 64,
    "a tag of Python": b"student: !!python/object/apply:os.system ['touch ran']\n",
    "an unknown tag": b"optim: {lr: !secret 1}\n",
    "aliases that grow": _bomb().encode(),
    "an alias of itself": b"student: {kwargs: &a {x: *a}}\n",
    "an alias to nothing": b"optim: {lr: *nothing}\n",
    "an anchor that is used": b"optim: &o {lr: 0.5, weight_decay: 0.1}\n",
    "a merge": b"optim: {<<: {lr: 0.5}, eps: 0.1}\n",
    "a merge of another value": b"optim: {<<: {lr: 0.1}, lr: 0.5}\n",
    "merges in merges": b"optim: " + b"{<<: " * 15 + b"{lr: 0.5}" + b"}" * 15 + b"\n",
    "a number of many hexadecimal digits": b"run: {seed: 0x" + b"f" * 1990 + b"}\n",
    "a number that no float holds": b"optim: {lr: 1" + b"0" * 400 + b"}\n",
    "a section twice": b"optim: {lr: 0.5}\noptim: {eps: 0.1}\n",
    "a key twice": b"optim: {lr: 0.5, lr: 0.1}\n",
    "two documents": b"optim: {lr: 0.5}\n---\noptim: {lr: 0.1}\n",
    "a section that is null": b"optim:\n",
    "a key that is a list": b"? [optim, lr]\n: 1\n",
    "a key that is a number": b"optim: {1: 2}\n7: {lr: 1}\n",
    "a date": b"student: {name: 2026-01-01}\n",
    "a number of 5000 digits": b"run: {seed: " + b"9" * 5000 + b"}\n",
    "deep brackets": b"student: {kwargs: {a: " + b"[" * 20000 + b"]" * 20000 + b"}}\n",
    "deep maps": b"optim: " + b"{a: " * 5000 + b"}" * 5000 + b"\n",
    "a long line": b"student: {name: " + b"x" * 200_000 + b"}\n",
    "a large file": b"# " + b"x" * 2_000_000 + b"\noptim: {lr: 0.5}\n",
    "many keys": b"student:\n  kwargs:\n" + b"".join(b"    k%d: 1\n" % i for i in range(20_000)),
}


# Those that are no mistake; each says that the learning rate is 0.5.
_GOOD = {"a byte order mark", "an anchor that is used", "a merge", "a merge of another value"}


def _document(folder: Path, content: bytes, is_good: bool = False) -> str:
    path = folder / "document.yaml"
    path.write_bytes(content)

    def command() -> None:
        lr = _parsed(Config, ["--config", str(path)]).optim.lr
        assert lr == 0.5 or not is_good, lr

    ended = isolated(command)
    return ended.complaint() or (f"refused: {ended.last_line[:200]}" if ended.code and is_good else "")


def _mutated(folder: Path, chance: random.Random) -> str:
    """A good file of which some bytes are changed, cut or doubled."""
    good = bytearray(
        yaml.safe_dump({"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "run": {"loggers": ["wandb"]}}).encode()
    )
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(good))
        good[place : place + chance.randint(0, 3)] = bytes(
            chance.choices(b"{}[]:,-&*!|>'\"%@`#\t\n \0\xff1a.", k=chance.randint(0, 4))
        )
    complaint = _document(folder, bytes(good))
    return f"{bytes(good)!r}: {complaint}" if complaint else ""


def _place(folder: Path, chance: random.Random) -> str:
    """Something else than a file."""
    read, write = os.pipe()
    os.write(write, b"optim: {lr: 0.5}\n")
    os.close(write)
    place = chance.choice(
        [str(folder), f"/dev/fd/{read}", "/dev/null", "/dev/zero", "", "x" * 5000, "missing", "~nobody/x"]
    )
    option = chance.choice(["--config", "--optim"])
    ended = isolated(lambda: _parsed(Config, [option, place]))
    os.close(read)
    complaint = ended.complaint()
    return f"{option} {place[:40]}: {complaint}" if complaint else ""


def _run(folder: Path, chance: random.Random) -> str:
    """A run with some value that its type and range allow."""
    value = chance.choice(
        [0, 1, 2, 3, 7, 1000, 10**6, 2**31 - 1, 0.5, 1e-9, 1e9, True, "text", [1e-9, 1.0], [0.5, 1e9]]
    )
    section, name = chance.choice([key for key in keys(Config) if key[0] != "student" and key != _ENDS_IT])
    out = folder / "run"
    arguments = [*_SMALL_RUN, "--run.out", str(out), f"--{section}.{name}", as_text(value)]
    ended = isolated(lambda: trainer.main(arguments), seconds=60, mib=4096)
    complaint = ended.complaint()
    if ended.code and out.exists() and "finite" not in ended.last_line:
        complaint = complaint or f"something was written: {ended.last_line[:200]}"
    for path in sorted(folder.rglob("run/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    out.rmdir() if out.is_dir() else None
    return f"{section}.{name} = {value!r}: {complaint}" if complaint else ""


def _kinds(folder: Path) -> Iterator[tuple[str, Callable[[random.Random], str]]]:
    """What is tried, by its name: values mostly, each document now and then, whole runs seldom."""
    documents = itertools.cycle(DOCUMENTS.items())
    for number in itertools.count(1):
        if number % 30 == 0:
            yield "a run with an allowed value", functools.partial(_run, folder)
        elif number % 2:
            name, content = next(documents)
            yield f"a file: {name}", lambda _, name=name, content=content: _document(folder, content, name in _GOOD)
        elif number % 10 == 0:
            yield "a path that is not a file", functools.partial(_place, folder)
        elif number % 8 == 0:
            yield "bytes of a file changed", functools.partial(_mutated, folder)
        else:
            in_file = bool(number % 4)
            kind = "a value in a file" if in_file else "a value on the command line"
            yield kind, functools.partial(_value, folder, in_file=in_file)


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Try one value or file after the other; `folder` is empty."""
    parse([])  # The forks then have what the first call imports and caches.
    for number, (kind, tried) in enumerate(_kinds(folder)):
        yield Attempt(kind, tried(random.Random(f"{seed} {number}")))
