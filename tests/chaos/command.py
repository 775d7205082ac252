"""The command line of `python tests/chaos`: which faults, how many, and the report."""

import argparse
import collections
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import track

from chaos import checkpoints, parquet, reports, runs, settings, studies, system_calls, tars
from chaos.attempts import Attempt
from pipelines.common.errors import exit_on_user_error
from pipelines.common.files import write_synced
from pipelines.common.machine import num_cores
from tools.lib.common.arguments import path_argument

# Each has PROMISE, what must hold, and attempts(folder, seed), which never ends; with how many are tried by default.
FAULTS: dict[str, tuple[ModuleType, int]] = {
    "runs": (runs, 50),
    "studies": (studies, 10),
    "tars": (tars, 400),
    "parquet": (parquet, 300),
    "system_calls": (system_calls, 200),
    "checkpoints": (checkpoints, 250),
    "settings": (settings, 400),
    "reports": (reports, 600),
}

INTRODUCTION = (
    "Each attempt breaks something at random and runs commands on it. It holds if the promise of its section is kept. "
    "`make chaos` makes all attempts and writes this page; `make test` makes a few of each kind."
)


@dataclasses.dataclass
class Tally:
    """How the attempts of one kind of fault ended.

    Attributes:
      tried, held: how many of each kind; fell: what went wrong, a sentence each.
      elapsed_s: how long they took.
    """

    tried: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    held: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    fell: list[str] = dataclasses.field(default_factory=list)
    elapsed_s: float = 0.0


def tallied(found: Iterable[Attempt]) -> Tally:
    """Count attempts."""
    tally, begin = Tally(), time.monotonic()
    for attempt in found:
        tally.tried[attempt.kind] += 1
        tally.held[attempt.kind] += not attempt.fell
        if attempt.fell:
            tally.fell.append(f"{attempt.kind}: {attempt.fell}")
    tally.elapsed_s = time.monotonic() - begin
    return tally


def to_markdown(tallies: dict[str, Tally], seed: int) -> str:
    """The report."""
    total = sum(tally.tried.total() for tally in tallies.values())
    held = sum(tally.held.total() for tally in tallies.values())
    minutes = sum(tally.elapsed_s for tally in tallies.values()) / 60
    lines = [
        "# Fault injection",
        "",
        INTRODUCTION,
        "",
        f"Made by `python tests/chaos` ({minutes:.0f} minutes, {num_cores()} CPU cores, "
        f"torch {torch.__version__.partition('+')[0]}, seed {seed}): {held} of {total} attempts held.",
    ]
    for name, tally in tallies.items():
        rows = [f"| {kind} | {count} | {tally.held[kind]} |" for kind, count in sorted(tally.tried.items())]
        promise = f"{FAULTS[name][0].PROMISE} {tally.held.total()} of {tally.tried.total()} held."
        lines += ["", f"## {name}", "", promise, "", "| what | tried | held |", "|---|---|---|", *rows]
        lines += ["", *(f"- {line}" for line in tally.fell)] if tally.fell else []
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    tallies, console = {}, Console(stderr=True)
    with exit_on_user_error():
        for name in options.faults or FAULTS:
            faults, count = FAULTS[name]
            count = options.count or count
            with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
                attempts = itertools.islice(faults.attempts(Path(folder), options.seed), count)
                tallies[name] = tallied(track(attempts, name, console=console, total=count))
        report = to_markdown(tallies, options.seed)
        print(report)
        if options.markdown:
            write_synced(options.markdown, report.encode())
    sys.exit(1 if any(tally.fell for tally in tallies.values()) else 0)


def _fault(name: str) -> str:
    if name not in FAULTS:
        raise argparse.ArgumentTypeError(f"there is no '{name}', only {', '.join(FAULTS)}")
    return name


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("faults", nargs="*", type=_fault, help=f"any of {', '.join(FAULTS)} (default: all)")
    parser.add_argument("--count", type=int, help="how many attempts of each (default: as docs/chaos.md has them)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens (default: 0)")
    parser.add_argument("--markdown", type=path_argument, help="write the report here, too")
    return parser.parse_args(arguments)
