"""Training runs that are broken at random moments, started again, and compared with an uninterrupted run.

Each run trains a small student with two ranks on the CPU, on scikit-learn's digits, three of them damaged. The process
that has everything imported forks the ranks, so that a start takes a second and not ten; else they are the processes
that torchrun would start.
"""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import support.tiny_model  # noqa: F401  (registers the student)
from chaos.attempts import Attempt
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.index import read_index
from pipelines.shards.quarantine import QUARANTINE
from support.processes import exit_with, free_port, without_workers
from tools.lib.common.photos import write_digits
from tools.lib.shards.build import BuildOptions, build
from trainer import run as trainer
from trainer.cluster.preemption import REQUEUE
from trainer.monitor.run_files import METRICS, SUMMARY
from trainer.state.checkpoint import BEST, checkpoints, checkpoints_folder, read

PROMISE = (
    "Runs of 20 steps with 2 ranks are interrupted at one or two random moments and started again. They end with "
    "weights, EMA, optimizer, log, summary and quarantine bit-equal to those of an uninterrupted run."
)
Fault = Callable[[list[int], random.Random, Path], None]
RANKS = 2
SETTINGS = [
    *("--student.name", "tiny_cnn", "--student.kwargs.drop_rate", "0.2", "--student.kwargs.drop_path_rate", "0.1"),
    *("--teacher.name", "null", "--data.image_size", "32", "--augment.mix_group", "16", "--run.global_batch", "64"),
    *("--data.max_bad_fraction", "0.05", "--ema.decay", "0.9", "--run.device", "cpu"),
    *("--schedule.epochs", "4", "--schedule.warmup_epochs", "1", "--schedule.cooldown_epochs", "0"),
    *("--run.checkpoint_every", "3", "--run.log_every", "1", "--run.ready_s", "20"),
    *("--run.keep_checkpoints", "3"),  # two may be damaged one after the other
]
STEPS = 20
_PATIENCE_S = 90.0  # a rank that is still there so long after the other has died hangs


def kill_one(ranks: list[int], chance: random.Random, _: Path) -> None:
    """SIGKILL to one rank."""
    os.kill(chance.choice(ranks), signal.SIGKILL)


def kill_all(ranks: list[int], _chance: random.Random, _: Path) -> None:
    """SIGKILL to all ranks, as in a power failure."""
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def preempt(ranks: list[int], chance: random.Random, _: Path) -> None:
    """SIGTERM or SIGUSR1 to one rank."""
    os.kill(chance.choice(ranks), chance.choice([signal.SIGTERM, signal.SIGUSR1]))


def truncate_newest(ranks: list[int], chance: random.Random, out: Path) -> None:
    """SIGKILL to all ranks, and the newest checkpoint is truncated."""
    kill_all(ranks, chance, out)
    for path in checkpoints(checkpoints_folder(out))[-1:]:
        os.truncate(path, chance.randrange(path.stat().st_size))


def change_newest(ranks: list[int], chance: random.Random, out: Path) -> None:
    """SIGKILL to all ranks, and a byte of the newest checkpoint changes."""
    kill_all(ranks, chance, out)
    for path in checkpoints(checkpoints_folder(out))[-1:]:
        with open(path, "r+b") as file:
            place = chance.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ chance.randrange(1, 256)]))


FAULTS = (kill_one, preempt, truncate_newest, kill_all, change_newest)


def make_dataset(folder: Path) -> Path:
    """Digits as a dataset, in several shards, three of its training images damaged."""
    write_digits(folder / "images", num_train=320, num_val=96)
    with without_workers():
        build(folder / "images", folder / "dataset", BuildOptions(samples_per_shard=100))
    index = read_index(folder / "dataset", "train")
    for row in index.samples[[7, 100, 319]]:
        with open(index.paths[row["shard"]], "r+b") as file:
            file.seek(int(row["offset"]) + int(row["nbytes"]) // 2)
            file.write(b"damaged")
    return folder / "dataset"


def start(arguments: list[str], log: Path, num_ranks: int = RANKS) -> list[int]:
    """Fork the ranks of a run. Returns their process ids."""
    everywhere = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
    }
    return [_fork({**everywhere, "RANK": rank, "LOCAL_RANK": rank}, arguments, log) for rank in range(num_ranks)]


