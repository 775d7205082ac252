"""Launching: what is checked before the first step, the watchdog, lost ranks, SLURM, several hosts."""

import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import REPOSITORY, TINY, train_here
from support.forked_python import executable
from support.processes import free_port
from support.ranks import Ranks, run_ranks
from trainer.cluster import rendezvous as ready
from trainer.cluster.rendezvous import _problem, facts, host_of_main, ranks_text, serve_store
from trainer.cluster.watchdog import HeartbeatIterator, Seen, State, Watchdog, judge, lost
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.run import facts_to_compare

ONE = World(0, 1, 1, torch.device("cpu"))


def one_line(end: tuple[int, str, str], rank: int) -> str:
    """The message of a rank that ended with exit code 1 and one line."""
    code, _, error = end
    assert code == 1 and error.startswith(f"[rank {rank}] error: ") and error.count("\n") == 1, error
    return error


# --- what must agree ---


def test_paths_and_threads_may_differ_between_machines_and_nothing_else(digits, tmp_path):
    here = [*TINY, "--data.root", str(digits)]
    copy = shutil.copytree(digits, tmp_path / "copy")
    there = [*TINY, "--data.root", str(copy), "--data.threads", "3", "--run.out", str(tmp_path), "--run.device", "auto"]
    assert facts(parse(here)) == facts(parse(there))
    for change in (["--optim.lr", "1"], ["--run.seed", "1"], ["--augment.mix_group", "16"]):
        assert facts(parse(here)) != facts(parse([*here, *change]))


