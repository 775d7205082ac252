"""Ranks that a test starts itself, as srun and torchrun start them."""

import os
import subprocess

from conftest import REPOSITORY, TINY
from support.forked_python import executable
from support.processes import free_port


class Ranks:
    """Processes started with RANK and WORLD_SIZE set, as srun and torchrun do; they end with the block.

    Args:
      command: arguments of python.
      started: which of the `size` ranks are started; all where nothing is said.
      python: the interpreter; "" is one that starts in no time.
    """

    def __init__(self, command: list, size: int, *, started: list[int] | None = None, python: str = "", **environment):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
        self.processes = [
            subprocess.Popen(
                [python or executable(), *map(str, command)],
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
                | {name: str(value) for name, value in environment.items()},
                cwd=REPOSITORY,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in (range(size) if started is None else started)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def end(self, timeout: float = 300) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of every rank."""
        ends = [process.communicate(timeout=timeout) for process in self.processes]
        return [(process.returncode, *end) for process, end in zip(self.processes, ends, strict=True)]

    def await_line(self, rank: int) -> str:
        """The next line that a rank writes on stdout."""
        return self.processes[rank].stdout.readline()


def run_ranks(size: int, *arguments) -> str:
    """A run of several ranks with the settings in TINY. Returns what they wrote, one rank after the other."""
    with Ranks([REPOSITORY / "trainer" / "run.py", *TINY, *arguments], size) as ranks:
        ends = ranks.end()
    text = "\n".join(out + error for _, out, error in ends)
    assert [code for code, *_ in ends] == [0] * size, text
    return text


def one_line(end: tuple[int, str, str], rank: int) -> str:
    """The message of a rank that ended with exit code 1 and one line."""
    code, _, error = end
    assert code == 1 and error.startswith(f"[rank {rank}] error: ") and error.count("\n") == 1, error
    return error


# A rank that joins the others with the facts in FACTS, or with an error that is given there.
JOIN = """
import json, os, sys
from pipelines.common.errors import UserError, exit_on_user_error
from trainer.cluster.world import join_world

def facts(_device):
    found = json.loads(os.environ["FACTS"])
    if os.environ["RANK"] in found:
        raise UserError(found[os.environ["RANK"]])
    return found

with exit_on_user_error(), join_world("cpu", facts, float(sys.argv[1])) as world:
    print("joined", world.rank, world.size)
"""

# A rank that updates for ever. The command line says what happens at step 20, and on which rank.
LOOP = """
import os, signal, sys, time
import torch
from pipelines.common.errors import exit_on_user_error
from trainer.cluster.world import join_world
from trainer.cluster.watchdog import Watchdog

seconds, rank, what = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def inputs(world):
    for step in range(10**9):
        world.heartbeat("step: input")
        if step == 20 and world.rank == rank:
            print("now", flush=True)
            if what in ("sleep", "left alone"):
                time.sleep(1000)
            if what == "error":
                raise IndexError("no such sample")
            if what in ("KILL", "STOP"):
                os.kill(os.getpid(), signal.Signals["SIG" + what])
        time.sleep(0.05)
        world.heartbeat("step: update")
        yield step

def checkpoint(world):
    world.heartbeat("checkpoint", 4 * seconds)
    if world.is_main:
        time.sleep(3 * seconds)
    world.barrier()

with exit_on_user_error(), join_world("cpu") as joined, Watchdog(joined, seconds) as world:
    for step in inputs(world):
        if what == "left alone" and step == 20:
            break
        world.all_reduce_sum(torch.ones(1))
        if what == "exit" and step == 20:
            sys.exit(75)
        if what == "slow" and step == 20:
            checkpoint(world)
            break
print("over")
"""
