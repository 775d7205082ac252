"""What was measured as rows, and as tables, notes and CSV for people."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from pipelines.common.errors import named
from tools.lib.common.attention import PLAIN_ATTENTION
from tools.lib.common.front import BEHIND, FRONT, PERHAPS, pareto_front
from tools.lib.common.tables import terminal_table
from tools.lib.compare import ranking
from tools.lib.compare.measuring import Measured, Opened

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


@dataclasses.dataclass(kw_only=True)
class Row(Opened):
    """A model that was measured on a backend.

    Attributes:
      rank: in the backend's order.
      model: what the user calls it; name: timm's name of it; weights: the word that names them, or "random".
      parameters_m, gmacs: as Facts; plain_attention: whether timm's plain attention stands in for the fused one.
      top1: percent, None without an accuracy; top1_from: who says so; top1_is_the_papers: whether the paper does.
      top1_split, top1_digest: the dataset of an evaluation, "" for other accuracies.
      images_per_s, latency_ms: typical values; min, max, latency_min_ms, latency_max_ms: those of single timed runs.
      timed_images_per_s, timed_latency_s: of each timed run.
      on_front: whether no other model is faster and as accurate, None without an accuracy.
      front_is_sure: whether it is surely faster than each more accurate one, None where it is not on the front.
    """

    rank: int
    backend: str
    model: str
    name: str
    weights: str
    image_size: int
    parameters_m: float
    gmacs: float
    plain_attention: bool
    top1: float | None
    top1_from: str
    top1_is_the_papers: bool
    top1_split: str
    top1_digest: str
    images_per_s: float
    min: float
    max: float
    spread_percent: float
    latency_ms: float
    latency_min_ms: float
    latency_max_ms: float
    timed_images_per_s: Sequence[float]
    timed_latency_s: Sequence[float]
    on_front: bool | None = None
    front_is_sure: bool | None = None

    @property
    def front(self) -> str:
        """As front.Point describes it."""
        return (FRONT if self.front_is_sure else PERHAPS) if self.on_front else BEHIND


@dataclasses.dataclass
class FailedRow:
    """A model that could not be measured on a backend, and why."""

    backend: str
    model: str
    failed: str


def rows_of(measured: Sequence[Measured]) -> tuple[list[Row], list[FailedRow]]:
    """A row for each model on each backend, in each backend's order from fast to slow, and what failed."""
    rows = []
    for backend in dict.fromkeys(each.backend.name for each in measured):
        done = {each.model.label: each for each in measured if each.backend.name == backend and not each.failed}
        if not done:
            continue
        speeds = {label: each.speeds for label, each in done.items()}
        usual = ranking.typical(speeds)
        latencies = ranking.typical({label: each.latencies for label, each in done.items()})
        mine = [
            _row(done[label], rank, usual[label], latencies[label]) for label, rank in ranking.ranked(speeds).items()
        ]
        mark_front(mine)
        rows += mine
    failed = [FailedRow(each.backend.name, each.model.label, each.failed) for each in measured if each.failed]
    return rows, failed


def _row(measured: Measured, rank: int, images_per_s: float, latency_s: float) -> Row:
    model, accuracy, facts = measured.model, measured.model.accuracy, measured.facts
    assert measured.opened is not None and facts is not None  # Nothing is measured before it was opened.
    said_by = "" if accuracy is None else accuracy.said_by
    return Row(
        **dataclasses.asdict(measured.opened),
        rank=rank,
        backend=measured.backend.name,
        model=model.label,
        name=model.name,
        weights=model.label if model.weights else "random",
        image_size=model.image_size,
        parameters_m=facts.parameters_m,
        gmacs=facts.gmacs,
        plain_attention=measured.backend.file in facts.plain_attention,
        top1=accuracy.top1 if accuracy else None,
        top1_from=f"published, {said_by}" if accuracy and accuracy.published else said_by,
        top1_is_the_papers=bool(accuracy and accuracy.published),
        top1_split=accuracy.split if accuracy else "",
        top1_digest=accuracy.digest if accuracy else "",
        images_per_s=images_per_s,
        min=min(measured.speeds),
        max=max(measured.speeds),
        spread_percent=100 * ranking.spread(measured.speeds),
        latency_ms=1e3 * latency_s,
        latency_min_ms=1e3 * min(measured.latencies),
        latency_max_ms=1e3 * max(measured.latencies),
        timed_images_per_s=measured.speeds,
        timed_latency_s=measured.latencies,
    )


