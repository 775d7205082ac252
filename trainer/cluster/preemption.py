"""Stopping together: signals and failures of any rank reach all of them at the same step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.cluster.rendezvous import COLLECTIVE_TIMEOUT
from trainer.cluster.world import World

# The exit codes of a run that a signal stopped.
REQUEUE = 75  # EX_TEMPFAIL: run the same command again.
INTERRUPTED = 130  # After SIGINT, as shells report it.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed.


class Agreement(NamedTuple):
    """What happened on some rank, as all ranks agree on it.

    Attributes:
      signal: the number of the signal that came, 0 for none.
      failed: a checkpoint could not be written.
    """

    signal: int
    failed: bool


class Preemption:
    """Stops all ranks at the same step: each asks the others at every step whether a signal has come.

    The answer is the one to the question of the step before, which has long arrived: nobody waits, and no GPU is asked.
    All ranks get the same answers in the same order. Every rank must make one; the questions go over Gloo, whatever
    the gradients go over.
    """

    def __init__(self, world: World):
        self._world = world
        self._group: Any = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world.size > 1 else None
        self._signals: list[int] = []  # The numbers of those that came, in their order.
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def another(self) -> "Preemption":
        """One for another run of this process: it has the signals that come here, and questions of its own."""
        other = Preemption(self._world)
        other._signals = self._signals
        return other

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Inside, signals are noted for the next answer. A second Ctrl-C ends the process at once.

        A signal that the process was started to ignore, as nohup does with SIGHUP, stays ignored. Only the main thread
        may handle signals; in another nothing changes.
        """
        is_main = threading.current_thread() is threading.main_thread()
        noted = [number for number in STOPPING if is_main and signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in noted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self._signals[:1] == [signal.SIGINT]:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # The terminal may be gone.
                print("stopping after the present step, or before the first; again ends at once", file=sys.stderr)
        self._signals.append(number)

    def agree(self, failed: bool) -> Agreement:
        """Report what happened on this rank, and return what all had reported one call ago.

        Every rank must call it as often as the others.

        Args:
          failed: a checkpoint could not be written on this rank.
        """
        first = self._signals[0] if self._signals else 0
        if self._group is None:
            return Agreement(first, failed)
        # The maximum is one of the signals' numbers; it does not matter which one.
        report = torch.tensor([first, int(failed)])
        work = dist.all_reduce(report, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        earlier, self._asked = self._asked, (work, report)
        if earlier is None:
            return Agreement(0, False)
        earlier_work, earlier_report = earlier
        earlier_work.wait()
        number, any_failed = earlier_report.tolist()
        return Agreement(number, bool(any_failed))
