"""Any number of ranks and any even micro-batch carry out the same plan: each row once, beside its partner."""

import itertools

import numpy as np
import pytest
import torch

from conftest import fake_index
from pipelines.common.errors import UserError
from pipelines.ops.mixing import mix_pixels, partners
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.pairs import Division
from pipelines.plan.plan import TrainPlan

SIZE = 8
SAMPLES = 400


def drawn_divisions(count: int) -> list[tuple[int, int, int, int]]:
    """Global batch, group, ranks and micro-batch, at random; the first ones are those of real machines."""
    real = [(96, 16, ranks, micro) for ranks in (1, 2, 3, 5, 7, 8, 12, 16, 48) for micro in (2, 6, 32)]
    odd = [(15, 5, 2, 4), (15, 3, 8, 2), (9, 1, 4, 2), (10, 1, 5, 2), (21, 7, 3, 6)]
    generator = np.random.default_rng(0)
    for _ in range(count):
        group = int(generator.integers(1, 17))
        total = group * int(generator.integers(1, 13))
        ranks = int(generator.integers(1, -(-total // 2) + 1))
        real.append((total, group, ranks, 2 * int(generator.integers(1, 20))))
    return real + odd


DIVISIONS = drawn_divisions(60)


def plan_of(global_batch: int, group: int) -> TrainPlan:
    return TrainPlan(
        fake_index(SAMPLES), AugmentConfig(mix_group=group, repeats=1), global_batch=global_batch, image_size=SIZE
    )


def pixels_of(rows: BatchPlan) -> torch.Tensor:
    """Pixels that depend on the sample and the flip alone: uint8 [B, S, S, 3]."""
    values = (rows.sample[:, None] * 7 + rows.flip[:, None] * 3 + np.arange(SIZE * SIZE * 3) * 5) % 256
    return torch.from_numpy(values.astype(np.uint8)).view(-1, SIZE, SIZE, 3)


def mixed(rows: BatchPlan) -> torch.Tensor:
    own = pixels_of(rows)
    return mix_pixels(own, partners(own, rows.mix_group), torch.from_numpy(rows.lam), rows.box)


def targets(rows: BatchPlan) -> np.ndarray:
    """The samples that a row is a mix of, and their weights: float64 [B, 400]."""
    weights = np.zeros((len(rows), SAMPLES))
    other = partners(torch.from_numpy(rows.sample), rows.mix_group).numpy()
    np.add.at(weights, (np.arange(len(rows)), rows.sample), rows.lam.astype(np.float64))
    np.add.at(weights, (np.arange(len(rows)), other), 1 - rows.lam.astype(np.float64))
    return weights


@pytest.mark.parametrize("total, group, ranks, micro_batch", DIVISIONS)
def test_each_row_comes_once_beside_its_partner(total, group, ranks, micro_batch):
    division = Division(total, group, ranks, micro_batch)
    parts = [division.rows(rank) for rank in range(ranks)]
    assert sorted(np.concatenate([rows for rank in parts for rows in rank]).tolist()) == list(range(total))
    plan = plan_of(total, group)
    alone = set(division.unmixed().tolist()) if not division.has_whole_groups else set()
    for rows in itertools.chain(*parts):
        in_group = group if division.has_whole_groups else len(rows)
        other = partners(torch.from_numpy(rows), in_group).numpy()
        expected = plan.partner(rows)
        is_mixed = np.array([int(row) not in alone for row in rows])
        assert (other[is_mixed] == expected[is_mixed]).all() and (expected[~is_mixed] == rows[~is_mixed]).all()


@pytest.mark.parametrize("total, group, ranks, micro_batch", DIVISIONS)
def test_the_mixed_pixels_and_labels_of_all_ranks_are_those_of_one(total, group, ranks, micro_batch):
    plan = plan_of(total, group)
    whole = plan.rows(total, 2 * total)
    rows_of = Division(total, group, ranks, micro_batch).rows
    pixels, labels = torch.zeros(total, SIZE, SIZE, 3, dtype=torch.uint8), np.zeros((total, SAMPLES))
    for rank in range(ranks):
        batches = plan.batches(1, 2, rank=rank, ranks=ranks, micro_batch=micro_batch)
        for batch, rows in zip(batches, rows_of(rank), strict=True):
            assert np.array_equal(batch.sample, whole.sample[rows]) and batch.position == total + rows[0]
            assert np.array_equal(batch.crop, whole.crop[rows]) and np.array_equal(batch.args, whole.args[rows])
            pixels[rows], labels[rows] = mixed(batch), targets(batch)
    assert torch.equal(pixels, mixed(whole))
    assert np.array_equal(labels > 0, targets(whole) > 0) and np.allclose(labels, targets(whole), atol=1e-7)


@pytest.mark.parametrize("total, group, ranks, micro_batch", DIVISIONS)
def test_ranks_differ_by_a_pair_and_a_rank_has_two_sizes(total, group, ranks, micro_batch):
    division = Division(total, group, ranks, micro_batch)
    sizes = [division.sizes(rank) for rank in range(ranks)]
    slices = [sum(each) for each in sizes]
    odd = total % 2  # The last pair is then a row alone.
    assert max(slices) - min(slices) <= 2 + odd
    for each in sizes:
        assert max(each) <= micro_batch and len(set(each)) <= 2 + odd and max(each) - min(each) <= 2 + odd
    if micro_batch > 2:
        assert len({len(each) for each in sizes}) == 1  # SyncBatchNorm's layers wait for each other.


def test_whole_groups_stay_in_order():
    plan = plan_of(96, 16)
    for ranks, micro_batch in ((1, 96), (1, 16), (2, 48), (3, 32), (6, 16)):
        for rank in range(ranks):
            for batch in plan.batches(2, 4, rank=rank, ranks=ranks, micro_batch=micro_batch):
                assert batch.mix_group == 16
                assert np.array_equal(batch.sample, plan[batch.position : batch.position + len(batch)].sample)


def test_a_rank_without_a_pair_is_refused():
    with pytest.raises(UserError, match="ranks is 9; a global batch of 16 rows has 8 pairs"):
        next(plan_of(16, 8).batches(0, 1, ranks=9))
