"""The result of a benchmark: its rows, the file that keeps them, and the tables that show them."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from pipelines.common.errors import UserError
from tools.lib.common.hardware import Machine, machine
from tools.lib.common.tables import markdown_table


class Measured(TypedDict, total=False):
    """What a row may hold besides its name; each benchmark fills in what it measures.

    Rows of the same `augmentation` or `setting` are a table. `ratio` is the speed over that of the row named by `of`;
    `note` says what there is to say about the row, such as why it was not measured.
    """

    augmentation: str
    setting: str
    note: str
    images_per_s: float
    min: float
    max: float
    ms: float
    cpu_ms: float
    peak_mib: int
    ratio: float
    of: str
    overhead: float
    input_wait: float
    built_s: float


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


# The columns of tables in their order. Older files have others, which follow under the names of their values.
_HEADINGS = {
    "what": "what",
    "images_per_s": "images/s",
    "min": "min",
    "max": "max",
    "ms": "ms an update",
    "cpu_ms": "of processor time",
    "peak_mib": "MiB",
    "ratio": "ratio",
    "of": "of",
    "overhead": "overhead",
    "input_wait": "waiting for input",
    "built_s": "built in, s",
}
_TEXT = ("what", "of")  # The other columns hold numbers.
# These stand above or below a table, the later ones only in older files.
_NO_COLUMNS = {
    *("augmentation", "setting", "note", "model", "teacher", "batch", "size", "precision", "compiled", "updates"),
}


def new_result(name: str, options: Mapping[str, object]) -> Result:
    """The result of a benchmark that has measured nothing yet on this machine."""
    return {
        "benchmark": name,
        "options": dict(options),
        "date": datetime.date.today().isoformat(),
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
    if not isinstance(result, dict) or not result.keys() >= Result.__required_keys__:
        raise UserError(f"{path}: not a result of tools/benchmark.py. Give a file that --json wrote")
    return cast(Result, result)  # This program wrote it.


def markdown(result: Result) -> str:
    """Where and when a result was measured, its tables, and what there is to say about single rows."""
    versions = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    cut_off = "" if result["complete"] else " Cut off before its end."
    lines = [f"`python tools/benchmark.py {command_line(result)}`, {result['date']}: {versions}.{cut_off}", ""]
    tables: dict[str, list[Row]] = {}
    for row in result["rows"]:
        tables.setdefault(title(row), []).append(row)
    for name, rows in tables.items():
        lines += [*_table(name, rows), ""]
    notes = [f"- {row['what']}: {row['note']}" for row in result["rows"] if "note" in row]
    return "\n".join([*lines, *dict.fromkeys(notes)]).rstrip() + "\n"


def title(row: Row) -> str:
    """The title of the table that a row belongs to; benchmarks of one table have none."""
    return row.get("augmentation", row.get("setting", ""))


def command_line(result: Result) -> str:
    """The subcommand and options that a result came from."""
    words = [result["benchmark"]]
    for name, value in result["options"].items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return " ".join(words)


def _table(name: str, rows: Sequence[Row]) -> list[str]:
    """A table with the columns in which one of the rows has something."""
    used = {key for row in rows for key, value in row.items() if value is not None} - _NO_COLUMNS
    columns = {key: _HEADINGS.get(key, key) for key in (*_HEADINGS, *rows[0]) if key in used}
    text = [number for number, key in enumerate(columns) if key in _TEXT]
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    return markdown_table([name or "what", *list(columns.values())[1:]], cells, text=text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
