"""The parity report: every stage of our pipelines, held to timm's own code on the same photographs.

    python tools/parity.py [--size S] [--json FILE] [--markdown FILE]

Ends with 1 if a tolerance is exceeded. On a machine with a GPU, DALI's rows are its GPU's.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

from rich import box
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import check_parent_folder, write_synced
from tools.lib.common.arguments import path_argument
from tools.lib.common.timing import console, machine
from tools.lib.parity.rows import Row
from tools.lib.parity.stages import open_photos, report

COLUMNS = ("stage", "ours", "against", "images", "max", "mean", "off by > 1", "tolerance", "ok")
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""
    if not row.images:
        return row.stage, row.ours, row.against, "", "", "", "", "", "not compared"
    share = "0" if row.share == 0 else f"{100 * row.share:.2g} %"
    numbers = (str(row.images), f"{row.max:.3g}", f"{row.mean:.3g}", share)
    return row.stage, row.ours, row.against, *numbers, row.tolerance, "yes" if row.ok else "NO"


def table(rows: list[Row]) -> Table:
    """For the terminal."""
    shown = Table(box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        shown.add_column(name, justify="right" if name in COLUMNS[3:7] else "left")
    for row in rows:
        shown.add_row(*cells(row), style="" if row.ok else "bold red")
    return shown


def notes(rows: list[Row]) -> list[str]:
    """What there is to say about single rows, each once."""
    return list(dict.fromkeys(f"{row.stage}, {row.ours}: {row.note}" for row in rows if row.note))


def markdown(rows: list[Row], size: int) -> str:
    """For a document: the machine, the table, the notes."""
    versions = ", ".join(f"{name} {value}" for name, value in machine().items() if name not in ("cpu", "cores"))
    lines = [f"`python tools/parity.py --size {size}`: {versions}.", "", *_markdown_row(COLUMNS)]
    lines.append("|---|---|---|--:|--:|--:|--:|---|---|")
    for row in rows:
        lines += _markdown_row(cells(row))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(rows))]) + "\n"


def _markdown_row(texts: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(texts) + " |"]


def write_markdown(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Write a text between two marks of a file that has them; elsewhere the text becomes the whole file."""
    before, after = "", ""
    if path.exists() and begin in (content := path.read_text()) and end in content:
        before, after = content.split(begin)[0] + begin + "\n", end + content.split(end)[1]
    write_synced(path, (before + text + after).encode())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    with exit_on_user_error():
        rows = compare(options)
    exceeded = [row for row in rows if not row.ok]
    if exceeded:
        sys.exit(f"{len(exceeded)} of {len(rows)} comparisons exceed their tolerance")


def compare(options: argparse.Namespace) -> list[Row]:
    """Compare all stages, show the rows, write them where the options say so, and return them."""
    for name, path in (("--json", options.json), ("--markdown", options.markdown)):
        if path is not None:  # now, rather than after the comparison
            check_parent_folder(path, f"{name} {path}")
    if options.size < 1:
        raise UserError(f"--size is {options.size}; it must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(report(open_photos(Path(scratch)), options.size))
    console().print(table(rows))
    print(*notes(rows), sep="\n")
    if options.json:
        content = {"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}
        write_synced(options.json, (json.dumps(content, indent=1) + "\n").encode())
    if options.markdown:
        write_markdown(options.markdown, markdown(rows, options.size))
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=224, help="side of the training images, pixels")
    parser.add_argument("--json", type=path_argument, help="write the rows to this file, too")
    parser.add_argument(
        "--markdown", type=path_argument, help="write the table to this file, between its marks if it has them"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
