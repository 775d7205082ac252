"""An epoch's order is a permutation and a pure function, whether all images are shuffled together or by windows."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from conftest import fake_index
from pipelines.plan import order, rng
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from pipelines.plan.rng import Stream
from pipelines.shards.index import ShardIndex, read_index

# The shards have unequal sizes, and one of them is empty.
SIZES = [70, 1, 130, 0, 64, 64, 200, 33, 99, 128, 57]
WINDOW = 4  # The last of three windows has three shards.


def sharded_index(sizes: list[int]) -> ShardIndex:
    """An index without shards on disk, whose shards have these many samples."""
    index = fake_index(sum(sizes))
    index.samples["shard"] = np.repeat(np.arange(len(sizes)), sizes)
    return dataclasses.replace(index, paths=tuple(Path(f"train-{i:05d}.tar") for i in range(len(sizes))))


def window_epoch(seed=0, epoch=0, sizes=SIZES, window_shards=WINDOW) -> np.ndarray:
    index = sharded_index(sizes)
    starts = order.shard_starts(index)
    return order.window_order(seed, epoch, starts, window_shards, np.arange(len(index)))


def shard_order(seed=0, epoch=0, num_shards=11) -> np.ndarray:
    return rng.permute(seed, Stream.SHARD_ORDER, epoch, num_shards, np.arange(num_shards))


def windows_of(shown: np.ndarray, shards: np.ndarray, sizes=SIZES, window_shards=WINDOW):
    """For each window of an epoch: its shards, and the images shown while it was the window's turn."""
    counts = np.array(sizes)[shards]
    for first in range(0, len(shards), window_shards):
        before, here = counts[:first].sum(), counts[first : first + window_shards].sum()
        yield shards[first : first + window_shards], shown[before : before + here]


def test_the_starts_of_the_shards_are_found():
    assert order.shard_starts(sharded_index(SIZES)).tolist() == [0, *np.cumsum(SIZES)]
    assert order.shard_starts(fake_index(7)).tolist() == [0, 7]


def test_the_index_of_a_dataset_holds_its_shards_in_order(digits):
    index = read_index(digits, "train")
    starts = order.shard_starts(index)
    assert len(starts) == len(index.paths) + 1 and len(index.paths) > 2
    for shard, (first, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        assert (index.samples["shard"][first:stop] == shard).all()


@pytest.mark.parametrize("window_shards", [1, 2, 4, 10, 11, 100])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_of_windows_shows_each_image_once(window_shards, epoch):
    shown = window_epoch(epoch=epoch, window_shards=window_shards)
    assert np.array_equal(np.sort(shown), np.arange(sum(SIZES)))


def test_entries_may_be_asked_in_any_parts():
    index = sharded_index(SIZES)
    starts = order.shard_starts(index)
    whole = window_epoch(seed=3, epoch=5)
    generator = np.random.default_rng(0)
    for _ in range(20):
        asked = generator.choice(len(index), generator.integers(1, 50))
        assert np.array_equal(order.window_order(3, 5, starts, WINDOW, asked), whole[asked])


def test_a_window_shows_all_images_of_its_shards_and_no_others():
    index = sharded_index(SIZES)
    seen = list(windows_of(window_epoch(), shard_order()))
    assert [len(shards) for shards, _ in seen] == [4, 4, 3]
    for shards, shown in seen:
        expected = np.flatnonzero(np.isin(index.samples["shard"], shards))
        assert np.array_equal(np.sort(shown), expected)


def test_seeds_epochs_and_windows_have_unrelated_orders():
    sizes = [500] * 12
    orders = [window_epoch(seed, epoch, sizes) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({shown.tobytes() for shown in orders}) == 4
    places = []  # the offsets of the images within their window, for windows of 2,000
    for (seed, epoch), shown in zip(((0, 0), (0, 1), (1, 0), (1, 1)), orders, strict=True):
        shards = shard_order(seed, epoch, 12)
        for window, images in windows_of(shown, shards, sizes):
            rank = {shard: i for i, shard in enumerate(window.tolist())}
            places.append([rank[image // 500] * 500 + image % 500 for image in images.tolist()])
    places = np.array(places)
    correlation = np.corrcoef(places) - np.eye(len(places))
    assert abs(correlation).max() < 0.12  # 66 pairs of 2,000: standard deviation 0.022
    for row in places:
        assert abs(stats.spearmanr(row, np.arange(2000)).statistic) < 0.1


def test_every_order_of_few_images_in_a_window_is_as_likely():
    """About 50 of each: one that comes twice as often as it should is noticed."""
    starts, every = order.shard_starts(sharded_index([2, 2])), np.arange(4)
    orders = [order.window_order(seed, epoch, starts, 2, every) for seed in range(40) for epoch in range(30)]
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(found) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_parts_of_a_permutation_are_independent_of_epochs():
    """(epoch 1, part 0) is not (epoch 0, part 1), as it would be if the two were added up."""
    drawn = [
        rng.permute(0, Stream.WINDOW_ORDER, epoch, 1000, np.arange(1000), part=part).tobytes()
        for epoch in range(5)
        for part in (0, 1, 2, 3, 2**32, 2**63)
    ]
    assert len(set(drawn)) == len(drawn)


GOLDEN_WINDOW = [163, 304, 169, 255, 465, 402, 182, 170]


def test_the_window_order_never_changes():
    assert window_epoch(seed=3, epoch=2)[400:408].tolist() == GOLDEN_WINDOW


def make_plan(window_shards: int, num_shards=40, repeats=3, seed=0) -> TrainPlan:
    sizes = (30 + np.arange(num_shards) % 7).tolist()
    config = AugmentConfig(mix_group=16, repeats=repeats)
    return TrainPlan(sharded_index(sizes), config, seed, 128, 32, (0, 0, 0), window_shards=window_shards)


def test_repeated_augmentation_works_on_windows():
    plan = make_plan(window_shards=4)
    shown, counts = np.unique(plan.rows(0, plan.steps_per_epoch * 128).sample, return_counts=True)
    assert len(shown) == -(-plan.steps_per_epoch * 128 // 3)
    assert (np.sort(counts)[1:] == 3).all()
    # The images are those of complete shards, but for the window in which the epoch ends.
    of_shard = np.bincount(plan.index.samples["shard"][shown], minlength=40)
    partly = (of_shard > 0) & (of_shard < np.bincount(plan.index.samples["shard"]))
    assert partly.sum() <= 4


def test_a_step_reads_from_the_shards_of_two_windows_at_most():
    plan = make_plan(window_shards=4, repeats=1)
    for step in range(3 * plan.steps_per_epoch):
        sample = plan.rows(step * 128, (step + 1) * 128).sample
        assert len(np.unique(plan.index.samples["shard"][sample])) <= 8


def test_a_plan_of_windows_is_the_same_however_it_is_split():
    plan = make_plan(window_shards=4)
    whole = plan.rows(0, 25 * 128).sample
    parts = [plan.rows(start, start + 16).sample for start in range(0, 25 * 128, 16)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_the_description_names_the_order():
    assert make_plan(0).describe()["window_shards"] == 0
    assert make_plan(4).describe() != make_plan(5).describe()
