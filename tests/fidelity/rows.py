"""A row of the report: one comparison, and how it is decided whether it holds."""

import dataclasses

import numpy as np
from scipy import stats

# Draws of equal distributions are below this once in 10,000 rows. The seeds are fixed, so a row that holds will hold.
SMALLEST_P = 1e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one comparison.

    Attributes:
      what: is compared.
      ours, theirs: the functions or classes that were called.
      compared: how many values.
      difference: the largest one, or the p value of a test, as text.
      tolerance: the allowed difference, as text.
      ok: whether it was kept.
      note: a remark for the end of the report.
    """

    what: str
    ours: str
    theirs: str
    compared: int
    difference: str
    tolerance: str
    ok: bool
    note: str = ""


def within(
    what: str,
    names: tuple[str, str],
    ours: np.ndarray,
    theirs: np.ndarray,
    tolerance: float = 0.0,
    *,
    relative: bool = False,
    note: str = "",
) -> Row:
    """Compare numbers one by one.

    Args:
      names: the names of our side and of theirs.
      ours, theirs: of the same shape.
      tolerance: the largest absolute difference that is allowed; 0 asks for equality.
      relative: the difference is divided by the largest absolute value of theirs.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.size, (what, ours.shape, theirs.shape)
    largest = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
    if relative:
        largest /= float(np.abs(theirs).max())
    allowed = "equal" if tolerance == 0 else f"{tolerance:g}{' of the largest' if relative else ''}"
    return Row(what, *names, ours.size, f"{largest:.2g}", allowed, largest <= tolerance, note)


def alike(what: str, names: tuple[str, str], ours: np.ndarray, theirs: np.ndarray, note: str = "") -> Row:
    """Test whether two samples [n] come from one distribution (Kolmogorov and Smirnov's test)."""
    return _tested(what, names, len(ours), stats.ks_2samp(ours, theirs).pvalue, note)


def as_often(what: str, names: tuple[str, str], ours: np.ndarray, theirs: np.ndarray, note: str = "") -> Row:
    """Test whether two lists of counts, of the same events, have one distribution (a chi-squared test)."""
    counts = np.stack([np.ravel(ours), np.ravel(theirs)])
    counts = counts[:, counts.any(axis=0)]
    return _tested(what, names, int(np.sum(ours)), stats.chi2_contingency(counts).pvalue, note)


def _tested(what: str, names: tuple[str, str], count: int, p: float, note: str) -> Row:
    return Row(what, *names, count, f"p {p:.2g}", f"p > {SMALLEST_P:g}", bool(p > SMALLEST_P), note)
