"""Models timed in turn, each in a process of its own: speed, latency, memory, and whether it computes the same."""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError, clipped, with_escaped_bytes
from tools.lib.common.process_pool import end_with_parent, forkserver_context
from tools.lib.compare.backends import BACKENDS, Backend, Plan, Session
from tools.lib.compare.candidates import REFERENCE, Candidate, Facts, prepare

_RUN_S = 0.5  # A timed run measures the throughput for this long, or for one call that takes longer.
_LATENCY_S = 0.2  # It measures the latency for this long,
_FEWEST_SINGLE = 3  # and with this many images at least.
_TRIES = 4  # So many calls show how many a timed run has.
_PATIENCE_S = 10  # A process has this long to end by itself.
# Half precision changes a random network's logits by a much smaller fraction, another function by a larger one.
MOST_DIFFERENT = 0.2
_MIB = 1 << 20


class FailedError(Exception):
    """A process could not do what it was asked for; the message says why, in a line."""


@dataclasses.dataclass(kw_only=True)
class Opened:
    """What a session reports when it has been opened.

    Attributes:
      batch: images a call; calls_at_once: calls beside each other.
      precision: the number format in which it computes.
      peak_memory_mib: the most while it infers, above what the process held before the model was opened.
      difference_from_pytorch: length of the logits' difference from PyTorch's in float32, as a fraction of their
        length.
    """

    batch: int
    calls_at_once: int
    precision: str
    peak_memory_mib: float
    difference_from_pytorch: float


@dataclasses.dataclass
class Measured:
    """A model on a backend.

    Attributes:
      speeds: images/s of each timed run; latencies: the median seconds for one image in each.
      failed: why there are none.
    """

    model: Candidate
    backend: Backend
    facts: Facts | None = None
    opened: Opened | None = None
    speeds: list[float] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)
    failed: str = ""


Progress = Callable[[str], None]  # It is called after each piece of work with what was done.


def measure(models: Sequence[Candidate], backends: Sequence[Backend], plan: Plan, progress: Progress) -> list[Measured]:
    """Measure all models on all backends, one backend after the other.

    What fails is noted in its place and disturbs nothing else.
    """
    with tempfile.TemporaryDirectory(prefix="usi-compare-") as scratch:
        folders = {model: Path(scratch) / str(number) for number, model in enumerate(models)}
        prepared = _prepared(folders, sorted({backend.file for backend in backends} - {""}), plan.threads, progress)
        return [row for backend in backends for row in _measured(backend, prepared, folders, plan, progress)]


Prepared = dict[Candidate, Facts | FailedError]


