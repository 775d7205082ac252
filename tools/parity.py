"""The parity report: every stage of our pipelines, held to timm's own code on the same photographs.

    python tools/parity.py [--size S] [--json FILE] [--markdown FILE]

The exit code is 1 if a tolerance is exceeded. On a machine with a GPU, DALI's rows are its GPU's.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.markdown import Markdown

from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import check_parent_folder, write_synced
from tools.lib.common.arguments import path_argument
from tools.lib.common.hardware import machine
from tools.lib.common.tables import markdown_table, write_between_marks
from tools.lib.common.terminal import console
from tools.lib.parity.rows import Row
from tools.lib.parity.stages import open_photos, report

COLUMNS = ("stage", "ours", "against", "images", "max", "mean", "off by > 1", "tolerance", "ok")
_WORDS = (0, 1, 2, 7, 8)  # The other columns hold numbers.
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""
    if not row.images:
        return row.stage, row.ours, row.against, "", "", "", "", "", "not compared"
    off = "0" if row.off_by_more == 0 else f"{100 * row.off_by_more:.2g} %"
    numbers = (str(row.images), f"{row.max:.3g}", f"{row.mean:.3g}", off)
    return row.stage, row.ours, row.against, *numbers, row.tolerance, "yes" if row.ok else "NO"


def markdown(rows: Sequence[Row], size: int) -> str:
    """The report: the machine, the table, and what there is to say about single rows."""
    versions = ", ".join(f"{name} {value}" for name, value in machine().items() if name not in ("cpu", "cores"))
    table = markdown_table(COLUMNS, map(cells, rows), text=_WORDS)
    notes = dict.fromkeys(f"- {row.stage}, {row.ours}: {row.note}" for row in rows if row.note)
    return "\n".join([f"`python tools/parity.py --size {size}`: {versions}.", "", *table, "", *notes]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    with exit_on_user_error():
        rows = compare(options)
    exceeded = [row for row in rows if not row.ok]
    if exceeded:
        sys.exit(f"{len(exceeded)} of {len(rows)} comparisons exceed their tolerance")


def compare(options: argparse.Namespace) -> list[Row]:
    """Compare all stages, write the files that the options name, show the rows, and return them."""
    for name, path in (("--json", options.json), ("--markdown", options.markdown)):
        if path is not None:
            check_parent_folder(path, f"{name} {path}")
    if options.size < 1:
        raise UserError(f"--size is {options.size}; it must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(report(open_photos(Path(scratch)), options.size))
    text = markdown(rows, options.size)
    if options.json:
        content = {"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}
        write_synced(options.json, (json.dumps(content, indent=1) + "\n").encode())
    if options.markdown:
        write_between_marks(options.markdown, text, BEGIN, END)
    console().print(Markdown(text))  # Last, because rich ends the process where nobody reads what it prints.
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--size", type=int, default=224, help="side of the training images, pixels")
    parser.add_argument("--json", type=path_argument, help="write the rows to this file, too")
    parser.add_argument(
        "--markdown", type=path_argument, help="write the table to this file, between its marks if it has them"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
