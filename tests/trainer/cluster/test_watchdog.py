"""A rank that hangs, is lost or ends with an error is named, and the run ends."""

import re
import signal
import threading
import time

import pytest
import torch

from conftest import REPOSITORY, TINY
from support.ranks import LOOP, Ranks, one_line
from trainer.cluster.watchdog import Seen, State, Watchdog, find_lost, find_stuck
from trainer.cluster.world import World

ONE = World(0, 1, 1, torch.device("cpu"))


def seen(*ranks: tuple) -> dict[int, Seen]:
    """Ranks as (heartbeats, where, seconds silent, seconds without progress[, patience[, ended]]), at the time 0."""
    return {
        r: Seen(State(f"host{r}", 1, heartbeats, where, more[0] if more else 0.0, *more[1:]), -silent, -still)
        for r, (heartbeats, where, silent, still, *more) in enumerate(ranks)
    }


def test_the_rank_that_is_behind_is_to_blame_not_those_that_wait():
    ranks = seen((30, "step 12: update", 1, 70), (29, "step 12: input", 1, 71), (30, "step 12: update", 1, 70))
    blamed, line = find_stuck(ranks, 0, 60)
    assert blamed == [1]
    assert line.startswith(
        "no progress on rank 1 on host1 in 'step 12: input' for 71 s, ranks 0, 2 waiting in 'step 12: update'. "
    )


def test_nobody_is_blamed_while_the_slowest_still_moves_or_has_been_given_time():
    well = ([], "")
    assert find_stuck(seen((30, "update", 1, 500), (29, "input", 1, 59)), 0, 60) == well
    assert find_stuck(seen((30, "checkpoint", 1, 500), (29, "checkpoint", 1, 500, 600.0)), 0, 60) == well
    assert find_stuck(seen((30, "checkpoint", 1, 602), (29, "checkpoint", 1, 602, 600.0)), 0, 60)[0] == [1]
    ended = seen((9, "step 2: update", 1, 10), (30, "the end", 500, 500, 0.0, ""))
    assert find_stuck(ended, 0, 60) == well and find_lost(ended, 0, 60, 30) == ""


def test_ranks_in_the_same_place_are_named_together():
    blamed, line = find_stuck(seen((8, "update", 1, 62), (8, "update", 1, 63)), 0, 60)
    assert blamed == [0, 1] and "no progress on rank 0 on host0 in 'update', rank 1 on host1 in 'update'" in line


def test_silent_ranks_are_named_and_an_error_is_passed_on():
    ranks = seen((30, "update", 1, 70), (29, "input", 1, 71), (30, "update", 65, 70))
    assert "lost rank 2 on host2 in 'update': last heard 65 s ago" in find_lost(ranks, 0, 60, 30)
    unheard = seen((30, "update", 65, 70), (29, "input", 65, 71), (30, "update", 65, 70))
    assert "lost rank 0 on host0 in 'update'" in find_lost(unheard, 0, 60, 30)
    ended = seen((30, "update", 1, 31), (29, "input", 31, 31, 0.0, "OutOfMemoryError: CUDA"))
    assert "rank 1 on host1 ended in 'input': OutOfMemoryError: CUDA" in find_lost(ended, 0, 60, 30)
    assert find_lost(ended, 0, 60, 32) == ""


def test_when_rank_0_is_lost_no_other_is_named_though_it_was_heard_of_earlier():
    ranks = seen((30, "update", 59, 59), (29, "input", 61, 61), (30, "update", 61, 61))
    assert find_lost(ranks, 0, 60, 30) == "" and find_stuck(ranks, 0, 60) == ([], "")
    ranks = seen((30, "update", 61, 61), (29, "input", 63, 63), (30, "update", 63, 63))
    assert find_lost(ranks, 0, 60, 30).startswith("lost rank 0 on host0 in 'update': last heard 61 s ago")
    assert find_stuck(ranks, 0, 60) == ([], "")


def test_a_rank_that_hangs_after_rank_0_has_ended_is_named():
    ranks = seen((31, "the end", 70, 70, 0.0, ""), (30, "step 9: update", 69, 71))
    blamed, line = find_stuck(ranks, 0, 60)
    assert blamed == [1] and "no progress on rank 1 on host1 in 'step 9: update' for 71 s" in line
    assert find_lost(ranks, 0, 60, 30).startswith("lost rank 1 on host1")


def test_a_watchdog_that_is_switched_off_has_no_thread_and_still_takes_heartbeats():
    before = threading.active_count()
    with Watchdog(ONE, 0) as world:
        world.heartbeat("step 1")
        assert threading.active_count() == before
    with Watchdog(ONE, 60) as world:
        world.heartbeat("step 1")
        assert threading.active_count() > before
    assert threading.active_count() == before


def stop(rank: int, what: str, size: int = 2, seconds: float = 3) -> list[tuple[int, str, str]]:
    """The ends of ranks of which one stops at step 20, and of which none waits for the others for ever."""
    with Ranks(["-c", LOOP, seconds, rank, what], size) as ranks:
        assert ranks.await_line(rank) == "now\n"
        others = [process for r, process in enumerate(ranks.processes) if r != rank or what != "STOP"]
        for process in others:
            process.wait(300)
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
    assert re.search(r'File "<string>", line \d+ in inputs', hanging[2])


@pytest.mark.long
def test_a_rank_that_hangs_when_rank_0_has_ended_does_not_hang_for_ever():
    with Ranks(["-c", LOOP, 3, 1, "left alone"], 2) as ranks:
        (code, text, _), (hanging, _, error) = ranks.end()
    assert (code, text) == (0, "over\n")
    assert hanging == 1 and re.search(r"error: watchdog: (no progress on|lost) rank 1 on \S+ in 'step: input'", error)


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
        while "step 10/" not in (line := ranks.await_line(0)):
            assert line, ranks.end()[0][2]
        published_s = time.monotonic() + 3  # Where a rank is, is published once a second here.
        while time.monotonic() < published_s:
            ranks.await_line(0)
        ranks.processes[1].kill()
        _, error = ranks.processes[0].communicate(timeout=300)
        assert ranks.processes[0].returncode == 1
    named = (
        r"\[rank 0\] error: lost rank 1 on \S+ in 'step \d+: (input|update)': last heard .* The run resumes from its"
    )
    assert re.fullmatch(named + ".*\n", error), error
