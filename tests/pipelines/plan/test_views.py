"""Finite views: with augment.cycle_epochs epochs repeat earlier ones, in every division and range of positions."""

import dataclasses

import numpy as np
import pytest

from conftest import fake_index
from pipelines.common.errors import UserError
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan

EVERYTHING = {"three_augment": True, "color_jitter": 0.3, "erase_prob": 0.5}
STEPS = 3  # steps of an epoch in most plans here


def plan_of(cycle_epochs: int, *, seed: int = 0, group: int = 8, groups: int = 3, **options) -> TrainPlan:
    """A plan of epochs of STEPS steps, and of a few images that are left over."""
    global_batch = group * groups
    augment = AugmentConfig(mix_group=group, cycle_epochs=cycle_epochs, **EVERYTHING)
    index = fake_index(STEPS * global_batch + min(2, global_batch - 1))
    return TrainPlan(index, augment, seed, global_batch, **{"image_size": 64, **options})


def columns(rows: BatchPlan) -> dict[str, object]:
    """All that rows say but where they are, by name."""
    return {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows) if field.name != "positions"}


def assert_same_views(found: BatchPlan, expected: BatchPlan) -> None:
    for name, value in columns(found).items():
        if name == "partners" and value is not None:
            assert_same_views(value, expected.partners)
        else:
            assert np.array_equal(value, getattr(expected, name)), name


