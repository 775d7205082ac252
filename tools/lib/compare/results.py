"""What was measured as rows, and as tables, notes and CSV for people."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from pipelines.common.errors import named, with_escaped_bytes
from tools.lib.common.attention import PLAIN_ATTENTION
from tools.lib.common.tables import terminal_table
from tools.lib.compare import ranking
from tools.lib.compare.candidates import Accuracy, Facts
from tools.lib.compare.measuring import Measured, Prepared

_MIB = 1 << 20
# A column's field of Row -> its heading, and the decimals of a number or None for a text.
_COLUMNS: dict[str, tuple[str, int | None]] = {
    "rank": ("", 0),
    "model": ("model", None),
    "top1": ("top-1 %", 1),
    "on_front": ("front", None),
    "images_per_s": ("images/s", 1),
    "min": ("min", 1),
    "max": ("max", 1),
    "spread_percent": ("spread %", 1),
    "latency_ms": ("latency ms", 2),
    "peak_memory_mib": ("peak MiB", 0),
    "parameters_m": ("params M", 2),
    "gmacs": ("GMACs", 3),
    "image_size": ("px", 0),
}
_PAPERS = "*"  # It marks the paper's accuracies.
_UNSURE = "front?"
_MOST_NAMED = 4  # A warning names no more rows than this.


@dataclasses.dataclass(kw_only=True)
class Entry:
    """A model on a backend, whether it could be measured or not.

    Attributes:
      rank: in the backend's order, None if it failed.
      model: what the user calls it; name: timm's name of it; weights: their path, or "random".
      parameters_m: parameters in millions; gmacs: multiply-adds an image in 1e9.
      folded_batch_norms: how many; plain_attention: whether timm's plain attention stands in for the fused one.
      top1: percent, None without an accuracy; top1_from: who says so; top1_is_the_papers: whether the paper does.
      top1_split, top1_digest: the dataset of an evaluation, "" for other accuracies.
    """

    rank: int | None = None
    backend: str
    model: str
    name: str
    weights: str
    image_size: int
    parameters_m: float | None
    gmacs: float | None
    folded_batch_norms: int | None
    plain_attention: bool | None
    top1: float | None
    top1_from: str
    top1_is_the_papers: bool
    top1_split: str
    top1_digest: str


@dataclasses.dataclass(kw_only=True)
class Row(Entry):
    """A model that was measured on a backend.

    Attributes:
      images_per_s, latency_ms: typical values; min, max, latency_min_ms, latency_max_ms: those of single timed runs.
      difference_from_pytorch: as Opened.difference.
      timed_images_per_s, timed_latency_s: of each timed run.
      on_front: whether no other model is faster and as accurate, None without an accuracy.
      front_is_sure: whether it is surely faster than each more accurate one, None where it is not on the front.
    """

    images_per_s: float
    min: float
    max: float
    spread_percent: float
    latency_ms: float
    latency_min_ms: float
    latency_max_ms: float
    peak_memory_mib: float
    precision: str
    batch: int
    calls_at_once: int
    difference_from_pytorch: float
    timed_images_per_s: Sequence[float]
    timed_latency_s: Sequence[float]
    on_front: bool | None = None
    front_is_sure: bool | None = None


@dataclasses.dataclass(kw_only=True)
class FailedRow(Entry):
    """A model that could not be measured on a backend, and why."""

    failed: str


def rows_of(prepared: Prepared, measured: Sequence[Measured]) -> list[Row | FailedRow]:
    """A row for each model on each backend: in each backend's order from fast to slow, then what failed.

    Texts are printable, whatever bytes the names of files hold: rows go to files, pictures and the screen.
    """
    found: list[Row | FailedRow] = []
    for backend in dict.fromkeys(row.backend for row in measured):
        mine = [row for row in measured if row.backend == backend]
        found += _measured_rows(prepared, [row for row in mine if not row.failed])
        found += [_printable(FailedRow(failed=row.failed, **_identity(prepared, row))) for row in mine if row.failed]
    return found


def _measured_rows(prepared: Prepared, measured: Sequence[Measured]) -> list[Row]:
    if not measured:
        return []
    done = {row.model.label: row for row in measured}
    speeds = {label: row.speeds for label, row in done.items()}
    usual = ranking.typical(speeds)
    latencies = ranking.typical({label: row.latencies for label, row in done.items()})
    rows = []
    for label, rank in ranking.ranked(speeds).items():
        row = done[label]
        assert row.opened is not None  # Nothing is measured before it was opened.
        rows.append(
            _printable(
                Row(
                    rank=rank,
                    **_identity(prepared, row),
                    images_per_s=usual[label],
                    min=min(row.speeds),
                    max=max(row.speeds),
                    spread_percent=100 * ranking.spread(row.speeds),
                    latency_ms=1e3 * latencies[label],
                    latency_min_ms=1e3 * min(row.latencies),
                    latency_max_ms=1e3 * max(row.latencies),
                    peak_memory_mib=row.opened.memory / _MIB,
                    precision=row.opened.precision,
                    batch=row.opened.batch,
                    calls_at_once=row.opened.at_once,
                    difference_from_pytorch=row.opened.difference,
                    timed_images_per_s=row.speeds,
                    timed_latency_s=row.latencies,
                )
            )
        )
    mark_front(rows)
    return rows


EntryType = TypeVar("EntryType", Row, FailedRow)


def _printable(row: EntryType) -> EntryType:
    texts = {key: value for key, value in dataclasses.asdict(row).items() if isinstance(value, str)}
    return dataclasses.replace(row, **{key: with_escaped_bytes(text) for key, text in texts.items()})


def _identity(prepared: Prepared, row: Measured) -> dict[str, Any]:
    """The fields of Entry but for its rank, which do not depend on the measurement."""
    model, accuracy = row.model, row.model.accuracy
    found = prepared[model]
    facts = found if isinstance(found, Facts) else None
    return {
        "backend": row.backend.name,
        "model": model.label,
        "name": model.name,
        "weights": str(model.path) if model.path else "random",
        "image_size": model.image_size,
        "parameters_m": facts.parameters / 1e6 if facts else None,
        "gmacs": facts.gmacs if facts else None,
        "folded_batch_norms": facts.folded if facts else None,
        "plain_attention": row.backend.file in facts.plain_attention if facts else None,
        "top1": accuracy.top1 if accuracy else None,
        "top1_from": _origin(accuracy),
        "top1_is_the_papers": bool(accuracy and accuracy.published),
        "top1_split": accuracy.split if accuracy else "",
        "top1_digest": accuracy.digest if accuracy else "",
    }


def _origin(accuracy: Accuracy | None) -> str:
    """Who says that a model has this accuracy."""
    if accuracy is None:
        return ""
    return f"published, {accuracy.said_by}" if accuracy.published else accuracy.said_by


def mark_front(rows: Sequence[Row]) -> None:
    """Mark the front of the speeds that are shown, and which of its models surely belong there."""
    known = [(row.top1, row) for row in rows if row.top1 is not None]
    front = ranking.pareto_front([(top1, row.images_per_s) for top1, row in known])
    for (top1, row), row.on_front in zip(known, front, strict=True):
        if row.on_front:
            row.front_is_sure = all(
                ranking.surely_faster(row.timed_images_per_s, other.timed_images_per_s)
                for other_top1, other in known
                if other_top1 > top1
            )


def by_backend(rows: Sequence[Row | FailedRow]) -> dict[str, list[Row]]:
    """The rows that were measured, of each backend that has some."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, Row):
            groups.setdefault(row.backend, []).append(row)
    return groups


