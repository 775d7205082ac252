"""Names the rank that stopped, and ends the run so that its launcher can start it again.

The loop reports where it is (`heartbeat`), which sets a variable. On every rank a thread publishes that every few
seconds to a store that rank 0 serves; rank 0's thread compares the ranks and publishes what it found; the others read
it. No rank's clock is compared with another's: a rank is silent, or stands still, for as long as rank 0 has seen no
change.
"""

import contextlib
import dataclasses
import datetime
import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from pipelines.common.errors import UserError, write_error_line
from trainer.cluster.rendezvous import host_of_main, json_object, ranks_text, serve_store
from trainer.cluster.world import World

T = TypeVar("T")

SETUP_PATIENCE_S = 3600  # The first heartbeat may take this long: weights are downloaded, the decoder is tried.
_PERIOD_S = 2.0
_SILENT_PERIODS = 4  # Once a collective has failed, a rank counts as lost when it has missed this many periods.
_LINGER_S = 30.0  # Ranks may take this long to notice by themselves that another ended with an error.
_STDERR = 2
_AGAIN = "The run resumes from its newest checkpoint, if there is one: start it again with the same command"


@dataclasses.dataclass(frozen=True)
class State:
    """What a rank publishes.

    Attributes:
      number: counts the publications; it grows as long as the rank's thread lives.
      heartbeats: counts the loop's reports; it is equal on ranks that are equally far.
      where: the last place that was reported.
      patience_s: how long that place may take, where it may take longer than others.
      host: the rank's machine.
      ended: None while the rank runs, "" after a proper end, else the error that ended it.
    """

    number: int
    heartbeats: int
    where: str
    patience_s: float
    host: str
    ended: str | None = None


# The JSON types of a State, and of what rank 0 publishes: its own state, the result of `lost`, and a Verdict.
_STATE: dict[str, type | tuple[type, ...]] = {
    **{"number": int, "heartbeats": int, "where": str, "host": str},
    **{"patience_s": (int, float), "ended": (str, type(None))},
}
_FOUND: dict[str, type | tuple[type, ...]] = {**_STATE, "lost": str, "blamed": list, "line": str}


