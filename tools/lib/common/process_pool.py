"""Worker processes that may be killed at any moment: the caller gets an error and never waits in vain.

Each worker has a pipe of its own, and the workers have no lock in common that a dead one could hold. When one is killed
the others still finish the jobs that they have begun. Other pools do not: loky 3.7 kills all workers then, and
concurrent.futures of Python 3.10 and 3.11 deadlocks if a worker dies while others are being started (cpython #94777).
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_handles
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from pipelines.common.errors import UserError
from pipelines.common.machine import use_short_socket_names

T = TypeVar("T")
_starting = threading.Lock()  # One thread at a time starts the server, since the environment is changed for it.


class LostWorkerError(UserError):
    """A worker process, or the server that forks them, was killed."""


# What became of a job: its number and result, or an error with its traceback in the worker.
_Answer = tuple[int, Any, Exception | None, str]


def run_jobs(
    function: Callable[..., T],
    jobs: Sequence[tuple],
    workers: int,
    *,
    preload: Sequence[str] = (),
) -> Iterator[tuple[int, T]]:
    """(number of the job, `function(*job)`) of each job, in the order in which they end.

    When the iterator is closed or an error ends it, it waits for the jobs that have begun.

    Args:
      function: importable.
      preload: slow modules that the jobs import, which are then imported once for all workers.
    Raises:
      LostWorkerError: a worker was killed.
      Exception: what a job raised; its traceback in the worker is the cause.
    """
    pending = iter(enumerate(jobs))
    processes, idle, busy = [], [], []
    try:
        with _reporting_lost_workers():
            context = forkserver_context(function.__module__, *preload)
            for _ in range(min(workers, len(jobs))):
                ours, theirs = context.Pipe()
                idle.append(ours)
                processes.append(context.Process(target=_work, args=(theirs, function)))
                processes[-1].start()
                theirs.close()
        while True:
            while idle and (job := next(pending, None)) is not None:
                busy.append(idle.pop())
                with _reporting_lost_workers():
                    busy[-1].send(job)
            if not busy:
                return
            ready = wait_for_handles(busy)
            for connection in [each for each in busy if each in ready]:
                with _reporting_lost_workers():
                    answer: _Answer = connection.recv()
                number, result, error, lines = answer
                if error is not None:
                    raise error from RuntimeError(f"in a worker:\n{lines}")
                busy.remove(connection)
                idle.append(connection)
                yield number, result
    finally:
        for connection in [*idle, *busy]:
            connection.close()
        for process in processes:
            if process.pid is not None:
                process.join()


@contextlib.contextmanager
def _reporting_lost_workers() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise LostWorkerError("a worker was killed, perhaps for want of memory. Use fewer --workers") from error


def forkserver_context(*modules: str) -> ForkServerContext:
    """Workers are forked from a server process that has imported the modules once, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules])
    # Ctrl-C goes to every process of the terminal, and this one alone is to answer it: the server and the workers
    # inherit that the signal is blocked.
    use_short_socket_names()
    resource_tracker.ensure_running()  # Otherwise the server starts it, which unblocks the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _starting, _this_copy_first():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return context


@contextlib.contextmanager
def _this_copy_first() -> Iterator[None]:
    """A process that is started inside imports this copy of the program, where there is another one.

    One may be installed or lie in the present folder; the server imports before it hears of this process's sys.path.
    """
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, paths)), PYTHONSAFEPATH="1")
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            del os.environ[name]
        os.environ.update(before)


def end_with_parent() -> None:
    """Called in a worker: it ends when its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait_for_handles([parent.sentinel]), os._exit(1)), daemon=True).start()


def _work(connection: Connection, function: Callable) -> None:
    end_with_parent()  # It must not keep writing beside the next attempt.
    with contextlib.suppress(EOFError, ConnectionError):  # Nobody waits for a result any more.
        while True:
            index, job = connection.recv()
            answer: _Answer
            try:
                answer = index, function(*job), None, ""
            except Exception as error:
                answer = index, None, error, traceback.format_exc()
            try:
                connection.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                text = RuntimeError(f"cannot be pickled ({error}): {answer[1:3]!r}")
                connection.send((index, None, text, answer[3]))