def settings_in_words(rows: Sequence[Row]) -> str:
    """A backend's precision, batch and calls at once, in words."""
    precisions = "/".join(sorted({row.precision for row in rows}))
    at_once = f", {rows[0].calls_at_once} at once" if rows[0].calls_at_once > 1 else ""
    return f"{precisions}, batch {rows[0].batch}{at_once}"


def tables(rows: Sequence[Row | FailedRow]) -> list[Table]:
    """A table for each backend, and one of what failed."""
    found = []
    for backend, mine in by_backend(rows).items():
        shown = {key: each for key, each in _COLUMNS.items() if any(getattr(row, key) is not None for row in mine)}
        ranks = [row.rank for row in mine]
        cells = [
            [_cell(row, key, decimals, tied=ranks.count(row.rank) > 1) for key, (_, decimals) in shown.items()]
            for row in mine
        ]
        words = [number for number, (_, decimals) in enumerate(shown.values()) if decimals is None]
        headings = [heading for heading, _ in shown.values()]
        found.append(terminal_table(headings, cells, text=words, title=f"{backend}: {settings_in_words(mine)}"))
    if failed := [row for row in rows if isinstance(row, FailedRow)]:
        texts = [(Text(row.backend), Text(row.model), Text(row.failed)) for row in failed]
        found.append(terminal_table(("backend", "model", "reason"), texts, text=(0, 1, 2), title="failed"))
    return found