def drawn_divisions() -> list[tuple[int, int, int, int, int, int]]:
    """Seed, cycle, group, groups, ranks and micro-batch, at random."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(15):
        group, groups = int(generator.integers(1, 11)), int(generator.integers(1, 4))
        ranks = int(generator.integers(1, -(-group * groups // 2) + 1))
        seed, cycle = int(generator.integers(2**63)), int(generator.integers(1, 4))
        found.append((seed, cycle, group, groups, ranks, 2 * int(generator.integers(1, 16))))
    return found


@pytest.mark.parametrize(("seed", "cycle", "group", "groups", "ranks", "micro_batch"), drawn_divisions())
def test_every_micro_batch_of_an_epoch_repeats_that_of_the_first_ones(seed, cycle, group, groups, ranks, micro_batch):
    plan, endless = (plan_of(epochs, seed=seed, group=group, groups=groups) for epochs in (cycle, 0))
    last = (cycle + 1) * STEPS + 1
    for rank in range(ranks):
        division = {"rank": rank, "ranks": ranks, "micro_batch": micro_batch}
        found = list(plan.batches(0, last, **division))
        first = list(endless.batches(0, cycle * STEPS, **division))
        positions = [rows.positions for rows in endless.batches(0, last, **division)]
        assert len(found) == len(positions) > len(first)
        for number, (rows, expected) in enumerate(zip(found, positions, strict=True)):
            original = first[number % len(first)]
            assert_same_views(rows, original)
            assert rows.positions.dtype == np.int64 and np.array_equal(rows.positions, expected)
            assert np.array_equal(plan.views(rows.positions), original.positions)


def test_ranges_over_the_seams_have_the_views_of_their_positions():
    """A cycle has 72 positions: ranges hold none, one or several of its seams."""
    plan, endless = plan_of(1), plan_of(0)
    for start, stop in ((64, 80), (0, 72), (72, 144), (48, 240), (8, 16), (136, 152)):
        rows = plan.rows(start, stop)
        assert np.array_equal(rows.positions, np.arange(start, stop))
        parts = [endless.rows(first, first + 8) for first in plan.views(np.arange(start, stop, 8)).tolist()]
        for name in ("sample", "crop", "flip", "ops", "args", "erase", "lam", "box"):
            assert np.array_equal(getattr(rows, name), np.concatenate([getattr(part, name) for part in parts])), name


def test_single_positions_come_with_the_partners_of_the_views_that_they_repeat():
    plan, endless = plan_of(1), plan_of(0)
    for position in (0, 71, 72, 75, 143, 144, 1000):
        rows, original = plan[position], endless[position % 72]
        assert_same_views(rows, original)
        assert rows.positions.tolist() == [position]
        assert rows.partners.positions.tolist() == [int(plan.partner(np.array(position)))]
    over_the_seam = plan[70:75]
    assert over_the_seam.positions.tolist() == [70, 71, 72, 73, 74]
    assert over_the_seam.partners.positions.tolist() == [65, 64, 79, 78, 77]
    assert over_the_seam.sample.tolist() == [int(endless[position % 72].sample[0]) for position in range(70, 75)]


def test_without_a_cycle_no_views_are_repeated():
    plan = plan_of(0)
    positions = np.array([[0, 71], [72, 10**12]])
    assert np.array_equal(plan.views(positions), positions)
    first, second = plan.rows(0, 72), plan.rows(72, 144)
    assert not np.array_equal(first.crop, second.crop)
    assert np.array_equal(plan_of(2).views(positions), positions % 144)


def test_windows_of_shards_are_repeated_in_their_order(photos):
    augment = AugmentConfig(mix_group=4, repeats=1, cycle_epochs=2)
    plan = TrainPlan(photos, augment, global_batch=8, image_size=32, window_shards=2)
    epoch = plan.steps_per_epoch * 8
    first, second, third = (plan.rows(start, start + epoch).sample for start in (0, epoch, 2 * epoch))
    assert np.array_equal(first, third) and not np.array_equal(first, second)


def test_image_sizes_are_repeated_with_the_views():
    plan = plan_of(3, image_size=((0, 32), (1, 48), (2, 64)))
    sizes = [32, 48, 64, 32, 48, 64, 32]
    assert [plan.image_size_at(epoch) for epoch in range(7)] == sizes
    for epoch, size in enumerate(sizes):
        rows = plan.rows(epoch * 72, (epoch + 1) * 72)
        assert rows.image_size == size and (rows.resize == size).all()
        assert (rows.box[:, :2] + rows.box[:, 2:]).max() <= size
    assert [rows.image_size for rows in plan.batches(8, 10)] == [64, 32]
    with pytest.raises(ValueError, match=r"positions \[208, 224\) are of two image sizes"):
        plan.rows(208, 224)


@pytest.mark.parametrize(("cycle", "repeated"), [(1, 0), (2, 0)])
def test_sizes_that_change_within_repeated_epochs_are_refused(cycle, repeated):
    message = (
        f"^image_size: 64 px begin with epoch 2, but augment.cycle_epochs is {cycle}, so epoch 2 repeats epoch "
        f"{repeated}: let all sizes begin earlier, or raise augment.cycle_epochs$"
    )
    with pytest.raises(UserError, match=message):
        plan_of(cycle, image_size=((0, 32), (2, 64)))


def test_the_description_says_how_many_epochs_are_repeated():
    assert plan_of(5).describe() == {**plan_of(0).describe(), "augment.cycle_epochs": 5}


def test_an_explanation_names_the_position_that_is_repeated():
    plan = plan_of(2)
    assert "repeats" not in plan.explain(143)
    lines = plan.explain(3 * 72 + 5).splitlines()
    assert lines[0].startswith("position 221: image ") and lines[-1] == "  repeats: the view of position 77, in epoch 1"
    assert "of position 218 (" not in plan.explain(77) and "position 218 (" in "\n".join(lines)
    own = plan.explain(77).splitlines()
    assert lines[1:-2] == own[1:-1]


def test_a_fill_colour_of_the_recipe_replaces_the_students():
    plans = [plan_of(0, fill=fill) for fill in ((124, 116, 104), (128, 128, 128))]
    assert [plan.rows(0, 8).fill for plan in plans] == [(124, 116, 104), (128, 128, 128)]
    assert plans[0].describe() != plans[1].describe() and "augment.fill" not in plans[0].describe()
    black = dataclasses.replace(plans[0].augment, fill=(0, 0, 0))
    fixed = [dataclasses.replace(plan, augment=black) for plan in plans]
    assert [plan.rows(0, 8).fill for plan in fixed] == [(0, 0, 0)] * 2
    assert fixed[0].describe() == fixed[1].describe() == {**plans[0].describe(), "fill": [0, 0, 0]}
