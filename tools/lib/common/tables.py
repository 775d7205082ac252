"""Tables of text for the terminal and for documents in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from pipelines.common.files import write_synced

Cells = Sequence[str | Text]


def terminal_table(
    headings: Sequence[str],
    rows: Iterable[Cells],
    *,
    text: Sequence[int],
    title: str | None = None,
    styles: Sequence[str] = (),
) -> Table:
    """A table for the terminal.

    Args:
      text: numbers of the columns that hold words; the others hold numbers and are aligned at the right.
      styles: rich's style of each row; without any, rows are plain.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        is_text = number in text
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    for number, row in enumerate(rows):
        table.add_row(*row, style=styles[number] if styles else None)
    return table


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, text: Sequence[int]) -> list[str]:
    """The lines of the same table in Markdown; `text` as for `terminal_table`."""
    rule = "|".join("---" if number in text else "--:" for number in range(len(headings)))
    return [_line(headings), f"|{rule}|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_between_marks(path: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two marks of a file. A file without them is replaced completely."""
    before, after = "", ""
    if path.exists() and begin in (content := path.read_text()) and end in content:
        before, after = content.split(begin)[0] + begin + "\n", end + content.split(end)[1]
    write_synced(path, (before + text + after).encode())