def _fork(environment: dict, arguments: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid

    def rank() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # As trainer/run.py does where it is started as a program.
            signal.signal(number, lambda *_: os._exit(REQUEUE))
        with open(log, "a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.environ.update({name: str(value) for name, value in environment.items()})
        trainer.main(arguments)

    exit_with(rank)


def wait(ranks: list[int]) -> list[int]:
    """Exit codes of the ranks, negative for a signal. One that outlives the other by far is killed."""
    codes, deadline = {}, None
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                deadline = deadline or time.monotonic() + _PATIENCE_S
        if deadline and time.monotonic() > deadline:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
            raise UserError(f"a rank hangs {_PATIENCE_S:.0f} s after the other has ended")
        time.sleep(0.01)
    return [codes[pid] for pid in ranks]


def running(ranks: list[int]) -> bool:
    """Whether some rank has not ended; it is not waited for."""
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, pid, ended) is None for pid in ranks)


def num_sessions(out: Path) -> int:
    """How often a run has begun its loop."""
    return sum(line["kind"] == "session" for line in read_json_lines(out / METRICS))


def disturbed(
    out: Path, arguments: list[str], duration_s: float, first: Fault, chance: random.Random
) -> tuple[list[str], list[str]]:
    """A run that is broken once or twice, by `first` at first, and started again until it ends.

    Returns:
      what was done to it while it ran, and what went wrong, a sentence each.
    """
    log, done_to_it, wrong = out.with_suffix(".log"), [], []
    for fault in [first, *chance.sample(FAULTS, chance.choice([0, 0, 1]))]:
        before = num_sessions(out)
        ranks = start(arguments, log)
        done = max((int(path.stem.removeprefix("step-")) for path in checkpoints(checkpoints_folder(out))), default=0)
        time.sleep(chance.uniform(0, duration_s * max(0.3, 1 - done / STEPS)))
        begun = num_sessions(out) > before
        if running(ranks):
            fault(ranks, chance, out)
            done_to_it.append(fault.__doc__.rstrip("."))
        codes = wait(ranks)
        if fault is preempt and begun and not set(codes) <= {0, REQUEUE}:  # 0 where it came after the last step
            wrong.append(f"exit codes {codes} after a signal")
    if (codes := wait(start(arguments, log))) != [0] * RANKS:
        wrong.append(f"the undisturbed rest ended with {codes}: {log.read_text()[-1000:]}")
    return done_to_it, wrong


def compare(expected: Path, found: Path) -> list[str]:
    """How two runs that should be equal are not: weights, average, optimizer, log, quarantine."""
    a, b = (read(checkpoints(checkpoints_folder(out))[-1]) for out in (expected, found))
    wrong = [part for part in ("step", "student", "ema", "optimizer", "best") if not equal(a[part], b[part])]
    for kind, key in (("train", "loss"), ("eval", "raw")):
        lines = [
            [(line["step"], line[key]) for line in read_json_lines(out / METRICS) if line["kind"] == kind]
            for out in (expected, found)
        ]
        wrong += [f"the {kind} lines of metrics.jsonl"] if lines[0] != lines[1] else []
    ends = [json.loads((out / SUMMARY).read_text()) for out in (expected, found)]
    wrong += [f"'{key}' of summary.json" for key in ("finished", "evaluation", "best") if ends[0][key] != ends[1][key]]
    best = [read(out / "checkpoints" / BEST) for out in (expected, found)]
    wrong += ["best.pt"] if not equal(best[0]["state_dict"], best[1]["state_dict"]) else []
    named = [sorted(map(str, read_json_lines(out / QUARANTINE))) for out in (expected, found)]
    wrong += ["quarantine.jsonl"] if named[0] != named[1] else []
    return [f"{what} differs" for what in wrong]


def equal(a, b) -> bool:
    """Whether nested dictionaries and lists of tensors are, bit by bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Break one run after the other in `folder`, which is empty."""
    root = make_dataset(folder)

    def arguments(out: Path) -> list[str]:
        return [*SETTINGS, "--data.root", str(root), "--run.out", str(out)]

    peace, begin = folder / "undisturbed", time.monotonic()
    if (codes := wait(start(arguments(peace), folder / "undisturbed.log"))) != [0] * RANKS:
        raise UserError(f"{folder / 'undisturbed.log'}: the undisturbed run ended with {codes}")
    duration_s = time.monotonic() - begin
    for number in itertools.count():
        out, chance = folder / f"run-{number:02d}", random.Random(f"{seed} {number}")
        faults, wrong = disturbed(out, arguments(out), duration_s, FAULTS[number % len(FAULTS)], chance)
        wrong = wrong or compare(peace, out)
        yield Attempt((faults or [""])[0] or "the run had already finished", "; ".join(wrong))