def test_the_facts_hold_the_data_the_code_the_versions_and_the_weights(digits, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    arguments = [*TINY, "--data.root", str(digits), "--student.checkpoint", str(weights)]
    found = facts(parse(arguments))
    assert found["version of torch"] and found["source file trainer/cluster/rendezvous.py"]
    assert len(found["dataset digest of 'train'"]) == len(found["dataset digest of 'val'"]) == 12
    weights.write_bytes(b"2")
    now = facts(parse(arguments))
    assert {name for name in found if found[name] != now[name]} == {"content of student.checkpoint"}


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


# --- strangers ---


@pytest.fixture
def one_machine(monkeypatch):
    """This process is rank 0 of two on one machine."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())


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


def test_a_watchdog_reads_no_state_that_is_none(one_machine):
    watchdog = Watchdog(World(0, 2, 2, torch.device("cpu")), 60)
    watchdog._store = serve_store(0, SECONDS)
    for content in ("[]", "{", '{"number": "x"}', json.dumps({**asdict(State(1, 1, "", 0, "host")), "heartbeats": []})):
        watchdog._store.set("rank/1", content)
        watchdog._lead()
        assert 1 not in watchdog._seen
    watchdog._store.set("rank/1", json.dumps(asdict(State(1, 7, "step 3: input", 0, "host"))))
    watchdog._lead()
    assert watchdog._seen[1].state.heartbeats == 7


JOIN = """
import json, os, sys
from pipelines.common.errors import UserError, exit_on_user_error
from trainer.cluster.world import join_world

def facts(_device):
    found = json.loads(os.environ["FACTS"])
    if os.environ["RANK"] in found:
        raise UserError(found[os.environ["RANK"]])
    return found

with exit_on_user_error(), join_world("cpu", facts, float(sys.argv[1])) as world:
    print("joined", world.rank, world.size)
"""


def join(size: int, ready_s: float = 20, found: str = "{}", **environment) -> list:
    with Ranks(["-c", JOIN, ready_s], size, FACTS=found, **environment) as ranks:
        return ranks.end()


def test_ranks_join_and_a_mistake_of_one_is_told_on_all():
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
def test_an_interface_that_is_not_there_is_told_by_the_first_collective():
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


def test_a_folder_that_machines_do_not_share_is_told_before_the_run_begins_anew(digits, tmp_path):
    """Where rank 0 comes to another machine after a restart, its folder there is empty."""
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
    os.write(1, f"joined again {world.rank}\\n".encode())  # in one piece: the ranks share standard output
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


# --- the watchdog's judgement ---


def seen(*ranks: tuple, now_s: float = 0) -> dict[int, Seen]:
    """Ranks as (heartbeats, where, seconds silent, seconds without progress[, patience[, ended]])."""
    return {
        r: Seen(
            State(1, heartbeats, where, more[0] if more else 0.0, f"host{r}", *more[1:]), now_s - silent, now_s - still
        )
        for r, (heartbeats, where, silent, still, *more) in enumerate(ranks)
    }


def test_the_rank_that_is_behind_is_to_blame_not_those_that_wait():
    ranks = seen((30, "step 12: update", 1, 70), (29, "step 12: input", 1, 71), (30, "step 12: update", 1, 70))
    verdict = judge(ranks, 0, 60)
    assert verdict.ranks == [1]
    assert verdict.line.startswith(
        "no progress on rank 1 on host1 in 'step 12: input' for 71 s, ranks 0, 2 waiting in 'step 12: update'. "
    )


def test_nobody_is_blamed_while_the_slowest_still_moves_or_has_been_given_time():
    assert judge(seen((30, "update", 1, 500), (29, "input", 1, 59)), 0, 60) is None
    assert judge(seen((30, "checkpoint", 1, 500), (29, "checkpoint", 1, 500, 600.0)), 0, 60) is None
    assert judge(seen((30, "checkpoint", 1, 601), (29, "checkpoint", 1, 601, 600.0)), 0, 60).ranks == [1]
    assert judge(seen((9, "step 2: update", 1, 10), (30, "the end", 500, 500, 0.0, "")), 0, 60) is None


def test_ranks_in_the_same_place_are_named_together():
    verdict = judge(seen((8, "update", 1, 61), (8, "update", 1, 62)), 0, 60)
    assert (
        verdict.ranks == [0, 1] and "all ranks stand still: no progress on rank 0 on host0 in 'update'" in verdict.line
    )


def test_silence_comes_before_standing_still_and_an_error_is_passed_on():
    ranks = seen((30, "update", 1, 70), (29, "input", 1, 71), (30, "update", 65, 70))
    assert (
        judge(ranks, 0, 60).ranks == [2]
        and "lost rank 2 on host2 in 'update': last heard 65 s ago" in judge(ranks, 0, 60).line
    )
    ended = seen((30, "update", 1, 31), (29, "input", 31, 31, 0.0, "OutOfMemoryError: CUDA"))
    assert "rank 1 on host1 ended in 'input': OutOfMemoryError: CUDA" in judge(ended, 0, 60).line
    assert "rank 1 on host1 ended in 'input': OutOfMemoryError: CUDA" in lost(ended, 0, 2)
    assert lost(seen((1, "a", 1, 1), (1, "a", 7, 7)), 0, 2) == ""
    assert "lost rank 1 on host1" in lost(seen((1, "a", 1, 1), (1, "a", 9, 9)), 0, 2)


def test_a_rank_that_ended_while_all_were_set_up_is_named_and_one_that_had_done_its_part_is_not():
    assert (
        "rank 1 on host1 ended in 'setting up': without an error"
        in judge(seen((0, "setting up", 1, 40, 3600.0), (0, "setting up", 31, 31, 0.0, "")), 0, 60).line
    )
    done = seen((0, "setting up", 31, 31, 0.0, ""), (0, "setting up", 31, 31, 0.0, ""))
    assert judge(done, 0, 60) is None


def test_ranks_whose_devices_would_compute_otherwise_do_not_agree():
    config = parse([])
    assert facts_to_compare(config, ONE.device)["the precision"] == "torch.float32"
    assert facts_to_compare(parse(["--run.precision", "bf16"]), ONE.device)["the precision"] == "torch.bfloat16"


def test_beats_say_who_waits_for_input_and_who_works():
    heartbeats = []
    for item in HeartbeatIterator(iter([1, 2]), lambda where, _: heartbeats.append(where), lambda: ("step 1", 0)):
        heartbeats.append(item)
    assert heartbeats == ["step 1: input", "step 1: update", 1, "step 1: input", "step 1: update", 2, "step 1: input"]


def test_a_watchdog_that_is_switched_off_has_no_thread_and_still_takes_beats():
    before = threading.active_count()
    with Watchdog(ONE, 0) as watchdog:
        watchdog.heartbeat("step 1")
        assert threading.active_count() == before
    with Watchdog(ONE, 60) as watchdog:
        watchdog.heartbeat("step 1")
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# --- ranks that stop ---

# Updates for ever; what happens at step 20, and on which rank, is told on the command line.
LOOP = """
import os, signal, sys, time
import torch
from pipelines.common.errors import exit_on_user_error
from trainer.cluster.world import join_world
from trainer.cluster.watchdog import HeartbeatIterator, watched

seconds, rank, what = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def inputs(world):
    for step in range(10**9):
        if step == 20 and world.rank == rank:
            print("now", flush=True)
            if what == "sleep":
                time.sleep(1000)
            if what == "error":
                raise IndexError("no such sample")
            if what in ("KILL", "STOP"):
                os.kill(os.getpid(), signal.Signals["SIG" + what])
        time.sleep(0.05)
        yield step

def checkpoint(world):
    world.heartbeat("checkpoint", 4 * seconds)
    if world.is_main:
        time.sleep(3 * seconds)
    world.barrier()

with exit_on_user_error(), join_world("cpu") as joined, watched(joined, seconds) as world:
    for step in HeartbeatIterator(inputs(world), world.heartbeat, lambda: ("step", 0)):
        world.all_reduce_sum(torch.ones(1))
        if what == "exit" and step == 20:
            sys.exit(75)
        if what == "slow" and step == 20:
            checkpoint(world)
            break
print("over")
"""


def stop(rank: int, what: str, size: int = 2, seconds: float = 3) -> list[tuple[int, str, str]]:
    """The ends of ranks of which one stops at step 20; also asserts that all end soon after."""
    with Ranks(["-c", LOOP, seconds, rank, what], size) as ranks:
        assert ranks.await_line(rank) == "now\n"
        start = time.monotonic()
        others = [process for r, process in enumerate(ranks.processes) if r != rank or what != "STOP"]
        for process in others:
            process.wait(30)
        assert time.monotonic() - start < 15
        if what == "STOP":
            ranks.processes[rank].kill()
        return ranks.end()


def test_a_rank_that_hangs_is_named_on_rank_0_and_shows_its_stack():
    waiting, hanging = stop(1, "sleep")
    assert re.search(
        r"watchdog: no progress on rank 1 on \S+ in 'step: input' for \d+ s, rank 0 waiting in 'step: upd",
        one_line(waiting, 0),
    )
    assert hanging[0] == 1 and "[rank 1] watchdog: stacks of this process, in 'step: input':" in hanging[2]
    assert re.search(r'File "<string>", line \d+ in inputs', hanging[2]) and "error" not in hanging[2]


@pytest.mark.long
def test_a_rank_0_that_hangs_names_itself():
    hanging, waiting = stop(0, "sleep")
    assert "stacks of this process" in hanging[2] and "watchdog: no progress on rank 0 on" in hanging[2]
    assert waiting[0] == 1


def test_one_rank_alone_says_where_it_hangs():
    ((code, _, error),) = stop(0, "sleep", size=1)
    assert code == 1 and re.search(r"line \d+ in inputs", error)
    assert re.search(r"error: watchdog: no progress on rank 0 on \S+ in 'step: input' for \d+ s. Its stack", error)


@pytest.mark.parametrize(("rank", "other"), [(0, 1), (1, 0)])
def test_a_rank_that_is_killed_is_named_by_the_other(rank, other):
    ends = stop(rank, "KILL")
    assert ends[rank][0] == -signal.SIGKILL
    assert re.search(
        rf"\[rank {other}\] error: lost rank {rank} on \S+ in 'step: (input|update)': last heard", ends[other][2]
    )
    assert ends[other][0] == 1 and "Traceback" not in ends[other][2]


@pytest.mark.long
@pytest.mark.parametrize(("rank", "other"), [(0, 1), (1, 0)])
def test_a_rank_whose_process_is_stopped_is_named_by_the_other(rank, other):
    ends = stop(rank, "STOP")
    assert re.search(
        rf"\[rank {other}\] error: watchdog: lost rank {rank} on \S+ in 'step: (input|update)'", ends[other][2]
    )
    assert ends[other][0] == 1


@pytest.mark.parametrize(("rank", "other"), [(0, 1), pytest.param(1, 0, marks=pytest.mark.long)])
def test_a_rank_that_ends_with_an_error_is_named_with_it_by_the_other(rank, other):
    ends = stop(rank, "error")
    assert ends[rank][0] == 1 and "IndexError: no such sample" in ends[rank][2] and "Traceback" in ends[rank][2]
    expected = rf"error: rank {rank} on \S+ ended in 'step: input': IndexError: no such sample. The run resumes from"
    assert re.search(expected, one_line(ends[other], other))


def test_ranks_that_end_together_keep_their_exit_code_and_say_nothing():
    with Ranks(["-c", LOOP, 5, 0, "exit"], 2) as ranks:
        assert ranks.end() == [(75, "now\n", ""), (75, "", "")]


@pytest.mark.long
def test_a_slow_checkpoint_is_not_a_hang():
    with Ranks(["-c", LOOP, 2, 0, "slow"], 2) as ranks:
        assert [(code, out, error) for code, out, error in ranks.end()] == [(0, "now\nover\n", ""), (0, "over\n", "")]


def test_the_trainer_names_the_rank_that_was_killed(digits, tmp_path):
    arguments = ["--data.root", digits, "--run.out", tmp_path, "--run.log_every", 1, "--run.watchdog_s", 10]
    trainer = [REPOSITORY / "trainer" / "run.py", *TINY, *arguments]
    with Ranks([*trainer, "--schedule.epochs", 400, "--run.eval_every", 400], 2) as ranks:
        while "step 40/" not in (line := ranks.await_line(0)):
            assert line, ranks.end()[0][2]
        ranks.processes[1].kill()
        _, error = ranks.processes[0].communicate(timeout=60)
        assert ranks.processes[0].returncode == 1
    named = (
        r"\[rank 0\] error: lost rank 1 on \S+ in 'step \d+: (input|update)': last heard .* The run resumes from its"
    )
    assert re.fullmatch(named + ".*\n", error), error


# --- SLURM ---

# srun starts SLURM_NTASKS tasks of its command, hands SIGUSR1 to all of their processes as slurmstepd does, and ends
# with the highest exit code.
SRUN = """#!/usr/bin/env python3
import itertools, json, os, signal, subprocess, sys, time

options = list(itertools.takewhile(lambda argument: argument.startswith("--"), sys.argv[1:]))
command = sys.argv[1 + len(options):]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["srun", *options]) + "\\n")
tasks = [
    subprocess.Popen(command, start_new_session=True, env={**os.environ, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
    for rank in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
while "SIGNAL" in os.environ and not all(os.path.exists(f"ready-{rank}") for rank in range(len(tasks))):
    time.sleep(0.1)
if "SIGNAL" in os.environ:
    for task in tasks:
        os.killpg(task.pid, signal.SIGUSR1)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/usr/bin/env python3
import json, os, sys

with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nsecond")
"""

# Stands for the trainer: joins, and ends with 75 once it was told to.
RANK = """
import os, signal, sys, time
signalled = []
signal.signal(signal.SIGUSR1, lambda *_: signalled.append(1))
from pipelines.common.errors import exit_on_user_error
from trainer.cluster.world import join_world
with exit_on_user_error(), join_world("cpu") as world:
    open(f"rank-{world.rank}", "w").write(f"{world.size} {world.local_size} {os.environ['LOCAL_RANK']} {sys.argv[2:]}")
    open(f"ready-{world.rank}", "w").close()
    while sys.argv[1] == "75" and not signalled:
        time.sleep(0.05)
    world.barrier()
    time.sleep(world.rank)  # they do not end at once
sys.exit(int(sys.argv[1]))
"""


# The trainer itself, and word of its first step.
TRAINER = """
import os, sys, threading, time
from pathlib import Path
from trainer.run import main
log = Path(sys.argv[sys.argv.index("--run.out") + 1]) / "metrics.jsonl"
def tell():
    while not log.exists() or '"train"' not in log.read_text():
        time.sleep(0.05)
    Path(f"ready-{os.environ['RANK']}").touch()
threading.Thread(target=tell, daemon=True).start()
main(sys.argv[1:])
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs train.sbatch as SLURM would, with a stand-in for the trainer. Returns the process and what was called."""

    def run(program: str, *arguments, **environment) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        files = {"srun": SRUN, "scontrol": SCONTROL, "rank.py": RANK, "real.py": TRAINER}
        for name, content in files.items():
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(REPOSITORY / "tools" / "slurm" / "train.sbatch"), "--run.out", "a b", *map(str, arguments)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY),
                "CALLS": str(calls),
                "TRAIN_PROGRAM": f"{executable()} {program}",
                "SLURM_JOB_ID": str(140000 + free_port() % 20000),
                "SLURM_JOB_NODELIST": "some[1-2]",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_CPUS_PER_TASK": "3",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def test_a_slurm_job_that_was_signalled_asks_once_to_be_queued_again(slurm, tmp_path):
    done, calls = slurm("rank.py 75", SIGNAL="1")
    assert done.returncode == 0, done.stderr
    assert "stopped by a signal with a checkpoint; job 1" in done.stdout
    requeues = [call for call in calls if call[:2] == ["scontrol", "requeue"]]
    assert len(requeues) == 1 and requeues[0][2].startswith("1")
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"2 2 {rank} ['--run.out', 'a b']"
    (srun,) = [call for call in calls if call[0] == "srun"]
    assert {"--kill-on-bad-exit=0", "--cpu-bind=none", "--cpus-per-task=3"} <= set(srun)


@pytest.mark.long
def test_the_trainer_goes_on_when_slurm_starts_its_job_again(slurm, tmp_path, digits):
    arguments = [*TINY, "--data.root", digits, "--schedule.epochs", 20, "--run.eval_every", 20, "--run.log_every", 1]
    done, calls = slurm("real.py", *arguments, SIGNAL="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "SIGUSR1: stopped after step" in done.stdout
    assert len([call for call in calls if call[:2] == ["scontrol", "requeue"]]) == 1
    done, calls = slurm("real.py", *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout and "finished after step 100 of 100" in done.stdout
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]


@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_that_finished_or_failed_is_not_queued_again(slurm, code):
    done, calls = slurm(f"rank.py {code}", SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1")
    assert done.returncode == code
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]
    assert ("is not put back into the queue" in done.stderr) == bool(code)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_slurm_script_passes_shellcheck():
    done = subprocess.run(["shellcheck", str(REPOSITORY / "tools" / "slurm" / "train.sbatch")], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


# --- two hosts ---


def ip(*arguments) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two hosts that only a cable connects: network namespaces with 10.77.0.1 and 10.77.0.2. Gives their names."""
    tag = f"usi{os.getpid() % 10000:04d}{time.monotonic_ns() % 1000:03d}"
    names = [f"{tag}a", f"{tag}b"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and iproute2 ({getattr(error, 'stderr', None) or error})")
        for number, name in enumerate(names, 1):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on(host: str, command: list, **environment) -> subprocess.Popen:
    """Python on one of the hosts, which Gloo connects by their cable."""
    return subprocess.Popen(
        ["ip", "netns", "exec", host, executable(), *map(str, command)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": host, **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]


def rendezvous(backend: str, node: int) -> list:
    """What torchrun is told on each of the two hosts."""
    if backend == "static":
        return ["--node-rank", node, "--master-addr", "10.77.0.1", "--master-port", 29400]
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-conf", f"is_host={1 - node}"] + [
        *("--rdzv-id", "two-hosts", "--local-addr", f"10.77.0.{node + 1}")
    ]


@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.long)])
def test_two_hosts_train_what_two_ranks_on_one_machine_do(digits, hosts, tmp_path, backend):
    arguments = [*TINY, "--data.root", digits, "--run.stop_after_steps", 3, "--run.log_every", 1]
    trainer = [REPOSITORY / "trainer" / "run.py", *arguments, "--run.out", tmp_path / "two"]
    processes = [start_on(host, [*TORCHRUN, *rendezvous(backend, n), *trainer]) for n, host in enumerate(hosts)]
    try:
        for process in processes:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
    finally:
        end_all(processes)
    run_ranks(2, *arguments[len(TINY) :], "--run.out", tmp_path / "one")
    runs = [
        torch.load(tmp_path / run / "checkpoints" / "step-00000003.pt", weights_only=True) for run in ("one", "two")
    ]
    for name, weights in runs[0]["student"].items():
        assert torch.equal(weights, runs[1]["student"][name]), name


def ranks_on(hosts: list[str], command: list, **environment) -> list[subprocess.Popen]:
    """A rank on each host, as srun starts them."""
    master = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29400", "WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return [start_on(host, command, RANK=str(rank), **{**master, **environment}) for rank, host in enumerate(hosts)]


def test_a_cable_that_is_pulled_is_told_on_both_hosts(hosts):
    processes = ranks_on(hosts, ["-c", LOOP, 4, 0, "nothing"])
    try:
        assert processes[0].stdout.readline() == "now\n"
        ip("-n", hosts[0], "link", "set", hosts[0], "down")
        start = time.monotonic()
        for rank, process in enumerate(processes):
            _, error = process.communicate(timeout=30)
            assert process.returncode == 1
            assert re.search(rf"\[rank {rank}\] error: (watchdog: )?lost rank {1 - rank} on \S+ in 'step: ", error), (
                error
            )
        assert time.monotonic() - start < 15
    finally:
        end_all(processes)


def test_hosts_that_gloo_cannot_connect_are_told_what_to_look_at(hosts):
    """Both take the loopback for the network, as a machine does whose own name has the address 127.0.0.1."""
    processes = ranks_on(hosts, ["-c", JOIN, 6], FACTS="{}", GLOO_SOCKET_IFNAME="lo")
    try:
        for process in processes:
            _, error = process.communicate(timeout=40)
            assert process.returncode == 1 and "GLOO_SOCKET_IFNAME=eth0 or the like sets it" in error, error
    finally:
        end_all(processes)


@pytest.mark.long
def test_the_trainer_on_two_hosts_ends_when_the_cable_is_pulled(digits, hosts, tmp_path):
    arguments = [*TINY, "--data.root", digits, "--run.out", tmp_path, "--run.watchdog_s", 8, "--schedule.epochs", 400]
    trainer = [REPOSITORY / "trainer" / "run.py", *arguments, "--run.log_every", 1, "--run.eval_every", 400]
    processes = [start_on(host, [*TORCHRUN, *rendezvous("static", n), *trainer]) for n, host in enumerate(hosts)]
    try:
        while "step 60/" not in (line := processes[0].stdout.readline()):
            assert line
        ip("-n", hosts[0], "link", "set", hosts[0], "down")
        start = time.monotonic()
        for rank, process in enumerate(processes):
            _, error = process.communicate(timeout=60)
            assert process.returncode == 1
            assert re.search(rf"\[rank {rank}\] error: (watchdog: )?lost rank {1 - rank} on \S+ in 'step ", error), (
                error
            )
        assert time.monotonic() - start < 40
    finally:
        end_all(processes)
