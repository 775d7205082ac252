"""Before the first step of several ranks: is everybody there, with the same data, settings and code, and connected?

Rank 0 serves a store for this attempt alone: at MASTER_ADDR:MASTER_PORT, or, where torchrun's agent listens there and
keeps its store over restarts, at a port that the agent's store names. Each rank writes its facts to rank 0's store;
rank 0 compares them and publishes what is wrong.
"""

import contextlib
import datetime
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from pipelines.common.errors import UserError, write_error_line
from pipelines.common.launcher import launched

# The checks done, a rank may wait long for another: rank 0 alone downloads weights and tries the decoder, a first step
# compiles. The watchdog finds a rank that hangs; this is the bound where it is off.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)

_POLL_S = 0.1
_GRACE_S = 3.0  # Rank 0 waits that long until all have read what is wrong.
_SHOWN = 3  # One message names at most this many differences.
_LOOPBACK = "127.0.0.1"
_PORT_KEY = "trainer/port"  # Under it torchrun's store has the port of rank 0's store.
# libuv's server, which is torch's default, does not wait for a stranger who connects and sends nothing. In torch 2.5 it
# never listened to a socket that it was given; in 2.14 it was seen to work.
_LIBUV_TAKES_SOCKETS = "2.14"


# --- meeting ---


def meet(rank: int, size: int, describe: Callable[[], dict], seconds: float) -> dist.TCPStore:
    """Wait until all ranks are there and agree. Returns a store of this attempt alone, which rank 0 serves.

    Args:
      describe: gives this rank's facts; a UserError in it ends all ranks, each with its message.
      seconds: within which all must have come. If a store does not answer, the process ends with exit code 1.
    Raises:
      UserError: on every rank: the store is not reachable, ranks are missing, or something differs.
    """
    mine = {"host": socket.gethostname(), "facts": {}, "error": ""}
    try:
        mine["facts"] = {"WORLD_SIZE": size, **describe()}
    except UserError as error:
        mine["error"] = " ".join(error.in_command().split())
    deadline = time.monotonic() + seconds
    silent = (
        f"no answer at {_address()}: what listens there is no store of this run, or rank 0 hangs. Look at its message, "
        "or set another MASTER_PORT on all machines"
    )
    with _deadline(seconds + 2 * _GRACE_S, f"[rank {rank}] error: {silent}"):
        store = _serve(deadline) if rank == 0 else _reach(rank, deadline)
        try:
            store.set(f"rank/{rank}", json.dumps(mine))
            # A rank of another run may wait here, too: the problem of this size is none of its own.
            problem = _lead(store, size, deadline, seconds) if rank == 0 else store.get(f"problem/{size}").decode()
            store.set(f"heard/{rank}", "")
        except RuntimeError as error:  # torch.distributed's errors are of this type.
            raise UserError(
                f"rank 0 has closed the store at {_address()}: look at its message, and at those of other ranks"
            ) from error
    if mine["error"] or problem:
        raise UserError(mine["error"] or problem)
    return store


def _lead(store: dist.TCPStore, size: int, deadline: float, seconds: float) -> str:
    """Rank 0: read the facts of all ranks, compare them, and publish what is wrong."""
    _wait(store, [f"rank/{rank}" for rank in range(size)], deadline)
    answers = {rank: json.loads(store.get(f"rank/{rank}")) for rank in range(size) if store.check([f"rank/{rank}"])}
    problem = _problem(answers, size, seconds)
    store.set(f"problem/{size}", problem)
    # This process may end next, and the store with it.
    _wait(store, [f"heard/{rank}" for rank in answers if rank], time.monotonic() + _GRACE_S)
    return problem


def _wait(store: dist.Store, keys: list[str], deadline: float) -> None:
    """Wait until a store has all keys, or until the deadline."""
    with contextlib.suppress(dist.DistStoreError):
        store.wait(keys, datetime.timedelta(seconds=max(_POLL_S, deadline - time.monotonic())))


def _problem(answers: dict[int, dict], size: int, seconds: float) -> str:
    """What keeps the run from starting, in one line; '' if nothing does."""
    problems = [f"rank {rank} on {each['host']}: {each['error']}" for rank, each in answers.items() if each["error"]]
    if not problems and (differing := _differences(answers)):
        shown = "; ".join(differing[:_SHOWN])
        problems = [f"the ranks do not agree: {shown}. Give all machines the same command, data, code and environment"]
    if missing := [rank for rank in range(size) if rank not in answers]:
        came = ranks_by_place({rank: f"on {answer['host']}" for rank, answer in answers.items()})
        problems.append(
            f"{ranks_text(missing)} of {size} did not come within {seconds:g} s; {came} did. Look at the messages of "
            f"those that did not, and whether their machines reach {_address()}"
        )
    return "; ".join(problems)


