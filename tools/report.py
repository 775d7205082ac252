"""A page about runs, finished or not: curves, accuracies, samples, restarts, settings. Several are compared.

    python tools/report.py RUN [RUN ...] [--out FOLDER]

The page needs no other file; its pictures lie beside it.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.common.errors import exit_on_user_error
from tools.lib.common.arguments import path_argument
from trainer.monitor.report.page import PAGE, write_report


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    runs = list(dict.fromkeys(options.runs))
    with exit_on_user_error():
        print(write_report(runs, options.out or (runs[0] / "report" if len(runs) == 1 else Path("report"))))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="a run's folder, --run.out")
    where = f"for {PAGE} and the pictures (default: RUN/report for one run, ./report for several)"
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help=where)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