def _cell(row: Row, key: str, decimals: int | None, *, tied: bool) -> str | Text:
    value = getattr(row, key)
    if value is None:
        return ""
    if key == "on_front":
        return ("front" if row.front_is_sure else _UNSURE) if value else ""
    if decimals is None:
        return Text(value)  # A path may hold what looks like markup.
    text = f"{value:,.{decimals}f}"
    if key == "rank":
        return f"{text}=" if tied else text
    return text + _PAPERS if key == "top1" and row.top1_is_the_papers else text


def notes(rows: Sequence[Row | FailedRow]) -> list[str]:
    """What must be known to read the tables."""
    found, groups = [], by_backend(rows)
    for backend, mine in groups.items():
        ranks = {row.model: row.rank for row in mine if row.rank is not None}
        found.append(f"{backend}, from fast to slow: {ranking.order_line(ranks)}")
    measured = [row for group in groups.values() for row in group]
    if any(len({row.rank for row in mine}) < len(mine) for mine in groups.values()):
        found.append(_about_ties(len(measured[0].timed_images_per_s)))
    if any(row.front_is_sure is False for row in measured):
        found.append(f"{_UNSURE} on the front by its speed as shown, not surely faster than each more accurate model")
    if published := [row for row in measured if row.top1_is_the_papers]:
        source = published[0].top1_from.removeprefix("published, ")
        found.append(f"{_PAPERS} published by the paper ({source}), not measured here")
        found += _about_other_images(measured)
    if any(row.backend == "openvino" for row in measured):
        precisions = ", ".join(sorted({row.precision for row in measured if row.backend == "openvino"}))
        found.append(f"openvino: FP16 weights; FP16 was asked for, this CPU computes in {precisions}")
    if plain := [f"{row.model} ({row.backend})" for row in measured if row.plain_attention]:
        found.append(f"{PLAIN_ATTENTION}: {named(plain)}")
    if any(row.top1 is None for row in measured):
        found.append("models without an accuracy are on no front and in no picture; --accuracy FILE gives one")
    return found + _warnings(measured)


def _about_ties(rounds: int) -> str:
    if rounds < ranking.FEWEST_ROUNDS:
        return (
            f"= not tested: fewer than {ranking.FEWEST_ROUNDS} rounds say nothing about the order. "
            f"Use --repeats {ranking.FEWEST_ROUNDS} or more"
        )
    return f"= too close to call: the speeds do not surely differ by more than {ranking.MARGIN:.0%}"


def _about_other_images(rows: Sequence[Row]) -> list[str]:
    """A note that the paper's accuracies may be of other images than the evaluations beside them."""
    evaluated = next((row for row in rows if row.top1_digest), None)
    if evaluated is None:
        return []
    return [
        f"{_PAPERS} is of ImageNet's validation images; the evaluations are of split '{evaluated.top1_split}' with "
        f"digest {evaluated.top1_digest[:12]}: compare them only if these are the same images"
    ]


def _warnings(rows: Sequence[Row]) -> list[str]:
    noisy = [row for row in rows if row.spread_percent > 100 * ranking.NOISY]
    if not noisy:
        return []
    typical = statistics.median(row.spread_percent for row in rows)
    names = ", ".join(f"{row.model} ({row.backend})" for row in noisy[:_MOST_NAMED])
    more = ", ..." if len(noisy) > _MOST_NAMED else ""
    return [
        f"warning: the speed of {len(noisy)} of {len(rows)} rows varied by more than {ranking.NOISY:.0%} between timed "
        f"runs ({names}{more}; {typical:.0f} % is usual here). Let nothing else run, or use more --repeats"
    ]


def as_csv(rows: Sequence[Row | FailedRow]) -> str:
    """The rows without their single timed runs."""
    values = [dataclasses.asdict(row) for row in rows]
    keys = list(dict.fromkeys(key for row in values for key in row if not key.startswith("timed_")))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in values)
    return text.getvalue()


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value
