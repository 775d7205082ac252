"""One attempt to break a command: in a fork with a limit on its time and its memory, and how it ended."""

import contextlib
import dataclasses
import gc
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TextIO

from support.processes import exit_with


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Something that was tried.

    Attributes:
      kind: the fault that was made; the report has a row for each kind.
      fell: how the program broke its promise, with what is needed to do it again; "" where it kept it.
    """

    kind: str
    fell: str = ""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      code: exit code, negative for a signal; None where it was killed because its time was over.
      text: its output on stdout and stderr.
    """

    code: int | None
    text: str

    @property
    def last_line(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]

    def complaint(self) -> str:
        """Return what is wrong with how it ended; "" if it did its work or ended with one line for people."""
        if self.code is None:
            return "hangs"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        if "Traceback" in self.text:
            return f"traceback: {self.last_line[:200]}"
        if self.code and "error:" not in self.last_line:
            return f"exit {self.code} without a reason: {self.last_line[:200]}"
        return ""


def isolated(command: Callable[[], object], *, seconds: float = 20, mib: int = 2048) -> Ended:
    """Call `command` in a fork of this process, which must have no threads that matter.

    Args:
      seconds: after which it is killed, with all processes that it has started.
      mib: how much memory it may ask for beyond what this process has; more is a MemoryError there.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        pid = os.fork()
        if not pid:
            _call(command, output, mib)
        code = _await(pid, time.monotonic() + seconds)
        output.seek(0)
        return Ended(code, output.read())


def _call(command: Callable[[], object], output: TextIO, mib: int) -> None:
    def confined() -> None:
        gc.freeze()  # a collection here would copy every page with objects of the process that forked
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        limit = mapped_bytes() + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        command()

    exit_with(confined)


def mapped_bytes() -> int:
    """The address space that this process takes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _await(pid: int, deadline: float) -> int | None:
    """The exit code of a fork and the end of all that it has started; None where it was killed at the deadline."""
    code = None
    while code is None and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0 if done else 0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if code is None:
        os.waitpid(pid, 0)
    return code
