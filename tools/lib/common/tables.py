"""The rows of a benchmark as tables: for the terminal, and in Markdown for a document."""

from rich import box
from rich.table import Table

_TEXT = ("what", "of")  # the other columns are numbers
_TITLES = ("augmentation", "setting")  # rows that have the same of these are a table


def for_terminal(rows: list[dict], columns: dict[str, str]) -> list[Table]:
    """A table for each group of rows; `columns`: key of a row -> heading."""
    tables = []
    for title, members, shown in _groups(rows, columns):
        tables.append(table := Table(title=title, title_justify="left", box=box.SIMPLE_HEAD))
        for key, heading in shown.items():
            table.add_column(heading, justify="left" if key in _TEXT else "right")
        for row in members:
            table.add_row(*(_cell(row.get(key)) for key in shown))
    return tables


def markdown(result: dict, columns: dict[str, str]) -> str:
    """A result as text for a document: where and when it was measured, then its tables."""
    versions = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    cut_off = "" if result["complete"] else " Cut off before its end."
    lines = [f"`python tools/benchmark.py {command_line(result)}`, {result['date']}: {versions}.{cut_off}", ""]
    for title, members, shown in _groups(result["rows"], columns):
        lines += [_line([title or shown["what"], *list(shown.values())[1:]])]
        lines += ["|" + "|".join("---" if key in _TEXT else "--:" for key in shown) + "|"]
        lines += [_line([_cell(row.get(key)) for key in shown]) for row in members] + [""]
    lines += [f"- {note}" for note in notes(result["rows"])]
    return "\n".join(lines).rstrip() + "\n"


def notes(rows: list[dict]) -> list[str]:
    """What there is to say about single rows, each once."""
    return list(dict.fromkeys(f"{row['what']}: {row['note']}" for row in rows if "note" in row))


def command_line(result: dict) -> str:
    """The subcommand and options that a result came from."""
    words = [result["benchmark"]]
    for name, value in result["options"].items():
        words += [f"--{name}", *(value if isinstance(value, (list, tuple)) else [str(value)])]
    return " ".join(words)


def _groups(rows: list[dict], columns: dict[str, str]) -> list[tuple[str | None, list[dict], dict[str, str]]]:
    """Title, rows, and the columns in which one of them has something."""
    groups: dict[str | None, list[dict]] = {}
    for row in rows:
        groups.setdefault(next((row[key] for key in _TITLES if key in row), None), []).append(row)
    found = []
    for title, members in groups.items():
        used = {key for row in members for key, value in row.items() if value is not None}
        found.append((title, members, {key: heading for key, heading in columns.items() if key in used}))
    return found


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
