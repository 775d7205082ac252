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

    def end(self, timeout: float = 60) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of every rank."""
        ends = [process.communicate(timeout=timeout) for process in self.processes]
        return [(process.returncode, *end) for process, end in zip(self.processes, ends, strict=True)]

    def await_line(self, rank: int) -> str:
        """The next line that a rank writes on stdout."""
        return self.processes[rank].stdout.readline()


def run_ranks(size: int, *arguments) -> str:
    """A run of several ranks with the settings in TINY. Returns what they wrote, one rank after the other."""
    with Ranks([REPOSITORY / "trainer" / "run.py", *TINY, *arguments], size) as ranks:
        ends = ranks.end(timeout=300)
    text = "\n".join(out + error for _, out, error in ends)
    assert [code for code, *_ in ends] == [0] * size, text
    return text
