"""Which backbone for the time there is? Models' speed on this machine, and the front of speed and accuracy.

    python tools/compare.py [MODEL ...] [--accuracy FILE ...] [--backends BACKEND ...] [--out FOLDER]

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
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.common.errors import UserError, clipped, exit_on_user_error
from pipelines.common.files import write_synced
from pipelines.common.machine import num_cores
from tools.lib.common.arguments import model_argument, path_argument
from tools.lib.common.hardware import INSTALL_BACKENDS, first_device, machine
from tools.lib.common.terminal import console, reporting_progress
from tools.lib.common.timing import check_positive
from tools.lib.compare import charts, results
from tools.lib.compare.backends import BACKENDS, BATCH, Plan, choose_backends
from tools.lib.compare.candidates import choose
from tools.lib.compare.measuring import measure
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
    what = "timm's name, checkpoint, run or exported folder"
    add("models", type=model_argument, nargs="*", metavar="MODEL", help=what)
    what = "evaluation in JSON, or CSV with columns model, top1 (percent) and perhaps image_size"
    add("--accuracy", type=path_argument, nargs="+", default=[], metavar="FILE", help=what)
    what = f"some of {', '.join(BACKENDS)} (default: what is installed and fast)"
    add("--backends", nargs="+", choices=BACKENDS, metavar="BACKEND", help=what)
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--batch", type=int, metavar="N", help="images a call (default: 256 on a GPU, 4 on a CPU; OpenVINO takes 1)")
    add("--repeats", type=int, default=REPEATS, metavar="N", help="rounds in which each model is timed (%(default)s)")
    what = "for table, numbers and pictures (./%(default)s)"
    add("--out", type=path_argument, default=Path(_NAME), metavar="FOLDER", help=what)
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace) -> None:
    """Choose, measure, write and show.

    Raises:
      UserError: something asked for cannot be had, or nothing could be measured.
    """
    check_positive({"repeats": options.repeats, "batch": options.batch})
    device = options.device or first_device().type
    if device == "cuda" and first_device().type != "cuda":
        raise UserError("--device is cuda, and PyTorch finds no GPU here. Use --device cpu")
    plan = Plan(device, options.batch or BATCH[device], options.repeats, num_cores())
    backends, remarks = choose_backends(options.backends, device)
    if not _has_plotly():
        remarks.append(f"{_NAME}.html is left out: plotly is not installed. Run: {INSTALL_BACKENDS}")
    models = choose(options.models, options.accuracy)
    try:  # A folder that cannot be written to is noticed before anything is measured.
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=options.out):
            pass
    except OSError as error:
        raise UserError(
            f"--out is {clipped(options.out)}: cannot be written to ({error.strerror}). Name another"
        ) from error
    screen = console()
    for remark in remarks:
        screen.print(remark, markup=False)
    with reporting_progress("starting") as report:
        measured = measure(models, backends, plan, report)
    rows, failed = results.rows_of(measured)
    notes = results.notes(rows)
    try:  # The files come first, because rich ends the process where nobody reads what it prints.
        written = write(options.out, rows, failed, [*remarks, *notes], plan)
    finally:
        for table in results.tables(rows, failed):
            screen.print(table)
        for note in notes:
            screen.print(note, markup=False, highlight=False, soft_wrap=True)
    screen.print(f"written to {options.out}: {', '.join(written)}", markup=False, highlight=False, soft_wrap=True)
    if not rows:
        raise UserError(f"nothing could be measured; the first reason: {failed[0].failed}")


def write(out: Path, rows: list[Row], failed: list[FailedRow], remarks: list[str], plan: Plan) -> list[str]:
    """Write the files into a folder and return their names. Pictures of an earlier comparison do not stay there."""
    facts = machine(_RUNTIMES)
    on = str(facts["gpu"]) if plan.device == "cuda" else f"{facts['cpu']}, {plan.threads} cores"
    drawn = charts.plotted(rows)
    everything = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": plan.device,
        "measured_on": on,
        "rounds": plan.repeats,
        "threads": plan.threads,
        "machine": facts,
        "notes": remarks,
        "rows": [dataclasses.asdict(row) for row in (*rows, *failed)],
    }
    files = {
        ".csv": lambda: results.as_csv(rows, failed).encode(),
        ".json": lambda: (json.dumps(everything, indent=1) + "\n").encode(),
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


if __name__ == "__main__":
    main()
