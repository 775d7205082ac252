"""Which backbone for the time there is? Models' speed on this machine, and the front of speed and accuracy.

    python tools/compare.py [MODEL ...] [--accuracy FILE ...] [--backends NAME ...] [--out FOLDER]

MODEL is timm's name (speed does not depend on weights, which are then random), a checkpoint, a run's folder, or an
exported one; without any, the paper's models that timm has. Accuracies come from evaluations (`python
tools/evaluate.py --run.json FILE`) or a CSV with columns model and top1; for timm's names otherwise from the paper, and
are marked then. Models are timed in turn on each backend, so that a machine whose speed drifts is unfair to none.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.common.errors import UserError, clipped, exit_on_user_error
from pipelines.common.files import write_synced
from pipelines.common.machine import num_cores
from tools.lib.common.arguments import model_argument, path_argument
from tools.lib.common.hardware import first_device, machine
from tools.lib.common.terminal import console
from tools.lib.compare import charts, results
from tools.lib.compare.backends import BACKENDS, EXTRA, Backend, choose_backends
from tools.lib.compare.candidates import Candidate, choose
from tools.lib.compare.measuring import Measured, Plan, Prepared, measure, pieces
from tools.lib.compare.results import FailedRow, Row

REPEATS = 15
_NAME = "comparison"
_RUNTIMES = ("onnx", "onnxruntime", "openvino", "tensorrt")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    with exit_on_user_error():
        try:
            compare(options)
        except KeyboardInterrupt:
            sys.exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add(
        "models",
        type=model_argument,
        nargs="*",
        metavar="MODEL",
        help="timm's name, checkpoint, run or exported folder",
    )
    what = "evaluation in JSON, or CSV with columns model, top1 (percent) and perhaps image_size"
    add("--accuracy", type=path_argument, nargs="+", default=[], metavar="FILE", help=what)
    add(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"some of {', '.join(BACKENDS)} (default: what is installed and fast)",
    )
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--batch", type=int, metavar="N", help="images a call (default: 256 on a GPU, 4 on a CPU; OpenVINO takes 1)")
    add("--repeats", type=int, default=REPEATS, metavar="N", help="rounds in which each model is timed (%(default)s)")
    add(
        "--out",
        type=path_argument,
        default=Path(_NAME),
        metavar="FOLDER",
        help="for table, numbers and pictures (./%(default)s)",
    )
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace) -> None:
    """Choose, measure, show and write.

    Raises:
      UserError: something asked for cannot be had, or nothing could be measured.
    """
    plan = _plan(options)
    backends, remarks = choose_backends(options.backends, plan.device)
    if not _has_plotly():
        remarks.append(f"{_NAME}.html is left out: plotly is not installed. Run: {EXTRA}")
    models = choose(options.models, options.accuracy)
    _check_writable(options.out)
    screen = console()
    for remark in remarks:
        screen.print(remark, markup=False)
    prepared, measured = _with_progress(models, backends, plan)
    rows = results.rows_of(prepared, measured)
    notes = results.notes(rows)
    try:
        written = write(options.out, rows, [*remarks, *notes], plan)
    except OSError as error:
        raise UserError(f"--out is {options.out}: cannot be written ({error.strerror}). Name another") from error
    finally:  # The tables are shown even if the files cannot be written.
        _show(screen, rows, notes)
    screen.print(f"written to {options.out}: {', '.join(written)}", markup=False, highlight=False, soft_wrap=True)
    if isinstance(first := rows[0], FailedRow) and not results.by_backend(rows):
        raise UserError(f"nothing could be measured; the first reason: {first.failed}")


def _show(screen: Console, rows: Sequence[Row | FailedRow], notes: Sequence[str]) -> None:
    for table in results.tables(rows):
        screen.print(table)
    for note in notes:
        screen.print(note, markup=False, highlight=False, soft_wrap=True)


def _plan(options: argparse.Namespace) -> Plan:
    device = options.device or first_device().type
    if device == "cuda" and first_device().type != "cuda":
        raise UserError("--device is cuda, and PyTorch finds no GPU here. Use --device cpu")
    for name, least in (("repeats", 1), ("batch", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    return Plan(device, options.batch, options.repeats, num_cores())


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out is {clipped(out, 120)}: no folder can be made there ({error.strerror}). Name another"
        ) from error
    try:
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out is {clipped(out, 120)}: no file can be made there ({error.strerror}). Name another"
        ) from error


def _with_progress(models: list[Candidate], backends: list[Backend], plan: Plan) -> tuple[Prepared, list[Measured]]:
    """`measure` with a line of progress on a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("starting", total=pieces(len(models), len(backends), plan.repeats))
        return measure(models, backends, plan, lambda done: progress.update(task, advance=1, description=done))


def write(out: Path, rows: Sequence[Row | FailedRow], remarks: Sequence[str], plan: Plan) -> list[str]:
    """Write the files into a folder and return their names. Pictures of an earlier comparison do not stay there."""
    on = _machine_in_words(plan)
    drawn = charts.plotted(rows)
    files = {
        ".csv": lambda: results.as_csv(rows).encode(),
        ".json": lambda: (json.dumps(_everything(rows, remarks, plan), indent=1) + "\n").encode(),
        ".png": lambda: charts.picture(rows, on) if drawn else None,
        ".html": lambda: charts.page(rows, on).encode() if drawn and _has_plotly() else None,
    }
    written = []
    for suffix, content in files.items():  # The numbers come first: no failure of a picture takes them away.
        path = out / f"{_NAME}{suffix}"
        if (made := content()) is None:
            path.unlink(missing_ok=True)
        else:
            write_synced(path, made)
            written.append(path.name)
    return written


def _has_plotly() -> bool:
    return importlib.util.find_spec("plotly") is not None


def _everything(rows: Sequence[Row | FailedRow], remarks: Sequence[str], plan: Plan) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": plan.device,
        "rounds": plan.repeats,
        "threads": plan.threads,
        "machine": machine(_RUNTIMES),
        "notes": list(remarks),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _machine_in_words(plan: Plan) -> str:
    facts = machine()
    return str(facts["gpu"]) if plan.device == "cuda" else f"{facts['cpu']}, {plan.threads} cores"


if __name__ == "__main__":
    main()
