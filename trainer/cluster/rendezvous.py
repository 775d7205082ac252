"""Before the first step of several ranks: is everybody there, with the same data, settings and code, and connected?

Ranks meet at the store of MASTER_ADDR:MASTER_PORT, which torchrun's agent or rank 0 serves. Rank 0 sets a challenge;
each rank answers it with its facts; rank 0 compares them and publishes one verdict for all. Whatever an earlier attempt
left in the store carries another challenge, so it is never taken for an answer: torchrun's agents keep one store over
restarts, and the restart counts of two agents may differ.
"""

import contextlib
import datetime
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set

import torch
import torch.distributed as dist

from pipelines.common.errors import UserError, write_error_line
from pipelines.common.files import parsed_json
from pipelines.common.launcher import launched
from pipelines.shards.manifest import read_manifest
from trainer.cluster.code_version import code_version
from trainer.config.natures import shared_settings
from trainer.config.sections import Config

# The checks done, a rank may wait long for another: rank 0 alone downloads weights and tries the decoder, a first step
# compiles. The watchdog finds a rank that hangs; this is the bound where it is off.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)

_POLL_S = 0.1
_GRACE_S = 5.0  # The others wait a little longer than rank 0, so that they can read its verdict.
_SHOWN = 3  # One message names at most this many differences.
_LOOPBACK = "127.0.0.1"
# libuv's server, which is torch's default, does not wait for a stranger who connects and sends nothing. In torch 2.5 it
# never listened to a socket that it was given; in 2.14 it was seen to work.
_LIBUV_TAKES_SOCKETS = "2.14"


def facts(config: Config) -> dict[str, object]:
    """What must be equal on all ranks: {name: value}, values as JSON has them.

    The configuration without what each machine has of its own, the digests of the dataset, a hash of every source file,
    and versions.

    Raises:
      UserError: there is no dataset here, or it is damaged.
    """
    found = shared_settings(config)
    if config.data.root is not None:
        splits = read_manifest(config.data.root)["splits"]
        found |= {f"dataset digest of '{split}'": entry["digest"][:12] for split, entry in splits.items()}
    return {**found, **code_version()}


# --- meeting ---


def meet(rank: int, size: int, describe: Callable[[], dict], seconds: float) -> dist.Store:
    """Wait until all ranks are there and agree. Returns a store of this attempt alone, for the process group.

    Args:
      describe: gives this rank's facts; a UserError in it ends all ranks, each with its message.
      seconds: within which all must have come.
    Raises:
      UserError: on every rank: the store is not reachable, ranks are missing, or something differs.
    """
    mine = {"nonce": secrets.token_hex(8), "host": socket.gethostname(), **_described(describe, size)}
    deadline = time.monotonic() + seconds
    store = _open_store(rank, deadline, seconds)
    try:
        lead_or_follow = _lead if rank == 0 else _follow
        verdict = lead_or_follow(store, rank, size, mine, deadline, seconds)
    except RuntimeError as error:  # torch.distributed's errors are of this type.
        raise UserError(
            f"rank 0 has closed the store at {_address()}: look at its message, and at those of other ranks"
        ) from error
    if mine.get("error") or verdict["problem"]:
        raise UserError(mine.get("error") or verdict["problem"])
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return dist.PrefixStore(verdict["nonces"]["0"], store)


def _described(describe: Callable[[], dict], size: int) -> dict:
    try:
        return {"facts": {"WORLD_SIZE": size, **describe()}}
    except UserError as error:
        return {"error": " ".join(str(error).split())}


def _lead(store: dist.Store, rank: int, size: int, mine: dict, deadline: float, seconds: float) -> dict:
    """Rank 0: ask, compare, publish. Returns the verdict."""
    store.set("ready/challenge", mine["nonce"])
    answers = {rank: mine}
    while True:
        for other in sorted(set(range(size)) - set(answers)):
            answer = _read(store, f"ready/answer/{other}", _ANSWER)
            if answer is not None and answer["challenge"] == mine["nonce"] and ("facts" in answer or "error" in answer):
                answers[other] = answer
        if len(answers) == size or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    nonces = {str(other): answer["nonce"] for other, answer in answers.items()}
    verdict = {"nonces": nonces, "problem": _problem(answers, size, seconds)}
    store.set("ready/verdict", json.dumps(verdict))
    heard = time.monotonic() + _GRACE_S  # This process may end next, and the store with it: wait until all have read.
    while store.add(f"ready/heard/{mine['nonce']}", 0) < len(answers) - 1 and time.monotonic() < heard:
        time.sleep(_POLL_S)
    return verdict


