"""The ranks meet: all of them, with the same facts, over a store that strangers may reach, and connected."""

import datetime
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import REPOSITORY, TINY, train_here
from support.forked_python import executable
from support.ranks import JOIN, Ranks, one_line
from trainer.cluster import rendezvous as ready
from trainer.cluster.rendezvous import _problem, host_of_main, ranks_text, serve_store


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([6, 0, 2, 1, 9, 8], "ranks 0-2, 6, 8-9")]
)
def test_ranks_in_words(ranks, text):
    assert ranks_text(ranks) == text


def meet_on(store: dist.Store, described: list[dict], missing: int = 0, seconds: float = 20) -> list[dict]:
    """The verdicts of ranks that meet in threads, on a store that may hold what others left."""
    size, verdicts = len(described) + missing, [None] * len(described)

    def one(rank: int) -> None:
        mine = {"nonce": f"{time.monotonic_ns()}-{rank}", "host": f"host{rank}", "facts": described[rank]}
        part = ready._lead if rank == 0 else ready._follow
        verdicts[rank] = part(store, rank, size, mine, time.monotonic() + seconds, seconds)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(described))]
    for thread in reversed(threads):  # rank 0 comes last: the others see the earlier attempt's challenge first
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    return verdicts


def test_what_an_earlier_attempt_left_in_the_store_is_not_taken_for_this_one(monkeypatch):
    monkeypatch.setattr(ready, "_GRACE_S", 1.0)
    store = dist.HashStore()
    first = meet_on(store, [{"lr": 1}, {"lr": 1}, {"lr": 1}])
    assert not any(verdict["problem"] for verdict in first)
    second = meet_on(store, [{"lr": 1}, {"lr": 2}, {"lr": 1}])
    assert {verdict["problem"] for verdict in second} == {
        "the ranks do not agree: lr is 1 on rank 0 (host0) and 2 on rank 1 (host1). "
        "Give all machines the same command, data, code and environment"
    }
    third = meet_on(store, [{"lr": 1}, {"lr": 1}], missing=1, seconds=2)  # rank 2's old answer does not count
    assert all(
        "rank 2 of 3 did not come within 2 s; rank 0 on host0, rank 1 on host1 did" in v["problem"] for v in third
    )
    fourth = meet_on(store, [{"lr": 3}, {"lr": 3}, {"lr": 3}])
    assert not any(verdict["problem"] for verdict in fourth)
    assert len({verdict["nonces"]["0"] for verdict in (*first, *second, *third, *fourth)}) == 4


def listening_on(port: int) -> set[str]:
    """The addresses, as /proc has them, at which somebody listens on a port."""
    text = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for line in text.splitlines()]
    return {fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")}


SECONDS = datetime.timedelta(seconds=20)


def test_what_rank_0_serves_on_one_machine_is_reached_from_this_machine_alone(one_machine, monkeypatch):
    loopback = "0100007F"
    assert host_of_main() == "127.0.0.1"
    assert listening_on(serve_store(0, SECONDS).port) == {loopback}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as where only RANK and WORLD_SIZE are set
    assert host_of_main() == socket.gethostname()
    assert listening_on(serve_store(0, SECONDS).port) != {loopback}
    for host in ("localhost", "127.0.0.1"):  # as some set it on rank 0's machine alone
        monkeypatch.setenv("MASTER_ADDR", host)
        assert host_of_main() == host and listening_on(serve_store(0, SECONDS).port) != {loopback}


def test_where_only_rank_0_s_address_says_that_it_is_alone_its_message_says_how_several_machines_meet(
    one_machine, monkeypatch
):
    loopback, alone = "0100007F", {0: {"host": "a", "facts": {}}}
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert listening_on(serve_store(0, SECONDS).port) == {loopback}
    assert "set it to the name of this one, or set LOCAL_WORLD_SIZE on all" in _problem(alone, 2, 1)
    for name, value in (("MASTER_ADDR", socket.gethostname()), ("LOCAL_WORLD_SIZE", "1")):  # the advice works
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert listening_on(serve_store(0, SECONDS).port) != {loopback}
            assert "LOCAL_WORLD_SIZE" not in _problem(alone, 2, 1)


STRANGERS = [b"", b"GET / HTTP/1.0\r\n\r\n", b"\x00", b"\x09", bytes(range(256)) * 40, b"\xff" * 1000]


def test_a_store_outlives_strangers_that_connect_to_its_port(one_machine):
    store = serve_store(0, SECONDS)
    strangers = [socket.create_connection(("127.0.0.1", store.port)) for _ in STRANGERS]
    for stranger, said in zip(strangers, STRANGERS, strict=True):
        stranger.sendall(said)
        if len(said) > 1:  # others stay and say nothing more
            stranger.close()
    other = dist.TCPStore("127.0.0.1", store.port, timeout=SECONDS, wait_for_workers=False)
    other.set("key", "value")
    assert store.get("key") == b"value"
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"1e999", b"{", b"\xff\xfe", b'{"nonces": 3, "problem": []}', b"[" * 9999]
)
def test_what_a_stranger_wrote_under_our_keys_is_not_taken_for_an_answer(monkeypatch, content):
    monkeypatch.setattr(ready, "_GRACE_S", 1.0)
    store = dist.HashStore()
    for key in ("challenge", "verdict", "answer/0", "answer/1", "answer/7"):
        store.set(f"ready/{key}", content.decode("latin-1"))
    assert [verdict["problem"] for verdict in meet_on(store, [{"lr": 1}, {"lr": 1}])] == ["", ""]


