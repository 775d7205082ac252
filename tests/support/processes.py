"""This module helps tests and fault injection to start processes, or to do without them. It imports little."""

import contextlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def exit_code_of(command: Callable[[], object]) -> int:
    """Call `command`. Returns the exit code of a program that does this; an error's traceback is printed to stderr."""
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            _complain(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        _complain(traceback.format_exc())
        return 1
    return 0


def exit_with(command: Callable[[], object]) -> NoReturn:
    """Call `command` and end this fork of a process as a program that does this would end, whatever happens."""
    code = 1
    try:
        code = exit_code_of(command)
        flush_streams()
    finally:
        os._exit(code)


def flush_streams() -> None:
    """Write what `print` has kept, where that is still possible."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, or its disk full
        print(text, end="", file=sys.stderr)


@contextlib.contextmanager
def without_workers() -> Iterator[None]:
    """Inside, the jobs of `build`, `index` and `verify` run in this process."""
    with contextlib.ExitStack() as stack:
        for module in ("reindex", "verify", "build"):
            stack.enter_context(mock.patch(f"tools.lib.shards.{module}.run_jobs", _run_jobs))
        yield


def _run_jobs(function, jobs, workers, *, preload=()):
    """`tools.lib.common.process_pool.run_jobs` without workers."""
    for number, each in enumerate(jobs):
        yield number, function(*each)


def interpreted(script: str, *folders: Path) -> str:
    """Run a script whose Triton kernels are interpreted, which may import from `folders`; return what it prints.

    The script gets a process of its own, because Triton decides what it interprets when it is imported.
    """
    paths = os.pathsep.join(map(str, [REPOSITORY, REPOSITORY / "tests", *folders]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