def _follow(store: dist.Store, rank: int, size: int, mine: dict, deadline: float, seconds: float) -> dict:
    """The other ranks: answer the present challenge, until a verdict includes this very answer."""
    answered = None
    while time.monotonic() < deadline + _GRACE_S:
        challenge = store.get("ready/challenge").decode(errors="replace") if store.check(["ready/challenge"]) else None
        if challenge != answered:
            store.set(f"ready/answer/{rank}", json.dumps({**mine, "challenge": challenge}))
            answered = challenge
        verdict = _read(store, "ready/verdict", _VERDICT)
        nonces = verdict["nonces"] if verdict is not None else {}
        if verdict is not None and nonces.get(str(rank)) == mine["nonce"] and isinstance(nonces.get("0"), str):
            store.add(f"ready/heard/{nonces['0']}", 1)
            return verdict
        time.sleep(_POLL_S)
    raise UserError(
        f"rank 0 has not answered rank {rank} of {size} on {mine['host']} within {seconds:g} s at {_address()}: look "
        f"at its message, and whether another process was started with RANK={rank}"
    )


_ANSWER = {"nonce": str, "host": str, "challenge": str, "facts": dict, "error": str}
_VERDICT = {"nonces": dict, "problem": str}


def _read(store: dist.Store, key: str, types: Mapping[str, type]) -> dict | None:
    """What a rank has written; None where there is nothing, or nothing that this program writes."""
    return json_object(store.get(key), types, optional={"facts", "error"}) if store.check([key]) else None


def json_object(
    content: bytes, types: Mapping[str, type | tuple[type, ...]], optional: Set[str] = frozenset()
) -> dict | None:
    """A JSON object whose keys have these types, else None: anybody who reaches a store may write to it."""
    found = parsed_json(content)
    if not isinstance(found, dict) or not types.keys() - optional <= found.keys() <= types.keys():
        return None
    return found if all(isinstance(value, types[name]) for name, value in found.items()) else None


def _problem(answers: dict[int, dict], size: int, seconds: float) -> str:
    """What keeps the run from starting, in one line; '' if nothing does."""
    problems = [f"rank {r} on {a['host']}: {a['error']}" for r, a in sorted(answers.items()) if "error" in a][:_SHOWN]
    differing = [line for rank in sorted(answers) for line in _differences(answers, rank)]
    if differing:
        more = f" (and {len(differing) - _SHOWN} more differences)" if len(differing) > _SHOWN else ""
        problems.append(
            f"the ranks do not agree: {'; '.join(differing[:_SHOWN])}{more}. Give all machines the same command, data, "
            "code and environment"
        )
    missing = sorted(set(range(size)) - set(answers))
    if missing:
        hosts = [f"{ranks_text(ranks)} on {host}" for host, ranks in _by_host(answers).items()]
        problems.append(
            f"{ranks_text(missing)} of {size} did not come within {seconds:g} s; {', '.join(hosts)} did. Look at the "
            f"messages of those that did not, and whether their machines reach {_address()}"
            + (_ADDRESS_ADVICE if _by_address_alone() else "")
        )
    return "; ".join(problems)


def _differences(answers: dict[int, dict], rank: int) -> list[str]:
    """The facts in which a rank differs from rank 0, with both values."""
    first, other = answers[0], answers[rank]
    if "error" in first or "error" in other:
        return []
    a, b = first["facts"], other["facts"]
    return [
        f"{name} is {a.get(name)} on rank 0 ({first['host']}) and {b.get(name)} on rank {rank} ({other['host']})"
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]


def _by_host(answers: dict[int, dict]) -> dict[str, list[int]]:
    hosts = {}
    for rank, answer in sorted(answers.items()):
        hosts.setdefault(answer["host"], []).append(rank)
    return hosts


def ranks_text(ranks: list[int]) -> str:
    """Ranks in words: 'rank 3', 'ranks 0-3, 6'."""
    runs = [
        [rank for _, rank in run]
        for _, run in itertools.groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])
    ]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


# --- the store ---