@dataclasses.dataclass
class Seen:
    """A rank as rank 0 knows it: its last state, and when it last reported and made progress, by rank 0's clock."""

    state: State
    heard_s: float
    moved_s: float

    def update(self, state: State, now_s: float) -> None:
        """Record what the rank has published."""
        if state.number != self.state.number:
            self.heard_s = now_s
        if (state.heartbeats, state.ended) != (self.state.heartbeats, self.state.ended):
            self.moved_s = now_s
        self.state = state


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The ranks that are to blame, and the line that names them."""

    ranks: list[int]
    line: str


def judge(seen: dict[int, Seen], now_s: float, seconds: float) -> Verdict | None:
    """The verdict after `seconds` without a sign of life or progress; None if all is well.

    A rank that lives and stands still is to blame if no rank is further behind: the others wait for it.
    """
    if verdict := judge_life(seen, now_s, seconds):
        return verdict
    running = {r: rank for r, rank in seen.items() if rank.state.ended is None}
    behind = [
        r for r in running if running[r].state.heartbeats == min(rank.state.heartbeats for rank in running.values())
    ]
    if behind and all(now_s - seen[r].moved_s > max(seconds, seen[r].state.patience_s) for r in behind):
        return Verdict(behind, _stuck_line(behind, seen, now_s))
    return None


def judge_life(seen: dict[int, Seen], now_s: float, seconds: float) -> Verdict | None:
    """The verdict on a rank that has been silent for `seconds`, or ended with an error that no other has noticed."""
    silent = [r for r, rank in seen.items() if rank.state.ended is None and now_s - rank.heard_s > seconds]
    if silent:
        return Verdict(silent, _silent_line(silent, seen, now_s))
    ended = [r for r, rank in seen.items() if _leaves_others(rank.state) and now_s - rank.moved_s > _LINGER_S]
    if all(rank.state.ended is not None for rank in seen.values()):
        return None
    return Verdict(ended, _ended_line(ended[0], seen[ended[0]].state)) if ended else None


def _leaves_others(state: State) -> bool:
    """Whether a rank has ended with an error, or during its set-up, so that others wait for it in vain."""
    return bool(state.ended) or (state.ended == "" and not state.heartbeats)


def lost(seen: dict[int, Seen], now_s: float, period_s: float) -> str:
    """The line that names the rank behind a broken connection; "" if all ranks still report."""
    ended = [r for r, rank in seen.items() if rank.state.ended]
    if ended:
        return _ended_line(ended[0], seen[ended[0]].state)
    limit_s = _SILENT_PERIODS * period_s
    silent = [r for r, rank in seen.items() if rank.state.ended is None and now_s - rank.heard_s > limit_s]
    return _silent_line(silent, seen, now_s) if silent else ""


def _silent_line(ranks: list[int], seen: dict[int, Seen], now_s: float) -> str:
    silent_s = now_s - min(seen[r].heard_s for r in ranks)
    return (
        f"lost {_places(ranks, seen)}: last heard {silent_s:.0f} s ago. The process or machine is gone or stopped, or "
        f"the network between is cut. {_AGAIN}"
    )


def _stuck_line(ranks: list[int], seen: dict[int, Seen], now_s: float) -> str:
    waiting = sorted(set(seen) - set(ranks))
    others = f", {ranks_text(waiting)} waiting in '{seen[waiting[0]].state.where}'" if waiting else ""
    all_of_them = "" if waiting or len(seen) == 1 else "all ranks stand still: "
    still_s = now_s - max(seen[r].moved_s for r in ranks)
    return (
        f"{all_of_them}no progress on {_places(ranks, seen)} for {still_s:.0f} s{others}. Its stack is above or in its "
        f"own log; if the place may take longer, raise run.watchdog_s. {_AGAIN}"
    )


def _ended_line(rank: int, state: State) -> str:
    why = state.ended or "without an error, most likely by a signal"
    return f"rank {rank} on {state.host} ended in '{state.where}': {why}. {_AGAIN}"


def _places(ranks: list[int], seen: dict[int, Seen]) -> str:
    """Ranks with their hosts and places, those of one host and place together."""
    together = {}
    for rank in ranks:
        state = seen[rank].state
        together.setdefault((state.host, state.where), []).append(rank)
    return ", ".join(f"{ranks_text(some)} on {host} in '{where}'" for (host, where), some in together.items())


class Watchdog:
    """Watches this rank, and with several ranks all of them, inside a `with` block.

    Args:
      world: the ranks; every rank must make its watchdog, and enter it, at the same place.
      seconds: without progress before the run is ended; 0 switches everything off.
    """

    def __init__(self, world: World, seconds: float):
        self._world = world
        self._seconds = seconds
        self._period_s = min(_PERIOD_S, seconds / 10)
        self._heartbeat = (0, "setting up", float(SETUP_PATIENCE_S))
        self._ended: str | None = None
        self._blames_another = False  # True if this rank ends because another one failed first.
        self._number = 0
        self._seen: dict[int, Seen] = {}
        self._lost = ""
        self._wake = threading.Event()
        self._verdict: Verdict | None = None
        targets = [self._watch] if world.is_main else [self._watch, self._talk]
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in targets]
        self._store: dist.Store | None = None
        self._found: dict | None = None  # The last publication of rank 0.

    def heartbeat(self, where: str, patience_s: float = 0) -> None:
        """Report where this rank is. It costs nothing; all ranks must call it at the same places.

        Args:
          patience_s: how long the place may take at least, where that is more than the watchdog's own seconds.
        """
        self._heartbeat = (self._heartbeat[0] + 1, where, patience_s)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._open_store()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if not self._seconds:
            return
        proper = error is None or isinstance(error, SystemExit) or self._blames_another
        self._ended = "" if proper else f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._wake.set()
        for thread in self._threads:
            thread.join(_LINGER_S / 3)
        faulthandler.cancel_dump_traceback_later()
        improper = error is not None and not isinstance(error, SystemExit)
        if improper and self._world.size > 1:  # Closing down may wait for ranks that are gone.
            faulthandler.dump_traceback_later(_LINGER_S, exit=True, file=_STDERR)

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turns a collective's error, which says that some connection broke, into a UserError that names the rank."""
        try:
            yield
        except RuntimeError as error:
            if self._world.size == 1 or not _of_a_collective(error):
                raise
            self._blames_another = True
            reason = str(error).strip().split("\n")[0]
            named = self._await_lost() if self._seconds else ""
            raise UserError(
                named
                or f"the ranks have lost their connection, and none is known to be gone: look at their messages and "
                f"at the network ({reason}). {_AGAIN}"
            ) from error

    def _await_lost(self) -> str:
        """The line that names the lost rank, as soon as it is known."""
        deadline = time.monotonic() + (_SILENT_PERIODS + 3) * self._period_s + 1
        while not self._lost and time.monotonic() < deadline:
            time.sleep(self._period_s / 4)
        return self._lost

    # --- the threads ---

    def _watch(self) -> None:
        look = self._look_alone if self._world.size == 1 else self._lead if self._world.is_main else self._follow
        over = False
        while not over:
            # If code that holds Python's lock keeps this thread from running, this timer ends the process.
            limit_s = max(self._seconds, self._heartbeat[2]) + _LINGER_S
            faulthandler.dump_traceback_later(limit_s, exit=True, file=_STDERR)
            over = look()
            self._pause()

    def _state(self) -> State:
        heartbeats, where, patience_s = self._heartbeat
        self._number += 1
        return State(self._number, heartbeats, where, patience_s, socket.gethostname(), self._ended)

    def _note(self, rank: int, state: State) -> None:
        now_s = time.monotonic()
        self._seen.setdefault(rank, Seen(state, now_s, now_s)).update(state, now_s)

    def _look_alone(self) -> bool:
        self._note(0, self._state())
        if verdict := judge(self._seen, time.monotonic(), self._seconds):
            self._end(verdict, log=True)
        return self._ended is not None

    def _lead(self) -> bool:
        """Rank 0: read all, judge, publish. Returns whether it is over."""
        self._note(0, self._state())
        others = range(1, self._world.size)
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # An answer took too long; the next round shows who is alive.
            for rank, content in zip(others, self._store.multi_get([f"rank/{r}" for r in others]), strict=True):
                if state := json_object(content, _STATE):
                    self._note(rank, State(**state))
        now_s = time.monotonic()
        verdict = judge(self._seen, now_s, self._seconds) if self._ended is None else None
        self._lost = lost(self._seen, now_s, self._period_s)
        self._publish(verdict)
        if verdict:
            time.sleep(2 * self._period_s)  # All ranks have read it then.
            self._end(verdict, log=True)
        if self._ended is None:
            return False
        silent_s = _SILENT_PERIODS * self._period_s
        gone = (rank.state.ended is not None or now_s - rank.heard_s > silent_s for rank in self._seen.values())
        return all(gone) or now_s - self._seen[0].moved_s > (silent_s if self._ended else _LINGER_S / 4)

    def _publish(self, verdict: Verdict | None) -> None:
        """Publish what rank 0 has found."""
        blamed, line = (verdict.ranks, verdict.line) if verdict else ([], "")
        found = {**dataclasses.asdict(self._seen[0].state), "lost": self._lost, "blamed": blamed, "line": line}
        assert self._store is not None
        self._store.set("found", json.dumps(found))

    def _follow(self) -> bool:
        """The others: act on what rank 0 has found, or on its silence. Returns whether it is over."""
        ended, now_s = self._ended is not None, time.monotonic()
        if self._verdict and not ended:
            self._end(self._verdict, log=False)
        self._lost = self._lost or lost(self._seen, now_s, self._period_s)
        if not ended and (verdict := judge_life(self._seen, now_s, self._seconds)):
            self._end(verdict, log=True)
        return ended

    def _talk(self) -> None:
        """The others' second thread: exchanges states with rank 0. It hangs as long as rank 0's store does."""
        over = False
        while not over:
            state = self._state()
            found = self._exchange(state)
            over = found is None or state.ended is not None
            if found is not None:
                self._note(0, State(**{name: found[name] for name in _STATE}))
                self._lost = found["lost"]
                self._verdict = Verdict(found["blamed"], found["line"]) if found["line"] else None
            self._pause()

    def _pause(self) -> None:
        if self._ended is None:
            self._wake.wait(self._period_s)
        else:
            time.sleep(self._period_s / 4)

    def _end(self, verdict: Verdict, *, log: bool) -> None:
        """End this process, with its stacks if it is to blame, and with the verdict if `log` is true."""
        rank = self._world.rank
        if rank in verdict.ranks:
            where = self._heartbeat[1]
            write_error_line(f"[rank {rank}] watchdog: stacks of this process, in '{where}':")
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        if log:
            write_error_line(f"[rank {rank}] error: watchdog: {verdict.line}")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(1)

    # --- the store ---

    def _open_store(self) -> None:
        """A store of the watchdog's own, on rank 0's machine, with a first state of every rank in it."""
        world = self._world
        if world.size == 1:
            return
        # TCP repairs a connection that is gone for less than the watchdog's time.
        timeout = datetime.timedelta(seconds=self._seconds)
        # The keys begin with a secret token, so that what strangers write to the store is not read.
        token = secrets.token_hex(8)
        port = 0
        if world.is_main:
            served = serve_store(0, timeout)
            port = served.port
            self._store = dist.PrefixStore(token, served)
            self._note(0, self._state())
            self._publish(None)
        port, token = world.broadcast_object((port, token))
        if not world.is_main:
            self._store = dist.PrefixStore(token, self._reach((host_of_main(), port), timeout))
            found = self._exchange(self._state())
            if found is None:
                raise UserError(f"rank {world.rank} has lost the watchdog of rank 0: look at the message of rank 0")
            self._note(0, State(**{name: found[name] for name in _STATE}))
        world.barrier()

    def _reach(self, address: tuple[str, int], timeout: datetime.timedelta) -> dist.TCPStore:
        try:
            socket.create_connection(address, timeout=_LINGER_S).close()
        except OSError as error:
            raise UserError(
                f"rank {self._world.rank} on {socket.gethostname()} does not reach the watchdog of rank 0 at "
                f"{address[0]}:{address[1]} ({error.strerror or error}): open all ports between the machines, or set "
                "run.watchdog_s to 0"
            ) from error
        return dist.TCPStore(*address, timeout=timeout, wait_for_workers=False)

    def _exchange(self, state: State) -> dict | None:
        """Publish a state. Returns what rank 0 has found, None once the connection to it was lost."""
        if self._store is not None:
            try:
                self._store.set(f"rank/{self._world.rank}", json.dumps(dataclasses.asdict(state)))
                self._found = json_object(self._store.get("found"), _FOUND) or self._found
                return self._found
            except RuntimeError:  # torch.distributed's errors are of this type.
                self._store = None
        return None


_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def watched(world: World, seconds: float) -> Iterator[World]:
    """The world with a watchdog that gets its heartbeats; inside, a lost rank is named."""
    with Watchdog(world, seconds) as watchdog, watchdog.naming_lost_ranks():
        yield dataclasses.replace(world, heartbeat=watchdog.heartbeat)


class HeartbeatIterator(Iterator[T]):
    """An iterator that reports when its user waits for the next item, and when the user has it.

    Args:
      heartbeat: World.heartbeat.
      where: returns the name of the present update, "step 12", and how many seconds it may take, 0 for no more than
        others.
    """

    def __init__(
        self, items: Iterator[T], heartbeat: Callable[[str, float], None], where: Callable[[], tuple[str, float]]
    ):
        self._items = iter(items)
        self._heartbeat = heartbeat
        self._where = where

    def __next__(self) -> T:
        where, patience_s = self._where()
        self._heartbeat(f"{where}: input", 0)
        item = next(self._items)
        self._heartbeat(f"{where}: update", patience_s)
        return item
