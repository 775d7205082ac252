"""Studies that are killed at random moments, started again, and compared with an uninterrupted study.

Each makes shards of scikit-learn's digits, trains a teacher, records it, and trains, evaluates and exports three
students, two commands at a time.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from chaos.attempts import Attempt
from chaos.runs import compare
from pipelines.common.errors import UserError
from support.forked_python import executable
from support.processes import REPOSITORY
from tools.lib.common.photos import write_digits

PROMISE = (
    "Studies of three students are interrupted at one to three random moments, alone or with their commands, "
    "and started again. They end with the results, weights, recordings and exported models of an uninterrupted one."
)
Fault = Callable[[subprocess.Popen, Path], None]
_TRAINING = {"schedule.epochs": 2, "schedule.warmup_epochs": 1, "schedule.cooldown_epochs": 0}
STUDY = {
    "recipe": {
        "config": str(REPOSITORY / "configs" / "demo.yaml"),
        "overrides": {**_TRAINING, "run.checkpoint_every": 3, "run.log_every": 1, "run.device": "cpu"},
    },
    "teacher": {"name": "test_resnet", "train": {"augment.mix_prob": 0}},
    "students": [{"name": "test_byobnet", "seeds": [0, 1]}, "test_vit"],
    "evaluate": {"weights": ["ema", "raw"]},
    "speed": None,
}


def kill_study(study: subprocess.Popen, _: Path) -> None:
    """SIGKILL to the study alone."""
    study.kill()


def kill_all(study: subprocess.Popen, out: Path) -> None:
    """SIGKILL to the study and its commands, as in a power failure."""
    study.kill()
    for command in _commands(out):
        os.kill(command, signal.SIGKILL)


def kill_command(_: subprocess.Popen, out: Path) -> None:
    """SIGKILL to the commands of a study, which reports them as failed."""
    for command in _commands(out):
        os.kill(command, signal.SIGKILL)


def interrupt(study: subprocess.Popen, _: Path) -> None:
    """Ctrl-C."""
    study.send_signal(signal.SIGINT)


FAULTS = (kill_study, kill_all, interrupt, kill_command)


def _commands(out: Path) -> list[int]:
    """The processes whose command line names something in the folder of a study."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # It has ended.
            continue
        if any(word.startswith(os.fsencode(f"{out}/")) for word in words):
            found.append(int(folder.name))
    return found


def start(file: Path, out: Path) -> subprocess.Popen:
    """Start a study, whose output is added to OUT.log."""
    command = [executable(), str(REPOSITORY / "tools" / "study.py"), str(file), "--out", str(out), "--jobs", "2"]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def disturbed(file: Path, out: Path, duration_s: float, first: Fault, chance: random.Random) -> list[str]:
    """A study that is broken up to three times and then left in peace. Returns what was done to it."""
    done_to_it = []
    for fault in [first, *chance.sample(FAULTS, chance.choice([0, 1, 2]))]:
        study = start(file, out)
        try:
            study.wait(chance.uniform(0, 0.8 * duration_s))
        except subprocess.TimeoutExpired:
            fault(study, out)
            done_to_it.append(str(fault.__doc__).rstrip("."))
            study.wait(300)
    return done_to_it


def differences(expected: Path, found: Path) -> list[str]:
    """How two studies that should be equal are not."""
    wrong = []
    results = [json.loads((out / "study.json").read_text()) for out in (expected, found)]
    for result in results:
        result.pop("measured")
    wrong += ["study.json differs"] if results[0] != results[1] else []
    for run in sorted(expected.glob("t*/*/run")):
        name = run.relative_to(expected)
        wrong += [f"{name}: {each}" for each in compare(run, found / name)]
    same = [path for pattern in ("store/*/store/*", "export/*/model/*") for path in expected.glob(pattern)]
    for path in sorted(each for each in same if each.suffix in {".safetensors", ".onnx", ".json"}):
        other = found / path.relative_to(expected)
        if not other.is_file() or path.read_bytes() != other.read_bytes():
            wrong.append(f"{path.relative_to(expected)} differs")
    return wrong


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Break one study after the other in `folder`, which is empty."""
    write_digits(folder / "images", num_train=320, num_val=96)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({"title": "Chaos", "source": str(folder / "images"), **STUDY}))
    executable()  # Its start does not count.
    out, peace, begin = folder / "study", folder / "undisturbed", time.monotonic()
    if start(file, out).wait():
        raise UserError(f"{out}.log: the undisturbed study failed")
    duration_s = time.monotonic() - begin
    out.rename(peace)  # All studies are made in the same folder, because checkpoints and results name it.
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        faults = disturbed(file, out, duration_s, FAULTS[number % len(FAULTS)], chance)
        code = start(file, out).wait()
        log = out.with_suffix(".log").read_text()
        wrong = [f"the undisturbed rest ended with {code}: {log[-1000:]}"] if code else differences(peace, out)
        out.rename(folder / f"study-{number:02d}")
        yield Attempt((faults or [""])[0] or "the study had already finished", "; ".join(wrong))
