"""Worker processes that may be killed at any moment: whoever waits for them is told, and never waits in vain.

concurrent.futures.ProcessPoolExecutor (Python 3.11) hangs when a worker dies while others are being started, and
a lock that a dead worker held stays locked. So each worker has a pipe of its own here, and nothing is shared.
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
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.machine import use_short_socket_names

_PATIENCE_S = 0.2  # between two calls of `on_wait`
_starting = threading.Lock()  # of the server: the environment is changed for it


class LostWorkerError(UserError):
    """A worker process, or the server that forks them, was killed."""


def run_jobs(
    function: Callable,
    jobs: Sequence[tuple],
    workers: int,
    *,
    start: Callable[[int], None] | None = None,
    on_wait: Callable[[], None] = lambda: None,
    preload: Sequence[str] = (),
) -> Iterator[tuple[int, object]]:
    """(number of the job, `function(*job)`) of each job, in the order in which they end.

    When the iterator is closed or an error ends it, the jobs in work are let finish.

    Args:
      function, start: importable; `start(number)` is called first in each worker, with the worker's number.
      on_wait: called several times a second.
      preload: slow modules that the jobs import, which are then imported once for all workers.
    Raises:
      LostWorkerError: a worker was killed.
      Exception: what a job raised; its traceback in the worker is the cause.
    """
    pending = iter(enumerate(jobs))
    processes, idle, busy = [], [], set()
    try:
        with _reporting_lost_workers():
            context = forkserver_context(function.__module__, *preload)
            for number in range(min(workers, len(jobs))):
                ours, theirs = context.Pipe()
                idle.append(ours)
                processes.append(context.Process(target=_work, args=(theirs, function, start, number)))
                processes[-1].start()
                theirs.close()
        while True:
            for connection, job in zip(list(idle), pending, strict=False):
                with _reporting_lost_workers():
                    connection.send(job)
                idle.remove(connection)
                busy.add(connection)
            if not busy:
                return
            for connection in wait_for_handles(busy, timeout=_PATIENCE_S):
                with _reporting_lost_workers():
                    index, result, error, where = connection.recv()
                if error is not None:
                    raise error from RuntimeError(f"in a worker:\n{where}")
                busy.remove(connection)
                idle.append(connection)
                yield index, result
            on_wait()
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


def forkserver_context(*modules: str) -> multiprocessing.context.BaseContext:
    """Workers are forked from a server process that has imported the modules once, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules])
    # Ctrl-C goes to every process of the terminal, and this one alone is to answer it: the server and the workers
    # inherit that the signal is blocked.
    use_short_socket_names()
    resource_tracker.ensure_running()  # the server would start it, and that unblocks the signal
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
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def end_with_parent() -> None:
    """Called in a worker: it ends when its parent was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for_handles([parent.sentinel]), os._exit(1)), daemon=True).start()


def _work(connection: Connection, function: Callable, start: Callable[[int], None] | None, number: int) -> None:
    end_with_parent()  # it must not go on writing beside the next attempt
    with contextlib.suppress(EOFError, ConnectionError):  # nobody waits for a result any more
        while True:
            index, job = connection.recv()
            try:
                if start is not None:
                    start(number)
                    start = None
                answer = index, function(*job), None, ""
            except Exception as error:
                answer = index, None, error, traceback.format_exc()
            _send(connection, answer)


def _send(connection: Connection, answer: tuple) -> None:
    """Send an answer; what cannot be pickled goes as text."""
    try:
        connection.send(answer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        connection.send((answer[0], None, RuntimeError(f"{error}: {answer[2] or answer[1]!r}"), answer[3]))
