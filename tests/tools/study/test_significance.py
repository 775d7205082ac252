"""The bootstrap over images and seeds: it covers what it says, it is paired, and its letters say what it found."""

import itertools

import numpy as np
import pytest

from tools.lib.study.significance import compare_students, letters

IMAGES, IMAGE_SD = 200, 2.0  # Images differ in how hard they are, for all students alike.


def study(random: np.random.Generator, levels, seeds, seed_sd: float) -> tuple[np.ndarray, list[int]]:
    """Which images the runs of a simulated study recognise, bool [R, IMAGES], and the student of each run."""
    owner = [number for number, count in enumerate(seeds) for _ in range(count)]
    hardness = random.normal(0, IMAGE_SD, IMAGES)
    run_logit = np.array(levels)[owner] + random.normal(0, seed_sd, len(owner))
    return random.random((len(owner), IMAGES)) < probability(run_logit[:, None] + hardness), owner


def probability(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def true_difference(levels, seed_sd: float) -> float:
    """Return the difference of the accuracies over all images and all seeds, in percentage points."""
    x = np.random.default_rng(9).normal(0, np.hypot(IMAGE_SD, seed_sd), 500_000)
    better, worse = (100 * probability(level + x).mean() for level in levels)
    return better - worse


def coverage(seeds, seed_sd: float, studies: int = 150) -> float:
    random, levels = np.random.default_rng(1), (3.5, 3.0)
    truth, inside = true_difference(levels, seed_sd), 0
    for number in range(studies):
        found = compare_students(*study(random, levels, seeds, seed_sd), resamples=200, seed=number)
        low, high = found.interval[0, 1]
        inside += low <= truth <= high
    return inside / studies


def test_the_interval_of_a_pair_covers_the_truth_in_95_of_100_studies_of_one_seed_that_does_not_matter():
    assert 0.91 <= coverage((1, 1), seed_sd=0.0) <= 0.985


@pytest.mark.parametrize("seeds", [(3, 1), *(pytest.param(each, marks=pytest.mark.long) for each in ((3, 3), (2, 2)))])
@pytest.mark.parametrize("seed_sd", [0.0, 0.3])
def test_it_covers_the_truth_at_least_as_often_where_seeds_matter_and_one_student_has_several(seeds, seed_sd):
    """A seed_sd of 0.3 moves the accuracy by 2 points, as much as all images do."""
    assert coverage(seeds, seed_sd) >= 0.91


def test_without_several_seeds_an_interval_says_nothing_about_seeds():
    assert coverage((1, 1), seed_sd=0.3) < 0.85


@pytest.mark.parametrize(("seeds", "seed_sd"), [((1,) * 6, 0.0), ((3, 3, 1, 1, 1, 1), 0.1)])
def test_among_equal_students_no_pair_at_all_is_called_distinguishable_in_about_95_of_100_studies(seeds, seed_sd):
    random, studies = np.random.default_rng(2), 100
    wrong = sum(
        compare_students(*study(random, [3.0] * 6, seeds, seed_sd), resamples=200, seed=number).distinguishable.any()
        for number in range(studies)
    )
    assert wrong / studies <= 0.09


def test_intervals_of_all_pairs_at_once_are_wider_than_those_of_a_pair_alone():
    correct, owner = study(np.random.default_rng(0), [3.0] * 6, [1] * 6, 0.0)
    found = compare_students(correct, owner)
    for i, j in itertools.combinations(range(6), 2):
        alone = compare_students(correct[[i, j]], [0, 1])
        assert np.diff(found.interval[i, j]) > np.diff(alone.interval[0, 1])


def test_a_difference_on_the_same_images_is_known_better_than_one_on_shuffled_images():
    better, worse = np.arange(500) < 400, np.arange(500) < 380
    paired = compare_students(np.stack([better, worse]), [0, 1])
    shuffled = compare_students(np.stack([better, np.random.default_rng(0).permutation(worse)]), [0, 1])
    assert paired.difference[0, 1] == shuffled.difference[0, 1] == pytest.approx(4.0)
    assert np.ptp(paired.interval[0, 1]) < 0.5 * np.ptp(shuffled.interval[0, 1])
    assert paired.distinguishable[0, 1] and not shuffled.distinguishable[0, 1]


def test_accuracies_differences_and_their_signs():
    correct = np.zeros((4, 100), bool)
    for run, count in enumerate((90, 72, 71, 70)):
        correct[run, :count] = True
    found = compare_students(correct, [0, 1, 1, 2])
    assert found.top1.tolist() == [90.0, 71.5, 70.0]
    assert found.difference[0].tolist() == [0.0, 18.5, 20.0]
    assert np.array_equal(found.difference, -found.difference.T)
    assert np.array_equal(found.distinguishable, found.distinguishable.T)
    assert found.distinguishable[0].tolist() == [False, True, True] and not found.distinguishable[1, 2]
    assert np.all((found.top1_interval[:, 0] <= found.top1) & (found.top1 <= found.top1_interval[:, 1]))


def test_equal_predictions_are_not_distinguishable_and_opposite_ones_are():
    found = compare_students(np.array([[True] * 50, [True] * 50, [False] * 50]), [0, 1, 2])
    assert found.interval[0, 1].tolist() == [0.0, 0.0] and not found.distinguishable[0, 1]
    assert found.distinguishable[0, 2]


def test_the_same_arguments_give_the_same_bits_and_one_student_is_enough():
    correct, owner = study(np.random.default_rng(4), (3.0,), (3,), 0.1)
    first, second = (compare_students(correct, owner) for _ in range(2))
    assert np.array_equal(first.top1_interval, second.top1_interval) and np.ptp(first.top1_interval[0]) > 0
    assert letters(first.top1, first.distinguishable) == ["a"]


def test_students_have_no_letter_in_common_exactly_if_they_are_distinguishable():
    random = np.random.default_rng(5)
    for count in [1, 2, 3, 5, 8] * 10:
        different = np.triu(random.random((count, count)) < 0.5, 1)
        different |= different.T
        top1 = random.random(count)
        found = [set(each.split()) for each in letters(top1, different)]
        for i, j in itertools.combinations(range(count), 2):
            assert bool(found[i] & found[j]) != different[i, j]
        assert "a" in found[int(np.argmax(top1))]


def test_letters_of_a_chain():
    different = np.zeros((3, 3), bool)
    different[0, 2] = different[2, 0] = True
    assert letters(np.array([80.0, 81.0, 82.0]), different) == ["b", "a b", "a"]
