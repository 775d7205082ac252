"""The ranks meet: all of them, with the same facts, over a store that strangers may reach, and connected."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import REPOSITORY, TINY, train_here
from support.forked_python import executable
from support.ranks import JOIN, Ranks, one_line
from trainer.cluster.rendezvous import ranks_text, serve_store


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 1, 2, 6, 8, 9], "ranks 0-2, 6, 8-9")]
)
def test_ranks_in_words(ranks, text):
    assert ranks_text(ranks) == text


def listening_on(port: int) -> set[str]:
    """The addresses, as /proc has them, at which somebody listens on a port."""
    text = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for line in text.splitlines()]
    return {fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")}


def test_what_rank_0_serves_on_one_machine_is_reached_from_this_machine_alone(one_machine, monkeypatch):
    assert listening_on(serve_store(0).port) == {"0100007F"}
    for host in (socket.gethostname(), "localhost"):  # as some set it on rank 0's machine alone
        monkeypatch.setenv("MASTER_ADDR", host)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as where only RANK and WORLD_SIZE are set
        assert listening_on(serve_store(0).port) != {"0100007F"}


STRANGERS = [b"", b"GET / HTTP/1.0\r\n\r\n", b"\x00", b"\x09", bytes(range(256)) * 40, b"\xff" * 1000]


def test_a_store_outlives_strangers_that_connect_to_its_port(one_machine):
    store = serve_store(0)
    strangers = [socket.create_connection(("127.0.0.1", store.port)) for _ in STRANGERS]
    for stranger, said in zip(strangers, STRANGERS, strict=True):
        stranger.sendall(said)
        if len(said) > 1:  # others stay and say nothing more
            stranger.close()
    other = dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False)
    other.set("key", "value")
    assert store.get("key") == b"value"
    for stranger in strangers:
        stranger.close()


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
        (
            1,
            {"MASTER_ADDR": "nohost.invalid", "LOCAL_WORLD_SIZE": 1},
            r"not reached at .*nohost.invalid:.*Name or service not known",
        ),
        (1, {}, r"\(.*Connection refused\): look whether rank 0 runs"),
        (0, {"MASTER_PORT": ""}, "MASTER_PORT is '': start several ranks with torchrun"),
    ],
)
def test_a_master_that_is_not_there_is_one_line(rank, environment, message):
    with Ranks(["-c", JOIN, 2], 2, FACTS="{}", started=[rank], **environment) as ranks:
        assert re.search(message, one_line(*ranks.end(), rank))


def test_a_port_that_another_program_uses_is_one_line():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        rank0, rank1 = join(2, 3, MASTER_PORT=other.getsockname()[1])
    assert "cannot be used on " in one_line(rank0, 0) and "another process uses it" in one_line(rank0, 0)
    assert "what listens there is no store of this run" in one_line(rank1, 1)


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
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["joined again 0", "joined again 1"]