_ADDRESS_ADVICE = (
    ". Rank 0 lets only its own machine in, for its MASTER_ADDR is that of the loopback interface: if there are "
    "several machines, set it to the name of this one, or set LOCAL_WORLD_SIZE on all"
)


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _open_store(rank: int, deadline: float, seconds: float) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT: rank 0 serves it where torchrun's agent does not."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"MASTER_ADDR is '{host}', MASTER_PORT is '{port}': start several ranks with torchrun, or set them to the "
            "machine of rank 0 and a free port there (docs/launching.md)"
        )
    left = datetime.timedelta(seconds=seconds)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = host if by_agent else host_of_main()
    if rank == 0 and not by_agent:
        try:
            return serve_store(int(port), left)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"MASTER_PORT {port} cannot be used on {socket.gethostname()}, most often because another process uses "
                f"it: end that, or set another port on all machines ({_first_line(error)})"
            ) from error
    _await_listener(host, int(port), deadline, seconds)
    stranger = f"what listens at {_address()} is no store of this run: set another MASTER_PORT on all machines"
    with _deadline(deadline - time.monotonic() + _GRACE_S, f"[rank {rank}] error: {stranger}"):
        try:
            return dist.TCPStore(host, int(port), timeout=left, wait_for_workers=False)
        except RuntimeError as error:
            raise UserError(f"{stranger} ({_first_line(error)})") from error


def host_of_main() -> str:
    """Where the other ranks reach what rank 0 serves: through the loopback interface if all are on one machine."""
    return _LOOPBACK if _on_one_machine() else os.environ.get("MASTER_ADDR", "")


def _on_one_machine() -> bool:
    """Whether all ranks are on this machine, as far as the launcher says; MASTER_ADDR counts where it does not."""
    this = launched()
    return this.local_size == this.size or _by_address_alone()


def _by_address_alone() -> bool:
    return not os.environ.get("LOCAL_WORLD_SIZE") and os.environ.get("MASTER_ADDR") in ("localhost", "::1", _LOOPBACK)


def serve_store(port: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """A store that this process serves, on any free port for 0; reached from this machine alone if all ranks are there.

    torch itself listens on all interfaces, whatever host it is given, so the socket is made here.

    Raises:
      OSError, RuntimeError: the port is taken.
    """
    if not _on_one_machine():
        return dist.TCPStore("localhost", port, is_master=True, timeout=timeout, wait_for_workers=False)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(1024)
        return dist.TCPStore(
            *listener.getsockname(),
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
            use_libuv=torch.__version__ >= _LIBUV_TAKES_SOCKETS,
        )


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _await_listener(host: str, port: int, deadline: float, seconds: float) -> None:
    """Wait until something listens at MASTER_ADDR:MASTER_PORT."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + _POLL_S > deadline:
                raise UserError(_unreachable(host, port, error, seconds)) from error
        time.sleep(_POLL_S)


def _unreachable(host: str, port: int, error: OSError, seconds: float) -> str:
    here = f"from {socket.gethostname()} within {seconds:g} s"
    if isinstance(error, socket.gaierror):
        return f"MASTER_ADDR '{host}' has no address {here} ({error.strerror}): set it to the machine of rank 0"
    if isinstance(error, ConnectionRefusedError):
        why = "nothing listens there: look whether rank 0 runs on that machine, and at its message"
    else:
        why = f"{error.strerror or error}: look at the network and at firewalls between the machines"
    return f"rank 0 was not reached at MASTER_ADDR:MASTER_PORT, {host}:{port}, {here}: {why}"


# --- the first collective ---


def connect(store: dist.Store, rank: int, size: int, device: torch.device, seconds: float) -> None:
    """Make the default process group and prove that it works: a first sum over all ranks, on the device.

    Raises:
      UserError: it failed. If it hangs, the process ends after `seconds` with the same message and exit code 1.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    look = (
        f"the ranks found each other at {_address()}, but {backend} does not connect them. Look at the interface it "
        f"uses ({backend.upper()}_SOCKET_IFNAME=eth0 or the like sets it; 'ip addr' lists them) and at firewalls: all "
        f"ports between the machines must be open. {_MORE[backend]}"
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
            ranks = torch.ones(1, device=device)
            dist.all_reduce(ranks)
            total = int(ranks.item())
        except RuntimeError as error:
            raise UserError(f"{look} ({_first_line(error)})") from error
    if total != size:
        raise UserError(f"a sum of ones over {size} ranks is {total}: {look}")


_MORE = {
    "gloo": "gloo takes the address of the machine's own name: see what 'getent hosts $(hostname)' says on each",
    "nccl": "NCCL_DEBUG=INFO logs what NCCL tries",
}


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
