"""What was measured as rows, and as tables, notes and CSV for people."""

import csv
import io
import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from pipelines.common.errors import named, with_escaped_bytes
from tools.lib.common.attention import PLAIN_ATTENTION
from tools.lib.compare import ranking
from tools.lib.compare.candidates import Accuracy, Facts
from tools.lib.compare.measuring import Measured, Prepared

_MIB = 1 << 20
_COLUMNS = {  # key of a row -> heading, decimals
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
_PAPERS = "*"  # marks the paper's accuracies
_UNSURE = "front?"


def rows_of(prepared: Prepared, measured: Sequence[Measured]) -> list[dict]:
    """A row for each model on each backend: in each backend's order from fast to slow, then what failed.

    Texts are printable, whatever bytes the names of files hold: rows go to files, pictures and the screen.
    """
    found = []
    for backend in dict.fromkeys(row.backend for row in measured):
        mine = [row for row in measured if row.backend == backend]
        found += _of_backend(prepared, mine)
    return [
        {key: with_escaped_bytes(part) if isinstance(part, str) else part for key, part in row.items()} for row in found
    ]


def _of_backend(prepared: Prepared, measured: Sequence[Measured]) -> list[dict]:
    done = {row.model.label: row for row in measured if not row.failed}
    speeds = {label: row.speeds for label, row in done.items()}
    ranks = ranking.ranked(speeds) if done else {}
    usual = ranking.typical(speeds) if done else {}
    latencies = ranking.typical({label: row.latencies for label, row in done.items()}) if done else {}
    rows = []
    for label, rank in ranks.items():
        numbers = _numbers(done[label], usual[label], latencies[label])
        rows.append({"rank": rank, **_identity(prepared, done[label]), **numbers})
    _mark_front(rows)
    failed = [{"rank": None, **_identity(prepared, row), "failed": row.failed} for row in measured if row.failed]
    return rows + failed


def _identity(prepared: Prepared, row: Measured) -> dict:
    """What does not depend on the measurement."""
    model, facts = row.model, prepared[row.model]
    accuracy = model.accuracy
    return {
        "backend": row.backend.name,
        "model": model.label,
        "name": model.name,
        "weights": str(model.path) if model.path else "random",
        "image_size": model.image_size,
        "parameters_m": facts.parameters / 1e6 if isinstance(facts, Facts) else None,
        "gmacs": facts.gmacs if isinstance(facts, Facts) else None,
        "folded_batch_norms": facts.folded if isinstance(facts, Facts) else None,
        "plain_attention": row.backend.file in facts.plain_attention if isinstance(facts, Facts) else None,
        "top1": accuracy.top1 if accuracy else None,
        "top1_from": _said_by(accuracy),
        "top1_is_the_papers": bool(accuracy and accuracy.published),
        "top1_split": accuracy.split if accuracy else "",
        "top1_digest": accuracy.digest if accuracy else "",
    }


def _said_by(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    return f"published, {accuracy.said_by}" if accuracy.published else accuracy.said_by


def _numbers(row: Measured, images_per_s: float, latency_s: float) -> dict:
    return {
        "images_per_s": images_per_s,
        "min": min(row.speeds),
        "max": max(row.speeds),
        "spread_percent": 100 * ranking.spread(row.speeds),
        "latency_ms": 1e3 * latency_s,
        "latency_min_ms": 1e3 * min(row.latencies),
        "latency_max_ms": 1e3 * max(row.latencies),
        "peak_memory_mib": row.opened.memory / _MIB,
        "precision": row.opened.precision,
        "batch": row.opened.batch,
        "calls_at_once": row.opened.at_once,
        "difference_from_pytorch": row.opened.difference,
        "turns_images_per_s": row.speeds,
        "turns_latency_s": row.latencies,
    }


def _mark_front(rows: list[dict]) -> None:
    """The front of the speeds that are shown, and which of its models are surely faster than each more accurate one."""
    known = [row for row in rows if row["top1"] is not None]
    front = ranking.pareto_front([(row["top1"], row["images_per_s"]) for row in known])
    for row in rows:
        row["on_front"] = row["front_is_sure"] = None
    for row, is_on in zip(known, front, strict=True):
        row["on_front"] = is_on
        if is_on:
            row["front_is_sure"] = all(
                ranking.surely_faster(row["turns_images_per_s"], other["turns_images_per_s"])
                for other in known
                if other["top1"] > row["top1"]
            )


def by_backend(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows that were measured, of each backend that has some."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if "failed" not in row:
            groups.setdefault(row["backend"], []).append(row)
    return groups


def how(rows: Sequence[dict]) -> str:
    """How a backend ran, in words."""
    row = rows[0]
    precisions = "/".join(sorted({row["precision"] for row in rows}))
    at_once = f", {row['calls_at_once']} at once" if row["calls_at_once"] > 1 else ""
    return f"{precisions}, batch {row['batch']}{at_once}"


def tables(rows: Sequence[dict]) -> list[Table]:
    """A table for each backend, and one of what failed."""
    found = []
    for backend, mine in by_backend(rows).items():
        shown = {key: each for key, each in _COLUMNS.items() if any(row[key] is not None for row in mine)}
        found.append(table := Table(title=f"{backend}: {how(mine)}", title_justify="left", box=box.SIMPLE_HEAD))
        for heading, decimals in shown.values():
            table.add_column(heading, justify="left" if decimals is None else "right")
        for row in mine:
            tied = sum(other["rank"] == row["rank"] for other in mine) > 1
            table.add_row(*(_cell(row, key, decimals, tied) for key, (_, decimals) in shown.items()))
    if failed := [row for row in rows if "failed" in row]:
        found.append(table := Table(title="failed", title_justify="left", box=box.SIMPLE_HEAD))
        for heading in ("backend", "model", "reason"):
            table.add_column(heading, overflow="fold")
        for row in failed:
            table.add_row(*(Text(row[key]) for key in ("backend", "model", "failed")))
    return found


def _cell(row: dict, key: str, decimals: int | None, tied: bool) -> str | Text:
    value = row[key]
    if value is None:
        return ""
    if key == "on_front":
        return ("front" if row["front_is_sure"] else _UNSURE) if value else ""
    if decimals is None:
        return Text(value)  # not markup, whatever a path holds
    text = f"{value:,.{decimals}f}"
    if key == "rank":
        return f"{text}=" if tied else text
    return text + _PAPERS if key == "top1" and row["top1_is_the_papers"] else text


def notes(rows: Sequence[dict]) -> list[str]:
    """What must be known to read the tables."""
    found = []
    for backend, mine in by_backend(rows).items():
        found.append(f"{backend}, from fast to slow: {ranking.order_line({row['model']: row['rank'] for row in mine})}")
    measured = [row for group in by_backend(rows).values() for row in group]
    if any(row["rank"] == other["rank"] for row in measured for other in measured if _are_rivals(row, other)):
        found.append(_about_ties(len(measured[0]["turns_images_per_s"])))
    if any(row["front_is_sure"] is False for row in measured):
        found.append(f"{_UNSURE} on the front by its speed as shown, not surely faster than each more accurate model")
    if any(row["top1_is_the_papers"] for row in measured):
        found.append(f"{_PAPERS} published by the paper ({_first_source(measured)}), not measured here")
        found += _about_other_images(measured)
    if any(row["backend"] == "openvino" for row in measured):
        precisions = ", ".join(sorted({row["precision"] for row in measured if row["backend"] == "openvino"}))
        found.append(f"openvino: FP16 weights; FP16 was asked for, this CPU computes in {precisions}")
    if plain := [f"{row['model']} ({row['backend']})" for row in measured if row["plain_attention"]]:
        found.append(f"{PLAIN_ATTENTION}: {named(plain)}")
    if any(row["top1"] is None for row in measured):
        found.append("models without an accuracy are on no front and in no picture; --accuracy FILE gives one")
    return found + _warnings(measured)


def _about_ties(rounds: int) -> str:
    if rounds < ranking.FEWEST_ROUNDS:
        return (
            f"= not tested: of fewer than {ranking.FEWEST_ROUNDS} rounds nothing can be said of the order. "
            f"Use --repeats {ranking.FEWEST_ROUNDS} or more"
        )
    return f"= cannot be told apart: the speeds do not surely differ by more than {ranking.MARGIN:.0%}"


def _about_other_images(rows: Sequence[dict]) -> list[str]:
    """That the paper's accuracies may be of other images than the evaluations beside them."""
    evaluated = next((row for row in rows if row["top1_digest"]), None)
    if evaluated is None:
        return []
    return [
        f"{_PAPERS} is of ImageNet's validation images; the evaluations are of split '{evaluated['top1_split']}' with "
        f"digest {evaluated['top1_digest'][:12]}: compare them only if these are the same images"
    ]


def _are_rivals(row: dict, other: dict) -> bool:
    return row is not other and row["backend"] == other["backend"]


def _first_source(rows: Sequence[dict]) -> str:
    return next(row["top1_from"] for row in rows if row["top1_is_the_papers"]).removeprefix("published, ")


def _warnings(rows: Sequence[dict]) -> list[str]:
    noisy = [row for row in rows if row["spread_percent"] > 100 * ranking.NOISY]
    if not noisy:
        return []
    typical = statistics.median(row["spread_percent"] for row in rows)
    names = ", ".join(f"{row['model']} ({row['backend']})" for row in noisy[:4]) + (", ..." if len(noisy) > 4 else "")
    return [
        f"warning: the speed of {len(noisy)} of {len(rows)} rows varied by more than {ranking.NOISY:.0%} between turns "
        f"({names}; {typical:.0f} % is usual here). Let nothing else run, or use more --repeats"
    ]


def as_csv(rows: Sequence[dict]) -> str:
    """The rows without their single turns."""
    keys = list(dict.fromkeys(key for row in rows for key in row if not key.startswith("turns_")))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value