def join(size: int, ready_s: float = 20, found: str = "{}", **environment) -> list:
    with Ranks(["-c", JOIN, ready_s], size, FACTS=found, **environment) as ranks:
        return ranks.end()


def test_ranks_join_and_a_mistake_of_one_is_reported_on_all():
    assert [end[1] for end in join(2)] == ["joined 0 2\n", "joined 1 2\n"]
    mine, theirs = join(2, found='{"1": "/data/manifest.json: not found"}')
    assert re.search(r"error: rank 1 on \S+: /data/manifest.json: not found\n", one_line(mine, 0))
    assert one_line(theirs, 1) == "[rank 1] error: /data/manifest.json: not found\n"


def test_a_rank_that_does_not_come_is_named_on_the_others():
    with Ranks(["-c", JOIN, 5], 3, started=[0, 1], FACTS="{}") as ranks:
        for rank, end in enumerate(ranks.end()):
            assert "rank 2 of 3 did not come within 5 s; ranks 0-1 on " in one_line(end, rank)


@pytest.mark.parametrize(
    ("rank", "environment", "message"),
    [
        (1, {"MASTER_ADDR": "nohost.invalid", "LOCAL_WORLD_SIZE": 1}, "MASTER_ADDR 'nohost.invalid' has no address"),
        (1, {}, "nothing listens there: look whether rank 0 runs"),
        (0, {"MASTER_PORT": ""}, "MASTER_PORT is '': start several ranks with torchrun"),
    ],
)
def test_a_master_that_is_not_there_is_one_line(rank, environment, message):
    with Ranks(["-c", JOIN, 2], 2, FACTS="{}", started=[rank], **environment) as ranks:
        assert message in one_line(*ranks.end(), rank)


def test_a_port_that_another_program_uses_is_one_line():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        rank0, rank1 = join(2, 3, MASTER_PORT=other.getsockname()[1])
    assert "cannot be used on " in one_line(rank0, 0) and "another process uses it" in one_line(rank0, 0)
    assert "is no store of this run: set another MASTER_PORT" in one_line(rank1, 1)


@pytest.mark.long
def test_an_interface_that_is_not_there_is_reported_by_the_first_collective():
    for rank, end in enumerate(join(2, 10, GLOO_SOCKET_IFNAME="none0")):
        assert "gloo does not connect them. Look at the interface it uses (GLOO_SOCKET_IFNAME=" in end[2]
        assert end[0] == 1, rank


def test_the_trainer_refuses_ranks_with_other_settings_and_writes_nothing(digits, tmp_path):
    start = (
        "import sys, os; from trainer.run import main; main(sys.argv[1:] + ['--optim.lr', '0.00' + os.environ['RANK']])"
    )
    arguments = [*TINY, "--data.root", digits, "--run.out", tmp_path / "run"]
    with Ranks(["-c", start, *arguments], 2) as ranks:
        for rank, end in enumerate(ranks.end()):
            assert re.search(r"optim.lr is 0.0 on rank 0 \(.*\) and 0.001 on rank 1 \(", one_line(end, rank))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_machines_do_not_have_in_common_is_reported_before_the_run_starts_over(digits, tmp_path):
    """Rank 0 may run on another machine after a restart, where its folder is empty."""
    train_here(digits, tmp_path / "1", "--run.stop_after_steps", 2)
    script = (
        "import os, sys; from trainer.run import main; rank = os.environ['RANK']; "
        f"main([*sys.argv[1:], '--run.out', '{tmp_path}/' + rank])"
    )
    with Ranks(["-c", script, *TINY, "--data.root", digits], 2) as ranks:
        for rank, end in enumerate(ranks.end()):
            said = one_line(end, rank)
            assert "step-00000002.pt: rank 1 on " in said and "has it, rank 0 on" in said and "run.out must be" in said
    assert not (tmp_path / "0").exists()


RESTARTED = """
import os, sys
from trainer.cluster.world import join_world
with join_world("cpu", lambda _: {}, 30) as world:
    world.barrier()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.exit(3)
    os.write(1, f"joined again {world.rank}\\n".encode())  # In one piece, because the ranks have one standard output.
"""


def test_ranks_that_torchrun_restarts_meet_again_in_the_store_it_kept(tmp_path):
    (tmp_path / "restarted.py").write_text(RESTARTED)
    torchrun = [executable(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "1", str(tmp_path / "restarted.py")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["joined again 0", "joined again 1"]
