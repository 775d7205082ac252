"""One comparison: two ways to the same pixels, and how far they may be apart."""

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far pixels may be apart, in levels of 255; None is no limit.

    Attributes:
      max: of any single value.
      mean: of the values of any single photograph.
    """

    max: int | None = 0
    mean: float | None = None

    def __str__(self) -> str:
        limits = {"max": self.max, "mean": self.mean}
        return ", ".join(f"{name} {limit:g}" for name, limit in limits.items() if limit is not None) or "none"


EXACT = Tolerance(max=0)


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one comparison.

    Attributes:
      stage: what is compared.
      ours: which of our ways.
      against: which other one.
      images: how many were compared; 0 where the comparison could not be made.
      max: largest difference of a value, in levels of 255 unless the note names another unit.
      mean: mean difference over the values of the photograph where it is largest.
      off_by_more: the fraction of the values that are off by more than 1.
      tolerance: what is allowed.
      ok: whether it was kept.
      note: why nothing was compared, or what else there is to say.
    """

    stage: str
    ours: str
    against: str
    images: int
    max: float
    mean: float
    off_by_more: float
    tolerance: str
    ok: bool
    note: str = ""


def compare(
    stage: str,
    ours: str,
    against: str,
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    tolerance: Tolerance,
    photographs: Iterable[Hashable] | None = None,
) -> Row:
    """The row for pairs of uint8 images of the same shape.

    Args:
      photographs: which one each pair shows; without, every pair counts as one.
    """
    pairs = list(pairs)
    photographs = range(len(pairs)) if photographs is None else photographs
    largest, num_off, num_values = 0, 0, 0
    # For each photograph, the sum of the differences and the number of values.
    totals: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for (one, other), photograph in zip(pairs, photographs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == np.uint8, (stage, one.shape, other.shape)
        off = np.abs(one.astype(np.int16) - other)
        largest = max(largest, int(off.max()))
        num_off, num_values = num_off + int((off > 1).sum()), num_values + off.size
        totals[photograph] += off.sum(), off.size
    mean = float(max(total / size for total, size in totals.values()))
    ok = all(limit is None or value <= limit for value, limit in ((largest, tolerance.max), (mean, tolerance.mean)))
    return Row(stage, ours, against, len(pairs), largest, mean, num_off / num_values, str(tolerance), ok)


def not_compared(stage: str, ours: str, against: str, reason: str) -> Row:
    """The row for what cannot run here; it breaks no tolerance."""
    return Row(stage, ours, against, 0, 0, 0.0, 0.0, "", True, note=f"not compared: {reason}")
