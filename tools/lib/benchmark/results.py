"""The result of a benchmark: its rows, the file that keeps them, and the tables that show them."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from rich.table import Table

from pipelines.common.errors import UserError
from tools.lib.common.hardware import Machine, machine
from tools.lib.common.tables import markdown_table, terminal_table


class Measured(TypedDict, total=False):
    """What a row may hold besides its name; each benchmark fills in what it measures.

    Rows of the same `augmentation` or `setting` are a table. `ratio` is the speed over that of the row named by `of`;
    `note` says what there is to say about the row, such as why it was not measured.
    """

    augmentation: str
    setting: str
    note: str
    images_per_s: float
    seconds: float
    min: float
    max: float
    ratio: float
    of: str
    ms: float
    updates: int
    peak_mib: int | None
    overhead: float
    input_wait: float
    built_s: float
    works: str
    kl: float
    kl_max: float
    agreement: float
    model: str
    teacher: str | None
    batch: int
    size: int
    precision: str
    compiled: bool


class Row(Measured):
    """A row of a table."""

    what: str


class Result(TypedDict):
    """What a benchmark writes with --json; it is not `complete` where the benchmark was cut off."""

    benchmark: str
    options: dict[str, object]
    date: str
    machine: Machine
    complete: bool
    rows: list[Row]


# Columns of every table of speeds; others may follow.
SPEED_COLUMNS = {
    "what": "what",
    "images_per_s": "images/s",
    "min": "min",
    "max": "max",
    "ratio": "ratio",
    "of": "of",
}
_TEXT = ("what", "of")  # The other columns hold numbers.


def new_result(name: str, options: Mapping[str, object]) -> Result:
    """The result of a benchmark that has measured nothing yet on this machine."""
    day = datetime.date.today().isoformat()
    return {
        "benchmark": name,
        "options": dict(options),
        "date": day,
        "machine": machine(),
        "complete": False,
        "rows": [],
    }


def save(result: Result, path: Path | None) -> None:
    """Write a result to its file, if it has one."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> Result:
    """Read what `save` wrote.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        result: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a file that --json wrote") from error
    if not isinstance(result, dict) or "benchmark" not in result:
        raise UserError(f"{path}: not a result of tools/benchmark.py. Give a file that --json wrote")
    return cast(Result, result)  # This program wrote it.


def progress_line(row: Row, columns: Mapping[str, str]) -> str:
    """A row in a line: its table, its name, and what was measured."""
    numbers = [f"{heading} {_cell(row[key])}" for key, heading in columns.items() if key in row and key not in _TEXT]
    what = ", ".join(text for text in (row.get("augmentation", row.get("setting")), row["what"]) if text)
    return f"{what}: {', '.join(numbers) or row.get('note', '')}"


def terminal_tables(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Table]:
    """The tables for the terminal; `columns`: key of a row -> heading."""
    found = []
    for title, members in _groups(rows).items():
        shown = _used(members, columns)
        found.append(terminal_table(list(shown.values()), _cells(members, shown), text=_text(shown), title=title))
    return found


def markdown(result: Result, columns: Mapping[str, str]) -> str:
    """A result for a document: where and when it was measured, then its tables. Columns as for `terminal_tables`."""
    versions = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    cut_off = "" if result["complete"] else " Cut off before its end."
    lines = [f"`python tools/benchmark.py {command_line(result)}`, {result['date']}: {versions}.{cut_off}", ""]
    for title, members in _groups(result["rows"]).items():
        shown = _used(members, columns)
        headings = [title or "what", *list(shown.values())[1:]]
        lines += [*markdown_table(headings, _cells(members, shown), text=_text(shown)), ""]
    lines += [f"- {note}" for note in notes(result["rows"])]
    return "\n".join(lines).rstrip() + "\n"


def notes(rows: Sequence[Row]) -> list[str]:
    """What there is to say about single rows, each once."""
    return list(dict.fromkeys(f"{row['what']}: {row['note']}" for row in rows if "note" in row))


def command_line(result: Result) -> str:
    """The subcommand and options that a result came from."""
    words = [result["benchmark"]]
    for name, value in result["options"].items():
        words += [f"--{name}", *(value if isinstance(value, (list, tuple)) else [str(value)])]
    return " ".join(words)


def _groups(rows: Sequence[Row]) -> dict[str | None, list[Row]]:
    """The rows of each table by its title; benchmarks of one table have no title."""
    groups: dict[str | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("augmentation", row.get("setting")), []).append(row)
    return groups


def _used(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """The columns in which one of the rows has something."""
    return {key: heading for key, heading in columns.items() if any(row.get(key) is not None for row in rows)}


def _text(columns: Mapping[str, str]) -> list[int]:
    return [number for number, key in enumerate(columns) if key in _TEXT]


def _cells(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    return [[_cell(row.get(key)) for key in columns] for row in rows]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
