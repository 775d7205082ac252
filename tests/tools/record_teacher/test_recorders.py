"""Recorders that are killed at random moments, and others that take over, leave what one recorder makes in one go."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY
from support.forked_python import executable
from support.recordings import command, files, pieces, record, save_teacher

_LONG_ENOUGH_S = 120


def start(arguments: list[str], rank: int = 0, size: int = 1) -> subprocess.Popen:
    """A recorder of its own, as torchrun starts it."""
    variables = {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": size}
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}} if size > 1 else None
    program = [executable(), str(REPOSITORY / "tools" / "record_teacher.py"), *arguments]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for recorders, which must end well."""
    for process in processes:
        _, said = process.communicate(timeout=_LONG_ENOUGH_S)
        assert process.returncode == 0, said


def kill_at_random(arguments: list[str], chance: random.Random) -> int:
    """Start one to three recorders, and kill each within a second or so of its work. Returns how many were at work."""
    size = chance.randint(1, 3)
    processes = [start(arguments, rank, size) for rank in range(size)]
    killed = 0
    for process in processes:
        process.stderr.readline()  # It says how much it is to record, and begins.
        time.sleep(chance.uniform(0, 1.5))
        killed += process.poll() is None
        process.kill()
        process.communicate(timeout=_LONG_ENOUGH_S)
    return killed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_recorders_that_are_killed_and_replaced_leave_the_store_of_one_that_was_not(digits, tmp_path, kills):
    chance = random.Random(kills)
    teacher = save_teacher(tmp_path / "teacher.pth")
    epochs = ("--epochs", 15)  # These are ten blocks.
    record(tmp_path / "in-one-go", digits, teacher, *epochs)
    killed, stores = 0, [tmp_path / "store-0"]
    while killed < kills:
        at_work = kill_at_random(command(stores[-1], digits, teacher, *epochs), chance)
        killed += at_work
        if not at_work:  # Nothing was left to record.
            stores.append(tmp_path / f"store-{len(stores)}")
    for store in stores:
        finish([start(command(store, digits, teacher, *epochs), rank, 2) for rank in range(2)])
        assert files(store) == files(tmp_path / "in-one-go"), store


def test_processes_that_start_at_once_make_one_store(digits, tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pth")
    arguments = command(tmp_path / "store", digits, teacher)
    finish([start(arguments, rank, 2) for rank in range(2)] + [start(arguments)])  # The third does the work of both.
    record(tmp_path / "in-one-go", digits, teacher)
    assert files(tmp_path / "store") == files(tmp_path / "in-one-go")
    assert len(pieces(tmp_path / "store")) == 3 and not list((tmp_path / "store").glob("*.partial"))


def test_a_signal_while_the_program_is_loaded_ends_it_quietly(tmp_path):
    """Python itself is started: its modules are loaded only after the handlers are set."""

    program = [sys.executable, str(REPOSITORY / "tools" / "record_teacher.py"), str(tmp_path / "store")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = f"/proc/{process.pid}/status"

    def handled() -> int:
        with open(status) as file:
            return int(next(line.split()[1] for line in file if line.startswith("SigCgt")), 16)

    while not handled() >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=_LONG_ENOUGH_S) == ("", "") and process.returncode == 75
    assert not (tmp_path / "store").exists()
