"""A stand-in for `python` that starts programs in no time: forks of one process that has imported everything.

A process that imports torch and timm takes ten seconds of a core before it does anything, and the tests start many.
`executable()` gives the path of a program that takes `-m MODULE`, `-c CODE` or `SCRIPT` with arguments, as python
does, and that can be given to subprocess, torchrun or a shell script: it has standard streams, environment, working
folder, network namespace, signals and exit code of its own. Tests must start python itself for what is settled before
or while torch is imported (variables of OpenMP, limits of the system, signals that are ignored from the start).

The processes of xdist are such forks, too, and find the test files imported. They differ in what tests see:
`sys.executable` is python itself, and the report at a run's end has its pictures, which conftest.py leaves out.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

_PRELOADED = (
    *("support.tiny_model", "trainer.run", "tools.evaluate"),
    *("tools.predict", "tools.doctor", "tools.benchmark", "tools.compare"),
)
_WORKER = "--worker"  # The first argument of the processes of xdist.
_SHARED = "USI_TESTS_FORKED_PYTHON"  # In the environment: the program of the process that `start_for_workers` started.
_TESTS = Path(__file__).resolve().parents[1]
_PROGRAM = Path(__file__).with_name("forked_program.py")
_NETWORK = "/proc/self/ns/net"


@functools.cache
def executable() -> str:
    """The program's path, once it can be forked; the process that is forked ends with the one that started it."""
    program = os.environ.get(_SHARED) or _start()
    subprocess.run([program, "-c", ""], check=True)
    return program


def start_for_workers(tests: list[str]) -> str:
    """Start the process that is forked, for this one and all that it starts; `executable` waits until it is ready.

    Args:
      tests: the files and folders that pytest was given.
    Returns:
      the command of the python that xdist is to start its processes with.
    """
    os.environ[_SHARED] = _start(tests)
    return f"{os.environ[_SHARED]} {_WORKER}"


def _start(tests: Sequence[str] = ()) -> str:
    """Start the process that is forked. A program that is started before it is ready waits for it."""
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    address, program = Path(folder.name) / "socket", Path(folder.name) / "python"
    standing_for_forks = shlex.join([sys.executable, "-IS", str(_PROGRAM), str(address)])
    program.write_text(f'#!/bin/sh\nexec {standing_for_forks} "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as trainer/run.py sets it
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # No fork could use a GPU after this process has opened it.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        command = [sys.executable, __file__, str(listener.fileno()), str(program), *tests]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "pass_fds": [listener.fileno()]}
        server = subprocess.Popen(command, env=environment, **pipes)
    atexit.register(lambda: (server.kill(), server.wait(), folder.cleanup()))
    return str(program)


# --- the process that is forked ---


def _serve(listening: int, program: str, tests: list[str]) -> None:
    import importlib
    import select

    sys.path[:1] = [str(_TESTS.parent), str(_TESTS)]
    for module in ("support.processes", *_PRELOADED):
        importlib.import_module(module)
    sys.modules["trainer.config.sections"].parse([], prog="trainer/run.py")  # the parser is kept, also for the forks
    if tests:
        _import_tests(tests)
    gc.freeze()  # a collection in a fork would copy every page with objects of this process
    forks: dict[socket.socket, int] = {}
    ends: dict[int, socket.socket] = {}  # the descriptor of a fork can be read when it has ended
    with socket.socket(fileno=listening) as listener:
        while True:
            ready, _, _ = select.select([0, listener, *forks, *ends], [], [])
            if 0 in ready:  # whoever started this process has ended
                break
            if listener in ready:
                connection = listener.accept()[0]
                forks[connection] = _forked(connection, program, [listener, *forks])
                ends[os.pidfd_open(forks[connection])] = connection
            for end in ends.keys() & set(ready):
                connection = ends.pop(end)
                _, status = os.waitpid(forks.pop(connection), 0)
                with contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()
                os.close(end)
            for connection in forks.keys() & set(ready):  # its program was killed
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(forks[connection], signal.SIGKILL)
    for pid in forks.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _import_tests(tests: list[str]) -> None:
    """Import the files of tests as pytest does, which rewrites what they assert. The forks find an error as well."""
    import pytest

    class NoItems:
        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(self, items: list) -> None:
            items.clear()

    paths = list(sys.path)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # The forks import the plugins of other packages themselves.
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *tests], plugins=[NoItems()])
    sys.path[:] = paths


def _forked(connection: socket.socket, program: str, others: list[socket.socket]) -> int:
    _, (*streams, network), _, _ = socket.recv_fds(connection, 1, 4)
    with connection.makefile("r") as lines:
        wanted = json.loads(lines.readline())
    pid = os.fork()
    if pid:
        for stream in (*streams, network):
            os.close(stream)
        connection.sendall(f"{pid}\n".encode())
        return pid
    for other in (connection, *others):
        other.close()
    _enter_network(network)
    _become(wanted, streams, program)


def _enter_network(network: int) -> None:
    """Move this process into a network namespace, where it is in another one."""
    if os.stat(network).st_ino != os.stat(_NETWORK).st_ino:
        import ctypes

        assert ctypes.CDLL(None).setns(network, 0x40000000) == 0  # CLONE_NEWNET
    os.close(network)


def _become(wanted: dict, streams: list[int], program: str) -> None:
    """Be what python would be with these arguments. Never returns."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    sys.stdin = os.fdopen(0, closefd=False)
    at_once = "-u" in wanted["arguments"][:2] or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stdout.reconfigure(write_through=at_once)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace", buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = wanted["arguments"]
    if arguments[0] == _WORKER:
        arguments = arguments[1:]
    else:
        sys.executable = program
        # The report at a run's end gets empty pictures, as in conftest.py: to draw them takes as long as a short run.
        sys.modules["trainer.monitor.report.page"].draw = lambda chart: b""
    os._exit(_ended(arguments))


def _ended(arguments: list[str]) -> int:
    """Do what the arguments say. Returns the exit code."""
    from support.processes import exit_code_of, flush_streams

    code = exit_code_of(lambda: _run(arguments[1:] if arguments[0] == "-u" else arguments))
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    flush_streams()
    return code


def _run(arguments: list[str]) -> None:
    import runpy

    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:2] = [path for path in paths if path]
    if arguments[0] == "-m":
        sys.argv, sys.path[:0] = arguments[1:], [os.getcwd()]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *arguments[2:]], [""]
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(arguments[0]).resolve().parent)]
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