def mark_front(rows: Sequence[Row]) -> None:
    """Mark the front of the speeds that are shown, and which of its models surely belong there."""
    known = [(row.top1, row) for row in rows if row.top1 is not None]
    front = pareto_front([(top1, row.images_per_s) for top1, row in known])
    for (top1, row), is_on_front in zip(known, front, strict=True):
        row.on_front = is_on_front
        if is_on_front:
            row.front_is_sure = all(
                ranking.surely_faster(row.timed_images_per_s, other.timed_images_per_s)
                for other_top1, other in known
                if other_top1 > top1
            )


def by_backend(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each backend that has some."""
    return {name: [row for row in rows if row.backend == name] for name in dict.fromkeys(row.backend for row in rows)}


def settings_in_words(rows: Sequence[Row]) -> str:
    """A backend's name, precision, batch and calls at once, in words."""
    precisions = "/".join(sorted({row.precision for row in rows}))
    at_once = f", {rows[0].calls_at_once} at once" if rows[0].calls_at_once > 1 else ""
    return f"{rows[0].backend}: {precisions}, batch {rows[0].batch}{at_once}"


def tables(rows: Sequence[Row], failed: Sequence[FailedRow]) -> list[Table]:
    """A table for each backend, and one of what failed."""
    headings = [heading for heading, _ in _COLUMNS.values()]
    words = [number for number, (_, decimals) in enumerate(_COLUMNS.values()) if decimals is None]
    found = []
    for mine in by_backend(rows).values():
        cells = [[_cell(row, key, decimals) for key, (_, decimals) in _COLUMNS.items()] for row in mine]
        found.append(terminal_table(headings, cells, text=words, title=settings_in_words(mine)))
    if failed:
        texts = [(Text(row.backend), Text(row.model), Text(row.failed)) for row in failed]
        found.append(terminal_table(("backend", "model", "reason"), texts, text=(0, 1, 2), title="failed"))
    return found


def _cell(row: Row, key: str, decimals: int | None) -> str | Text:
    value = getattr(row, key)
    if key == "on_front":
        return row.front
    if value is None:
        return ""
    if decimals is None:
        return Text(value)  # A path may hold what looks like markup.
    return f"{value:,.{decimals}f}{_PAPERS if key == 'top1' and row.top1_is_the_papers else ''}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What must be known to read the tables."""
    found = []
    for backend, mine in by_backend(rows).items():
        if len(mine[0].timed_images_per_s) < ranking.FEWEST_ROUNDS:
            found.append(f"{backend}: the order is not tested. Use --repeats {ranking.FEWEST_ROUNDS} or more")
        else:
            order = ranking.order_line({row.model: row.rank for row in mine})
            found.append(f"{backend}, from fast to slow (= the speeds are too close to call): {order}")
    if any(row.front_is_sure is False for row in rows):
        found.append(f"{PERHAPS} on the front by its speed as shown, not surely faster than each more accurate model")
    evaluated = [row for row in rows if row.top1_digest]
    if published := [row for row in rows if row.top1_is_the_papers]:
        found.append(
            f"{_PAPERS} {published[0].top1_from}: by the paper, on ImageNet's validation images, not measured here"
        )
        if evaluated:
            found.append(
                f"evaluations are of split '{evaluated[0].top1_split}' with digest {evaluated[0].top1_digest[:12]}: "
                f"compare them with {_PAPERS} only if these are the same images"
            )
    if plain := [f"{row.model} ({row.backend})" for row in rows if row.plain_attention]:
        found.append(f"{PLAIN_ATTENTION}: {named(plain)}")
    if any(row.top1 is None for row in rows):
        found.append("models without an accuracy are on no front and in no picture; --accuracy FILE gives one")
    if noisy := [f"{row.model} ({row.backend})" for row in rows if row.spread_percent > 100 * ranking.NOISY]:
        found.append(
            f"warning: the speed of {len(noisy)} of {len(rows)} rows varied by more than {ranking.NOISY:.0%} between "
            f"timed runs: {named(noisy, most=4)}. Let nothing else run, or use more --repeats"
        )
    return found


def as_csv(rows: Sequence[Row], failed: Sequence[FailedRow]) -> str:
    """The rows without their single timed runs, and what failed."""
    keys = [field.name for field in dataclasses.fields(Row) if not field.name.startswith("timed_")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*keys, "failed"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in (*rows, *failed):
        values = dataclasses.asdict(row)
        writer.writerow({key: f"{each:.5g}" if isinstance(each, float) else each for key, each in values.items()})
    return text.getvalue()