def _differences(answers: dict[int, dict]) -> list[str]:
    """The facts in which ranks differ from rank 0, with both values."""
    found = []
    host, expected = answers[0]["host"], answers[0]["facts"]
    for rank, answer in answers.items():
        other = answer["facts"]
        for name in sorted({*expected, *other}):
            a, b = expected.get(name), other.get(name)
            if a != b:
                found.append(f"{name} is {a} on rank 0 ({host}) and {b} on rank {rank} ({answer['host']})")
    return found


def ranks_text(ranks: list[int]) -> str:
    """Sorted ranks in words: 'rank 3', 'ranks 0-3, 6'."""
    runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def ranks_by_place(places: dict[int, str]) -> str:
    """Ranks with their places, those of one place together: 'ranks 0-3 on a, ranks 4-7 on b'."""
    together = {}
    for rank, place in places.items():
        together.setdefault(place, []).append(rank)
    return ", ".join(f"{ranks_text(ranks)} {place}" for place, ranks in together.items())


# --- the store ---


def _master() -> tuple[str, int]:
    """The host and port of MASTER_ADDR and MASTER_PORT."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"MASTER_ADDR is '{host}', MASTER_PORT is '{port}': start several ranks with torchrun, or set them to the "
            "machine of rank 0 and a free port there (docs/launching.md)"
        )
    return host, int(port)


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _agent_listens() -> bool:
    """Whether torchrun's agent serves a store at MASTER_ADDR:MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _serve(deadline: float) -> dist.TCPStore:
    """Rank 0's store."""
    host, port = _master()
    try:
        if not _agent_listens():
            return serve_store(port)
        store = serve_store(0)
        _client(host, port, deadline).set(_PORT_KEY, str(store.port))
        return store
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"MASTER_PORT {port} cannot be used on {socket.gethostname()}, most often because another process uses "
            f"it: end that, or set another port on all machines ({_first_line(error)})"
        ) from error


def _on_one_machine() -> bool:
    return launched().local_size == launched().size


def serve_store(port: int) -> dist.TCPStore:
    """A store that this process serves, on any free port for 0; reached from this machine alone if all ranks are there.

    torch itself listens on all interfaces, whatever host it is given, so the socket is made here.

    Raises:
      OSError, RuntimeError: the port is taken.
    """
    if not _on_one_machine():
        return dist.TCPStore("localhost", port, is_master=True, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(1024)
        return dist.TCPStore(
            *listener.getsockname(),
            is_master=True,
            timeout=COLLECTIVE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
            use_libuv=torch.__version__ >= _LIBUV_TAKES_SOCKETS,
        )


def _reach(rank: int, deadline: float) -> dist.TCPStore:
    """Rank 0's store, for another rank.

    A port that an earlier attempt left in the agent's store leads nowhere, or to a store where this rank has been.
    """
    host, port = _master()
    own_host = _LOOPBACK if _on_one_machine() else host
    while True:
        try:
            own_port = int(_client(host, port, deadline).get(_PORT_KEY)) if _agent_listens() else port
            store = _client(own_host, own_port, deadline)
            if store.add(f"came/{rank}", 1) == 1:
                store.set_timeout(COLLECTIVE_TIMEOUT)
                return store
            reason = f"another process there has RANK={rank}"
        except (RuntimeError, OSError) as error:
            reason = _first_line(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 was not reached at MASTER_ADDR:MASTER_PORT, {_address()}, from {socket.gethostname()} "
                f"({reason}): look whether rank 0 runs on that machine, at its message, and at the network and "
                "firewalls between the machines"
            )
        time.sleep(_POLL_S)


def _client(host: str, port: int, deadline: float) -> dist.TCPStore:
    """The store at an address, where something must listen now."""
    seconds = max(_POLL_S, deadline - time.monotonic())
    socket.create_connection((host, port), timeout=seconds).close()
    return dist.TCPStore(host, port, timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


# --- the first collective ---


def connect(store: dist.Store, rank: int, size: int, device: torch.device, seconds: float) -> None:
    """Make the default process group and prove that it works: a first barrier, on the device.

    Raises:
      UserError: it failed. If it hangs, the process ends after `seconds` with the same message and exit code 1.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    look = (
        f"the ranks found each other at {_address()}, but {backend} does not connect them. Look at the interface it "
        f"uses ({backend.upper()}_SOCKET_IFNAME=eth0 or the like sets it; 'ip addr' lists them), at the address of the "
        "machine's own name ('getent hosts $(hostname)'), and at firewalls: all ports between the machines must be open"
    )
    with _deadline(seconds, f"[rank {rank}] error: no answer in {seconds:g} s: {look}"):
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
            dist.barrier()
        except RuntimeError as error:
            raise UserError(f"{look} ({_first_line(error)})") from error


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """End the process with the message and exit code 1 unless the block ends in time."""

    def end() -> None:
        write_error_line(message)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