def _prepared(folders: dict[Candidate, Path], files: list[str], workers: int, progress: Progress) -> Prepared:
    """Let a process for each model write its files, as many at a time as there are cores."""

    def one(model: Candidate) -> Facts | FailedError:
        folders[model].mkdir()
        try:
            with Process(_serve_preparation, model, folders[model], files) as process:
                return process.answer()
        except FailedError as error:
            return error
        finally:
            progress(f"prepared {model.label}")

    pool = ThreadPoolExecutor(workers)
    try:
        return dict(zip(folders, pool.map(one, folders), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # After Ctrl-C no further model is begun.


def _measured(
    backend: Backend, prepared: Prepared, folders: dict[Candidate, Path], plan: Plan, progress: Progress
) -> list[Measured]:
    """Measure all models on a backend in turn; every second round goes the other way, so that drift cancels out."""
    found = [Measured(model, backend) for model in prepared]
    with contextlib.ExitStack() as stack:
        processes: dict[int, Process] = {}
        for i, row in enumerate(found):
            with _noting_failure(row):
                if isinstance(facts := prepared[row.model], FailedError):
                    raise facts
                row.facts = facts
                process = Process(_serve_session, backend.name, row.model, folders[row.model], plan)
                processes[i] = stack.enter_context(process)
                row.opened = process.answer()
            progress(f"{backend.name}: opened {row.model.label}")
        for number in range(plan.repeats + 1):
            for i in sorted(range(len(found)), reverse=number % 2 == 1):
                if not found[i].failed:
                    with _noting_failure(found[i]):
                        speed, latency = processes[i].answer()
                        if number > 0:  # The first round warms up.
                            found[i].speeds.append(speed)
                            found[i].latencies.append(latency)
                progress(f"{backend.name}: round {number} of {plan.repeats}")
    return found


@contextlib.contextmanager
def _noting_failure(row: Measured) -> Iterator[None]:
    try:
        yield
    except FailedError as error:
        row.failed = str(error)


class Process:
    """A process that serves this one, forked from a server that has imported this module. It ends with this one.

    Args:
      serve: an importable generator function, called in the process with the arguments: each value that it yields, or
        an error that it raises, is an answer.
    """

    def __init__(self, serve: Callable[..., Iterator], *arguments):
        context = forkserver_context(__name__)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_served, args=(theirs, serve, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()
        self._process.join(_PATIENCE_S)
        self._process.kill()
        self._process.join()

    def answer(self):
        """Ask for the next answer, and wait for it.

        Raises:
          FailedError: it is an error, or the process is gone.
        """
        try:
            self._connection.send(None)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_PATIENCE_S)
            code = self._process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            raise FailedError(f"its process ended with {how}{why}; leave this model or backend out") from error
        if isinstance(answer, FailedError):
            raise answer
        return answer


def _served(connection: Connection, serve: Callable[..., Iterator], *arguments) -> None:
    end_with_parent()
    answers = serve(*arguments)
    with contextlib.suppress(EOFError, OSError):  # Nobody asks any more.
        while True:
            connection.recv()
            try:
                answer = next(answers)
            except Exception as error:  # Runtimes raise errors of many kinds; each becomes a row of the table.
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                answer = FailedError(with_escaped_bytes(f"{kind}{clipped(error, 300)}"))
            connection.send(answer)


def _serve_preparation(model: Candidate, folder: Path, files: Sequence[str]) -> Iterator[Facts]:
    torch.set_num_threads(1)
    yield prepare(model, folder, files)


def _serve_session(backend: str, model: Candidate, folder: Path, plan: Plan) -> Iterator[Opened | tuple[float, float]]:
    """Open a session and report it, then make a timed run whenever asked."""
    for module in BACKENDS[backend].preload:
        importlib.import_module(module)
    before = _resident("VmRSS")
    session = BACKENDS[backend].open(model, folder, plan)
    gc.collect()
    _forget_peak()
    calls = _calls_per_run(session)
    _run(session, calls)
    memory = session.peak_memory()
    memory = max(0, _resident("VmHWM") - before) if memory is None else memory
    difference = _difference(session, folder)
    session.run_single()
    opened = Opened(
        batch=session.batch,
        calls_at_once=session.calls_at_once,
        precision=session.precision,
        peak_memory_mib=memory / _MIB,
        difference_from_pytorch=difference,
    )
    session.rest()
    yield opened
    while True:
        timed = _timed_run(session, calls)
        session.rest()
        yield timed


def _calls_per_run(session: Session) -> int:
    """How many calls take _RUN_S, at the speed of the fastest of a few warm calls."""
    taken_s = [_run(session, session.calls_at_once) for _ in range(_TRIES)]
    return session.calls_at_once * max(1, round(_RUN_S / min(taken_s)))


def _run(session: Session, calls: int) -> float:
    start_s = time.perf_counter()
    session.run(calls)
    return time.perf_counter() - start_s


def _timed_run(session: Session, calls: int) -> tuple[float, float]:
    """Images/s, and the median time in seconds of one image alone; each after a call that does not count."""
    session.run(session.calls_at_once)
    speed = calls * session.batch / _run(session, calls)
    session.run_single()
    taken, deadline_s = [], time.perf_counter() + _LATENCY_S
    while len(taken) < _FEWEST_SINGLE or time.perf_counter() < deadline_s:
        start_s = time.perf_counter()
        session.run_single()
        taken.append(time.perf_counter() - start_s)
    return speed, statistics.median(taken)


def _difference(session: Session, folder: Path) -> float:
    """The value of Opened.difference_from_pytorch.

    Raises:
      UserError: the backend computes something else.
    """
    reference = torch.load(folder / REFERENCE, weights_only=True)
    found = session.logits(reference["images"])
    expected = reference["logits"].numpy()[: len(found)]
    difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not difference <= MOST_DIFFERENT:
        raise UserError(f"its logits are {difference:.0%} away from PyTorch's: the backend computes something else")
    return difference


def _resident(kind: str) -> int:
    """Bytes of this process in memory: VmRSS is the present value, VmHWM the largest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def _forget_peak() -> None:
    """Give free memory back to the system, and let VmHWM begin at the present value."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # Not every C library has it.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # Not every container has it.
        file.write("5")
