"""A run's files by chance: what a page is made of after lines were cut, changed, or replaced by other things."""

import functools
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.attempts import Attempt, isolated
from pipelines.common.errors import exit_on_user_error
from pipelines.shards.quarantine import QUARANTINE
from tools.report import main
from trainer.config.sections import Config, to_yaml
from trainer.monitor.report.page import charts, differing_settings, numbers, page, read_run
from trainer.monitor.run_files import METRICS, SUMMARY

PROMISE = (
    "The files of a run are damaged. tools/report.py writes a page from what it can use and names the rest, or ends in "
    "one line."
)
VALUES = [
    *(None, True, "", "text", "\ud800", "\x1b[31m", "$\\frac$", "<script>", -1, 0, 1, 0.5, -5e9, 1e308, 10**400, 2**60),
    *(float("nan"), float("inf"), [], {}, [1], {"a": 1}, {"top1": "x"}, {"top1": None}, "x" * 5000),
]
NAMES = ["run", "a b", "$a$b$", "_run", "é", os.fsdecode(b"caf\xe9"), "<img src=x>", "a\nb", "x" * 200]
Damage = Callable[[Path, random.Random], None]


def write_run(folder: Path) -> None:
    """A run's files as a run leaves them that was resumed twice and has ended."""
    folder.mkdir()
    train = {"epoch": 0, "loss": 2.0, "lr": 1e-3, "images_per_s": 100.0, "input_wait": 0.1, "agreement": 50.0}
    accuracy = {"top1": 50.0, "top5": 90.0, "loss": 1.0, "images": 96}
    session = {"step": 0, "total_steps": 20, "steps_per_epoch": 5, "ranks": 2, "host": "here", "device": "cpu"}
    lines = [{"kind": "session", **session}, *({"kind": "train", "step": step, **train} for step in range(1, 21))]
    lines.insert(6, {"kind": "eval", "step": 5, "epoch": 0, "raw": accuracy, "ema": accuracy})
    lines.insert(12, {"kind": "rollback", "step": 9, "from_step": 10})
    lines.insert(15, {"kind": "session", **session, "step": 12})
    lines = [{**line, "time": 1.7e9 + number} for number, line in enumerate(lines)]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = {"split": "train", "shard": "train-00000.tar", "key": "a", "offset": 512, "error": "JPEG ends early"}
    (folder / QUARANTINE).write_text(json.dumps(bad) + "\n")
    deviation = {"key": "optim.lr", "usi": 2e-3, "here": 1e-3, "meaning": "peak learning rate"}
    summary = {"finished": True, "step": 20, "total_steps": 20, "deviations": [deviation], "best": {}, "session": {}}
    (folder / SUMMARY).write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(to_yaml(Config()))


def change_a_value(folder: Path, chance: random.Random) -> None:
    """A value in a log line has another type or size"""
    path = folder / METRICS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in chance.sample(lines, 3):
        line[chance.choice([*line, "time"])] = chance.choice(VALUES)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_the_summary(folder: Path, chance: random.Random) -> None:
    """A value in the summary has another type or size"""
    summary = json.loads((folder / SUMMARY).read_text())
    summary[chance.choice(list(summary))] = chance.choice([*VALUES, [1], [{"key": 1}]])
    (folder / SUMMARY).write_text(json.dumps(summary))


def change_the_configuration(folder: Path, chance: random.Random) -> None:
    """A section of config.yaml has another value"""
    section = chance.choice(["student", "teacher", "optim", "run", "7"])
    value = chance.choice(
        ["null", "3", "[1]", "{name: [1]}", "{name: 2026-01-01}", "{? [1, 2] : 3}", "{name: !!binary aGk=}"]
    )
    (folder / "config.yaml").write_text(f"{section}: {value}\n")


def change_bytes(folder: Path, chance: random.Random) -> None:
    """Some bytes of a file are changed or removed"""
    path = folder / chance.choice([METRICS, SUMMARY, QUARANTINE, "config.yaml"])
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(len(content))
        content[place : place + chance.randint(0, 20)] = chance.randbytes(chance.randint(0, 20))
    path.write_bytes(content[: chance.randrange(len(content) + 1)] if chance.random() < 0.3 else content)


def replace_a_file(folder: Path, chance: random.Random) -> None:
    """A file is replaced by something else"""
    path = folder / chance.choice([METRICS, SUMMARY, QUARANTINE, "config.yaml"])
    contents = [
        b"",
        b"\0" * 100,
        b"[]\n",
        b"null\n",
        b"3\n",
        b"{}\n",
        b"\xff\xfe",
        b"[" * 9000,
        b'{"a":' * 9000,
        b"9" * 9000,
    ]
    path.unlink()
    what = chance.randrange(len(contents) + 3)
    if what < len(contents):
        path.write_bytes(contents[what])
    elif what == len(contents):
        path.mkdir()
    elif what == len(contents) + 1:
        path.symlink_to("nowhere")


DAMAGES = (change_a_value, change_the_summary, change_bytes, replace_a_file, change_a_value, change_the_configuration)


def _report(folder: Path) -> None:
    """Everything that a page reports about a run, beside an undamaged one, except the drawing of pictures."""
    with exit_on_user_error():
        runs = [read_run(folder, "it"), read_run(folder.parent / "good", "good")]
        for some in (runs[:1], runs):
            charts(some)
            differing_settings(some)
            page(some, {}, {})
        numbers(runs[0])


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Damage one run after the other; every 30th is drawn as well, under some name."""
    write_run(folder / "good")
    _report(folder / "good")  # The forks then have what the first call imports and caches.
    for number in itertools.count(1):
        chance = random.Random(f"{seed} {number}")
        damage, drawn = DAMAGES[number % len(DAMAGES)], number % 30 == 0
        run = folder / (chance.choice(NAMES) if drawn else "run")
        write_run(run)
        damage(run, chance)
        command = functools.partial(main, [str(run), str(folder / "good"), "--out", str(folder / "out")])
        complaint = isolated(command if drawn else functools.partial(_report, run), seconds=60).complaint()
        shutil.rmtree(run)
        yield Attempt(damage.__doc__, f"attempt {number}: {complaint}" if complaint else "")
