"""Which of several models is faster, and which are worth choosing: pure functions of what was measured.

A shared machine's speed drifts by more than models differ. So models are timed in turn, each timed run is compared with
the others of its round, and medians over the rounds are not moved by single runs that were disturbed.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

# Speeds within 3 % are a tie: processes differ that much (memory layout) however many rounds are run. It is a choice.
MARGIN = 0.03
NOISY = 0.10  # A larger spread of the speed is worth a warning.
_CONFIDENCE = 0.95
FEWEST_ROUNDS = 6  # With fewer not even the range of all rounds holds the median with that confidence.

Speeds = Mapping[str, Sequence[float]]  # model -> images/s of its timed runs, equally many for each


def typical(speeds: Speeds) -> dict[str, float]:
    """Each model's images/s, as on a machine whose speed does not drift.

    Source: a step of Tukey's median polish on the logarithms, which are taken for model + round + noise.
    """
    logs = np.log(np.array(list(speeds.values())))  # [models, rounds]
    drift = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)  # [rounds]
    return dict(zip(speeds, np.exp(np.median(logs - drift, axis=1)).tolist(), strict=True))


def spread(speeds: Sequence[float]) -> float:
    """The range of the middle half of the speeds, as a fraction of their median."""
    low, middle, high = np.percentile(speeds, [25, 50, 75])
    return float((high - low) / middle)


def surely_faster(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the model with speeds `a` is faster than that with speeds `b`, by more than MARGIN.

    It is if the confidence interval of the median ratio of timed runs of the same round lies beyond it. Fewer than
    FEWEST_ROUNDS give no such interval, and no model is surely faster.
    """
    if len(a) < FEWEST_ROUNDS:
        return False
    ratios = np.sort(np.log(np.array(a) / np.array(b)))
    return bool(ratios[_skipped(len(ratios))] > math.log1p(MARGIN))


def _skipped(rounds: int) -> int:
    """How many of the sorted values may lie on each side of a confidence interval of the median.

    Args:
      rounds: FEWEST_ROUNDS or more.
    Source: the number of values below a median is binomial, (rounds, 1/2).
    """
    below = np.cumsum([math.comb(rounds, count) for count in range(rounds)]) * 0.5**rounds
    return int(np.sum(2 * below <= 1 - _CONFIDENCE)) - 1


def ranked(speeds: Speeds) -> dict[str, int]:
    """Models from fast to slow with their ranks: 1, 2, 2, 4 where the second and third are too close to call.

    A model has a lower rank only if every model above is surely faster, so each step in the order is one that was seen.
    Models of a rank are in the order of their names.
    """
    usual = typical(speeds)
    groups: list[list[str]] = []
    for name in sorted(speeds, key=lambda name: -usual[name]):
        tied = [
            number
            for number, group in enumerate(groups)
            if not all(surely_faster(speeds[other], speeds[name]) for other in group)
        ]
        first = min(tied, default=len(groups))
        groups[first:] = [[*itertools.chain(*groups[first:]), name]]
    ranks: dict[str, int] = {}
    for group in groups:
        ranks |= dict.fromkeys(sorted(group), len(ranks) + 1)
    return ranks


def order_line(ranks: Mapping[str, int]) -> str:
    """The order in a line: a > b = c > d."""
    groups = itertools.groupby(ranks, key=lambda name: ranks[name])
    return " > ".join(" = ".join(names) for _, names in groups)
