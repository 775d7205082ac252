"""Which models are faster, which are on the front, and what noise and drift do to that."""

import numpy as np
import pytest

from tools.lib.common.front import pareto_front
from tools.lib.compare import ranking


def timed(speed: float, rounds: int = 15, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    return speed * np.exp(noise * np.random.default_rng(seed).standard_normal(rounds))


# The front


def test_no_point_of_the_front_is_dominated_by_another():
    assert pareto_front([(80, 100), (82, 50), (81, 40), (79, 100), (84, 1)]) == [True, True, False, False, True]


def test_equal_points_are_on_the_front_together():
    assert pareto_front([(80, 100), (80, 100), (79, 90)]) == [True, True, False]


@pytest.mark.parametrize(("other", "expected"), [((80, 99), False), ((79, 100), False), ((81, 99), True)])
def test_a_tie_in_one_coordinate_is_decided_by_the_other(other, expected):
    assert pareto_front([(80, 100), other]) == [True, expected]


def test_one_model_and_none_have_a_front():
    assert pareto_front([(80, 100)]) == [True]
    assert pareto_front([]) == []


# The order


def test_a_machine_that_slows_down_by_half_changes_neither_order_nor_ties():
    drift = np.linspace(1, 0.5, 15)
    speeds = {"slow": 90 * drift, "fast": 100 * drift, "as_fast": 100.5 * drift}
    assert ranking.ranked(speeds) == {"as_fast": 1, "fast": 1, "slow": 3}
    assert ranking.spread(speeds["fast"]) > ranking.NOISY


def test_a_few_disturbed_runs_do_not_change_the_order():
    fast, slow = timed(100), timed(90)
    fast[[2, 7, 11]] *= 0.2
    assert ranking.ranked({"slow": slow, "fast": fast}) == {"fast": 1, "slow": 2}
    assert ranking.typical({"slow": slow, "fast": fast})["fast"] == pytest.approx(100)


def test_models_nearer_than_the_margin_are_tied_and_stand_by_name_however_often_they_are_measured():
    for seed in range(5):
        speeds = {"b": timed(101, 200, 0.01, seed), "a": timed(100, 200, 0.01, seed + 10)}
        assert list(ranking.ranked(speeds).items()) == [("a", 1), ("b", 1)]


def test_noise_that_hides_the_difference_makes_a_tie_and_many_rounds_resolve_it():
    assert not ranking.surely_faster(timed(110, 9, 0.3), timed(100, 9, 0.3, seed=1))
    assert ranking.surely_faster(timed(110, 400, 0.1), timed(100, 400, 0.1, seed=1))


def test_no_step_in_the_order_is_one_that_was_not_seen():
    """b ties with a and with c, which differ: all three have the same rank, and none is above another."""
    speeds = {"a": timed(104), "b": timed(102), "c": timed(100), "d": timed(90)}
    assert ranking.surely_faster(speeds["a"], speeds["c"])
    assert ranking.ranked(speeds) == {"a": 1, "b": 1, "c": 1, "d": 4}


def test_a_model_that_is_slower_in_most_rounds_is_not_above_though_its_usual_speed_is_higher():
    high = np.arange(15) >= 7
    a = np.exp(1.0 * high)
    b = np.where(np.arange(15) >= 12, 1.0, 1.05 * a)
    speeds = {"a": a, "b": b} | {f"steady{number}": timed(0.1) for number in range(5)}
    usual = ranking.typical(speeds)
    assert usual["a"] > usual["b"]
    assert ranking.surely_faster(b, a)
    assert [ranking.ranked(speeds)[name] for name in ("a", "b", "steady0")] == [1, 1, 3]


def test_fewer_than_six_rounds_leave_all_models_tied():
    assert 2 * 0.5**ranking.FEWEST_ROUNDS <= 1 - ranking._CONFIDENCE < 2 * 0.5 ** (ranking.FEWEST_ROUNDS - 1)
    assert ranking.ranked({"a": timed(100, 5), "b": timed(200, 5)}) == {"a": 1, "b": 1}
    assert ranking.ranked({"a": timed(100, 6), "b": timed(200, 6)}) == {"b": 1, "a": 2}


def test_the_confidence_interval_of_a_median_leaves_out_what_the_tables_say():
    assert [ranking._skipped(rounds) for rounds in (6, 9, 15, 25)] == [0, 1, 3, 7]


def test_the_order_is_written_in_a_line():
    assert ranking.order_line({"a": 1, "b": 2, "c": 2, "d": 4}) == "a > b = c > d"
