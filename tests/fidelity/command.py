"""The command line of `python tests/fidelity`: which oracles, and the report."""

import argparse
import sys
import time
from types import ModuleType

from rich.console import Console

from fidelity import (
    defaults,
    draws,
    ema,
    evaluation,
    initialisation,
    learning_rate,
    loss,
    mixing,
    models,
    operations,
    sampler,
    trajectories,
    weight_decay,
)
from fidelity.old_timm import VERSION, authors, check_installed
from fidelity.rows import Row
from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.machine import num_cores
from tools.lib.common.arguments import path_argument
from tools.lib.common.hardware import machine
from tools.lib.common.tables import markdown_table, write_between_marks

# Each has rows(), which compares; its docstring is the promise.
ORACLES: dict[str, ModuleType] = {
    "defaults": defaults,
    "learning_rate": learning_rate,
    "loss": loss,
    "ema": ema,
    "mixing": mixing,
    "draws": draws,
    "sampler": sampler,
    "operations": operations,
    "trajectories": trajectories,
    "evaluation": evaluation,
    "weight_decay": weight_decay,
    "initialisation": initialisation,
    "models": models,
}
COLUMNS = ("oracle", "what", "ours", "theirs", "compared", "largest difference", "tolerance", "ok")
_WORDS = (0, 1, 2, 3, 6, 7)  # The other columns hold numbers.
BEGIN, END = "<!-- fidelity: begin -->", "<!-- fidelity: end -->"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    found, begin, console = {}, time.monotonic(), Console(stderr=True)
    with exit_on_user_error():
        if options.markdown and options.oracles:
            raise UserError("--markdown takes the report of all oracles: name none, or leave it out")
        check_installed()
        for name in options.oracles or ORACLES:
            with console.status(name):
                found[name] = list(ORACLES[name].rows())
        report = to_markdown(found, time.monotonic() - begin)
        print(report)
        if options.markdown:
            write_between_marks(options.markdown, report, BEGIN, END)
    fallen = [f"{name}: {row.what}" for name, rows in found.items() for row in rows if not row.ok]
    if fallen:
        sys.exit("\n".join(["these oracles fell:", *fallen]))


def to_markdown(found: dict[str, list[Row]], elapsed_s: float) -> str:
    """The report: the machine, the promises, the table, the notes."""
    every = [row for rows in found.values() for row in rows]
    versions = ", ".join(f"{name} {value}" for name, value in machine().items() if name in ("torch", "timm", "numpy"))
    side = "the authors' repository and timm" if authors() else "timm"
    lines = [
        f"`make fidelity`: {versions}, against {side} {VERSION}; {elapsed_s / 60:.1f} minutes on {num_cores()} CPU "
        f"cores. {sum(row.ok for row in every)} of {len(every)} comparisons hold.",
        "",
        *(f"- **{name}**: {promise(name)}" for name in found),
        "",
        *markdown_table(COLUMNS, [(name, *cells(row)) for name, rows in found.items() for row in rows], text=_WORDS),
    ]
    notes = dict.fromkeys(
        f"- {name}, {row.what}: {row.note}" for name, rows in found.items() for row in rows if row.note
    )
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def promise(name: str) -> str:
    """The first paragraph of an oracle's docstring, on one line."""
    return " ".join(ORACLES[name].__doc__.partition("\n\n")[0].split())


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text, behind the name of its oracle."""
    kept = "yes" if row.ok else "NO"
    return row.what, row.ours, row.theirs, f"{row.compared:,}", row.difference, row.tolerance, kept


def _oracle(name: str) -> str:
    if name not in ORACLES:
        raise argparse.ArgumentTypeError(f"there is no '{name}', only {', '.join(ORACLES)}")
    return name


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    described = "\n".join(f"  {name:<14} {promise(name)}" for name in ORACLES)
    parser = argparse.ArgumentParser(
        prog="tests/fidelity",
        description="The trainer against the authors' own timm 0.5.4; exit code 1 if an oracle falls.",
        epilog=f"oracles:\n{described}\n\nThe variable AUTHORS=/path/to/clone runs the authors' own files instead.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("oracles", nargs="*", type=_oracle, metavar="ORACLE", help="any of those below (default: all)")
    parser.add_argument(
        "--markdown",
        type=path_argument,
        help="write the report of all oracles to this file, between its marks; a file without marks is replaced",
    )
    return parser.parse_args(arguments)
