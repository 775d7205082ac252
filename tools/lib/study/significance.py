"""Which students are really better: a bootstrap over the validation images and over the seeds of each student.

All students are resampled with the same images, so that images which are hard for everybody cancel in a difference.
"""

import dataclasses
import string
from collections.abc import Sequence

import numpy as np

RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracies and their differences in percentage points, for S students; each interval holds CONFIDENCE.

    Attributes:
      top1: float64 [S], mean over a student's runs and all images; top1_interval: [S, 2], low and high.
      difference: float64 [S, S], top-1 of the row's student minus that of the column's.
      interval: [S, S, 2], low and high, of the differences of all pairs at once: all of them hold with CONFIDENCE.
      distinguishable: bool [S, S], whether 0 is outside `interval`.
    """

    top1: np.ndarray
    top1_interval: np.ndarray
    difference: np.ndarray
    interval: np.ndarray
    distinguishable: np.ndarray


def compare_students(
    correct: np.ndarray, student: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare students by which images each of their runs has recognised.

    A resample b draws N of the N images with replacement, the same for all, which gives each run r the accuracy
    a[b, r] = sum_n count[b, n] correct[r, n] / N, and the seeds of each student (`_over_seeds`). An accuracy has
    the percentile interval. The half-widths of differences are q se[p], where se[p] is the standard deviation of the
    resampled difference d[b, p] of pair p, and q is the 0.95 quantile over the resamples of max_p |d[b, p] - d[p]| /
    se[p]: with that confidence every interval is right. This corrects for the number of pairs, and less strictly than
    Holm does, because it knows that pairs with a common student depend on each other.

    Args:
      correct: bool [R, N], runs in rows; all are of the same N images.
      student: the number of the student of each run, from 0; a student has at least one run.
      resamples: B. The cost is that of B R N multiplications: 20 runs and 50,000 images take 1.2 s on a core.
      seed: of the random numbers; the same arguments give the same result.
    Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval). Owen 2007,
      The pigeonhole bootstrap, Annals of Applied Statistics 1:386 (images and seeds are drawn independently; the
      intervals err on the wide side). Westfall and Young 1993, Resampling-Based Multiple Testing; Hothorn, Bretz and
      Westfall 2008, Simultaneous inference in general parametric models (the largest standardised difference).
    """
    owner, generator = np.asarray(student), np.random.default_rng(seed)
    num_images, columns = correct.shape[1], correct.T.astype(np.float32)
    run_top1 = np.empty((resamples, len(owner)))
    for row in run_top1:
        count = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
        # Sums of whole numbers are exact in float32 up to 2^24 images, so no order of a sum changes a bit.
        row[:] = 100 * (count.astype(np.float32) @ columns).astype(np.float64) / num_images
    drawn = _over_seeds(run_top1, owner, generator)
    top1 = _means(100 * correct.mean(axis=1), owner)
    difference, differences = top1[:, None] - top1, drawn[:, :, None] - drawn[:, None, :]
    error = differences.std(axis=0)
    standard = np.abs(differences - difference) / np.where(error > 0, error, np.inf)
    half = np.quantile(standard.max(axis=(1, 2)), CONFIDENCE) * error
    ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    interval = np.stack([difference - half, difference + half], axis=-1)
    return Comparison(top1, np.quantile(drawn, ends, axis=0).T, difference, interval, np.abs(difference) > half)


def _means(run_top1: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The mean over the runs of each student, [..., R] to [..., S]."""
    return np.stack([run_top1[..., owner == each].mean(axis=-1) for each in range(owner.max() + 1)], axis=-1)


def _over_seeds(run_top1: np.ndarray, owner: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The accuracy of each student, with its seeds drawn again in each resample, [B, R] to [B, S].

    A student has the mean of its runs plus as many deviations as it has runs, averaged. They are drawn with replacement
    from the deviations of all runs from their students' means, because two or three runs of one student say little, and
    one says nothing: seeds are taken to vary alike in all students. Of k runs each deviation counts sqrt(k / (k - 1))
    times, for it is from their own mean. Where each student has one run, seeds are not drawn.

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, sections 3.2 and 3.3 (several samples,
      pooled and rescaled residuals).
    """
    middle, k = _means(run_top1, owner), np.bincount(owner)[owner]
    repeated = np.flatnonzero(k > 1)
    if len(repeated) == 0:
        return middle
    scale = np.sqrt(k / np.maximum(k - 1, 1))
    deviations = (scale * (run_top1 - middle[:, owner]))[:, repeated]
    chosen = generator.integers(len(repeated), size=run_top1.shape)
    return middle + _means(np.take_along_axis(deviations, chosen, axis=1), owner)


def letters(top1: np.ndarray, distinguishable: np.ndarray) -> list[str]:
    """Letters for each student; two students are distinguishable exactly if they have no letter in common.

    The letter a belongs to the group of the best student.

    Args:
      top1: [S]; distinguishable: bool [S, S].
    Source: Piepho 2004, An algorithm for a letter-based representation of all-pairwise comparisons, Journal of
      Computational and Graphical Statistics 13:456 (insert and absorb).
    """
    groups = [frozenset(range(len(top1)))]
    for i, j in zip(*np.nonzero(np.triu(distinguishable)), strict=True):
        split = {part for group in groups for part in ((group - {i}, group - {j}) if {i, j} <= group else (group,))}
        groups = [group for group in split if not any(group < other for other in split)]
    order = {student: place for place, student in enumerate(np.argsort(-top1, kind="stable").tolist())}
    groups.sort(key=lambda group: sorted(order[student] for student in group))
    names = [*string.ascii_lowercase, *(f"a{number}" for number in range(1, len(groups)))]
    return [" ".join(name for name, group in zip(names, groups, strict=False) if s in group) for s in range(len(top1))]
