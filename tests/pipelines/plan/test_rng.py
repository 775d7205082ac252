import numpy as np
import pytest
from scipy import stats

from pipelines.plan import rng
from pipelines.plan.rng import Stream


def test_any_split_of_a_range_gives_the_same_rows():
    whole = rng.uniforms(3, Stream.CROP, 1000, 1100, 8)
    parts = [rng.uniforms(3, Stream.CROP, a, b, 8) for a, b in ((1000, 1001), (1001, 1050), (1050, 1100))]
    assert np.array_equal(whole, np.concatenate(parts))


def test_the_numbers_never_change():
    # Golden values: a change here changes every run that was ever started.
    assert rng.words(0, Stream.ORDER, 0, 1, 4).tolist() == [
        [213000021201967259, 4455796210202625458, 2055444239878205049, 10411612076246414556],
    ]
    assert rng.permute(0, Stream.ORDER, 0, 10, np.arange(10)).tolist() == [1, 3, 7, 6, 2, 0, 4, 5, 8, 9]


def test_seeds_streams_and_positions_have_numbers_of_their_own():
    drawn = [
        rng.words(seed, stream, start, start + 4, 4).tobytes()
        for seed in (0, 1, 2**63)
        for stream in Stream
        for start in (0, 4, 10**9)
    ]
    assert len(set(drawn)) == len(drawn)


def test_uniforms_are_uniform_and_independent():
    u = rng.uniforms(7, Stream.MIX, 0, 20_000, 4)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(u, rowvar=False) - np.eye(4)
    assert abs(correlation).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("k", [0, -4, 3, 6])
def test_draws_come_in_fours(k):
    with pytest.raises(AssertionError):
        rng.uniforms(0, Stream.CROP, 0, 1, k)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4096, 100_003])
def test_permute_is_a_permutation_and_may_be_asked_in_parts(n):
    order = rng.permute(5, Stream.ORDER, 2, n, np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))
    asked = np.arange(n)[::-3]
    assert np.array_equal(rng.permute(5, Stream.ORDER, 2, n, asked), order[asked])


def test_every_order_of_few_is_as_likely():
    orders, counts = np.unique(
        [rng.permute(seed, Stream.ORDER, 0, 4, np.arange(4)) for seed in range(6000)], axis=0, return_counts=True
    )
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_epochs_have_unrelated_orders():
    n = 10_000
    first, second = (rng.permute(0, Stream.ORDER, epoch, n, np.arange(n)) for epoch in (0, 1))
    assert abs(stats.spearmanr(first, second).statistic) < 0.04
    assert abs(stats.spearmanr(first, np.arange(n)).statistic) < 0.04
    assert (first == second).sum() < 10  # one is expected by chance
