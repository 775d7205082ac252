"""Names the rank that stopped, and ends the run so that its launcher can start it again.

The loop reports where it is (`heartbeat`), which sets a variable. On every rank a thread publishes that every few
seconds in rank 0's store, and reads there the states of all ranks, as rank 0 has collected them. A second thread judges
what has been read. No rank's clock is compared with another's: a rank is silent, or stands still, for as long as the
judging rank has seen no change. All it knows comes from rank 0, so the others are judged as of the time when rank 0
was last heard: when it is lost, their silence says nothing. Once it has ended, they are judged as of now.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from pipelines.common.errors import UserError, write_error_line
from trainer.cluster.rendezvous import ranks_by_place, ranks_text
from trainer.cluster.world import World

SETUP_PATIENCE_S = 3600.0  # The first heartbeat may take this long: weights are downloaded, the decoder is tried.
_PERIOD_S = 2.0
_SILENT_PERIODS = 4  # Once a collective has failed, a rank counts as lost when it has missed this many periods.
_VERDICT_PERIODS = 3  # So long after a verdict all ranks have reached it, too.
_LINGER_S = 30.0  # Ranks may take this long to notice by themselves that another ended with an error.
_STDERR = 2
_AGAIN = "The run resumes from its newest checkpoint, if there is one: start it again with the same command"


@dataclasses.dataclass(frozen=True)
class State:
    """What a rank publishes.

    Attributes:
      host: the rank's machine.
      published_s: when, by the rank's own clock; it grows as long as the rank's thread lives.
      heartbeats: counts the loop's reports; it is equal on ranks that are equally far.
      where: the last place that was reported.
      patience_s: how long that place may take, where it may take longer than others.
      ended: None while the rank runs, "" after a proper end, else the error that ended it.
    """

    host: str
    published_s: float = 0.0
    heartbeats: int = 0
    where: str = "setting up"
    patience_s: float = SETUP_PATIENCE_S
    ended: str | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """A rank as this one knows it: its last state, and when it last reported and made progress, by the clock here."""

    state: State
    heard_s: float
    moved_s: float

    def updated(self, state: State, now_s: float) -> "Seen":
        """The same rank, after it has published a state."""
        is_heard = state.published_s != self.state.published_s
        has_moved = (state.heartbeats, state.ended) != (self.state.heartbeats, self.state.ended)
        return Seen(state, now_s if is_heard else self.heard_s, now_s if has_moved else self.moved_s)


def find_lost(seen: dict[int, Seen], now_s: float, silent_s: float, linger_s: float) -> str:
    """The line about ranks that are silent for `silent_s`, or one that ended with an error `linger_s` ago; "" if none.

    A rank other than 0 counts as silent only for the time in which rank 0 was still heard.
    """
    until_s = {r: _judged_s(seen, now_s) if r else now_s for r in seen}
    silent = [r for r, rank in seen.items() if rank.state.ended is None and until_s[r] - rank.heard_s > silent_s]
    if silent:
        heard_s = now_s - min(seen[r].heard_s for r in silent)
        return (
            f"lost {_places(silent, seen)}: last heard {heard_s:.0f} s ago. The process or machine is gone or stopped, "
            f"or the network between is cut. {_AGAIN}"
        )
    for r, rank in seen.items():
        if rank.state.ended and now_s - rank.moved_s > linger_s:
            return f"rank {r} on {rank.state.host} ended in '{rank.state.where}': {rank.state.ended}. {_AGAIN}"
    return ""


def find_stuck(seen: dict[int, Seen], now_s: float, seconds: float) -> tuple[list[int], str]:
    """The ranks that stand still for `seconds` while no rank is further behind, so that others wait for them.

    Returns:
      the ranks, and the line about them; [] and "" if all is well, or if they wait for one that ended with an error.
    """
    running = {r: rank for r, rank in seen.items() if rank.state.ended is None}
    least = min((rank.state.heartbeats for rank in running.values()), default=0)
    behind = [r for r, rank in running.items() if rank.state.heartbeats == least]
    has_failed = any(rank.state.ended for rank in seen.values())
    until_s = _judged_s(seen, now_s)
    has_time = any(until_s - seen[r].moved_s <= max(seconds, seen[r].state.patience_s) for r in behind)
    if has_failed or has_time or not behind:
        return [], ""
    waiting = [r for r in seen if r not in behind]
    others = f", {ranks_text(waiting)} waiting in '{seen[waiting[0]].state.where}'" if waiting else ""
    still_s = now_s - max(seen[r].moved_s for r in behind)
    return behind, (
        f"no progress on {_places(behind, seen)} for {still_s:.0f} s{others}. Its stack is above or in its own log; if "
        f"the place may take longer, raise run.watchdog_s. {_AGAIN}"
    )


def _judged_s(seen: dict[int, Seen], now_s: float) -> float:
    """Up to when the silence or standstill of a rank counts: while rank 0 runs, until it was last heard."""
    return seen[0].heard_s if 0 in seen and seen[0].state.ended is None else now_s


def _places(ranks: list[int], seen: dict[int, Seen]) -> str:
    return ranks_by_place({r: f"on {seen[r].state.host} in '{seen[r].state.where}'" for r in ranks})


class Watchdog:
    """Watches this rank, and with several ranks all of them, inside a `with` block. Gives the world with its heartbeat.

    There a collective's error, which says that some connection broke, becomes a UserError that names the lost rank.

    Args:
      world: the ranks; every rank must make its watchdog, and enter it, at the same place.
      seconds: without progress before the run is ended; 0 switches everything off but the names of lost ranks.
    """

    def __init__(self, world: World, seconds: float):
        self._world = world
        self._seconds = seconds
        self._period_s = min(_PERIOD_S, seconds / 10)
        self._state = State(socket.gethostname())
        self._seen: dict[int, Seen] = {}
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._watch, self._keep_exchanging)]
        # Its own connection: torch lets one thread at a time use one, and others may wait in the world's.
        self._store = world.store.clone() if world.store is not None else None

    def _note(self, where: str, patience_s: float = 0) -> None:
        """The world's heartbeat: note where this rank is."""
        heartbeats = self._state.heartbeats + 1
        self._state = dataclasses.replace(self._state, heartbeats=heartbeats, where=where, patience_s=patience_s)

    def __enter__(self) -> World:
        if self._seconds:
            self._publish()
            self._world.barrier()  # All states are there.
            for thread in self._threads:
                thread.start()
        return dataclasses.replace(self._world, heartbeat=self._note)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        lost = self._await_lost(error) if self._world.size > 1 and _is_of_a_collective(error) else ""
        if self._seconds:
            proper = lost or error is None or isinstance(error, SystemExit)
            ended = "" if proper else f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._state = dataclasses.replace(self._state, ended=ended)
            self._ending.set()
            for thread in self._threads:
                thread.join(_LINGER_S / 3)
            faulthandler.cancel_dump_traceback_later()
            if (lost or ended) and self._world.size > 1:  # Closing down may wait for ranks that are gone.
                faulthandler.dump_traceback_later(_LINGER_S, exit=True, file=_STDERR)
        if lost:
            raise UserError(lost) from error

    def _await_lost(self, error: BaseException | None) -> str:
        """The line about a broken connection, which names the lost rank as soon as that is known."""
        deadline_s = time.monotonic() + (_SILENT_PERIODS + 3) * self._period_s + 1
        while self._seconds and time.monotonic() < deadline_s:
            if named := find_lost(self._seen, time.monotonic(), _SILENT_PERIODS * self._period_s, 0):
                return named
            time.sleep(self._period_s / 4)
        reason = str(error).strip().split("\n")[0]
        return (
            f"the ranks have lost their connection, and none is known to be gone: look at their messages and at the "
            f"network ({reason}). {_AGAIN}"
        )

    # --- the threads ---

    def _watch(self) -> None:
        """Judge what is known of all ranks."""
        while self._state.ended is None:
            # If code that holds Python's lock keeps this thread from running, this timer ends the process.
            limit_s = max(self._seconds, self._state.patience_s) + _LINGER_S
            faulthandler.dump_traceback_later(limit_s, exit=True, file=_STDERR)
            seen, now_s = self._seen, time.monotonic()
            if line := find_lost(seen, now_s, self._seconds, _LINGER_S):
                self._end(line)
            stuck, line = find_stuck(seen, now_s, self._seconds)
            if stuck:
                self._end(line, with_stacks=self._world.rank in stuck)
            self._ending.wait(self._period_s)

    def _end(self, line: str, *, with_stacks: bool = False) -> None:
        """End this process, once all ranks know why."""
        rank = self._world.rank
        if with_stacks:
            write_error_line(f"[rank {rank}] watchdog: stacks of this process, in '{self._state.where}':")
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        write_error_line(f"[rank {rank}] error: watchdog: {line}")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        if self._world.size > 1:
            time.sleep(_VERDICT_PERIODS * self._period_s)
        os._exit(1)

    def _keep_exchanging(self) -> None:
        """Exchange states until all is said. It hangs as long as rank 0 does, and ends when the connection is lost."""
        is_last = False
        with contextlib.suppress(RuntimeError):  # torch.distributed's errors are of this type.
            while not is_last:
                is_ending = self._state.ended is not None
                self._publish()
                self._read()
                is_last = is_ending and (not self._world.is_main or self._all_ended())
                if is_ending:
                    time.sleep(self._period_s / 4)
                else:
                    self._ending.wait(self._period_s)

    def _all_ended(self) -> bool:
        """Whether rank 0 may close its store: the others have ended, or have been silent for long."""
        limit_s = time.monotonic() - _SILENT_PERIODS * self._period_s
        return all(rank.state.ended is not None or rank.heard_s < limit_s for rank in self._seen.values())

    def _publish(self) -> None:
        if self._store is not None:
            state = dataclasses.replace(self._state, published_s=time.monotonic())
            self._store.set(f"state/{self._world.rank}", json.dumps(dataclasses.asdict(state)))

    def _read(self) -> None:
        """Note the states of all ranks; rank 0 collects them for the others."""
        if self._store is None:
            states = [dataclasses.replace(self._state, published_s=time.monotonic())]
        else:
            if self._world.is_main:
                states = self._store.multi_get([f"state/{rank}" for rank in range(self._world.size)])
                self._store.set("states", f"[{','.join(state.decode() for state in states)}]")
            states = [State(**state) for state in json.loads(self._store.get("states"))]
        now_s = time.monotonic()
        fresh = {rank: Seen(state, now_s, now_s) for rank, state in enumerate(states)}
        self._seen = {rank: self._seen.get(rank, seen).updated(seen.state, now_s) for rank, seen in fresh.items()}


_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def _is_of_a_collective(error: BaseException | None) -> bool:
    is_sign = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return is_sign or isinstance(error, dist.DistError)
