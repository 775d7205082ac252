"""The report of an evaluation: its rows, and how it is shown and written."""

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.common.errors import UserError
from pipelines.common.files import write_synced
from tools.lib.common.evaluation import ClassRow, Report, TakenFor
from trainer.evaluation import metrics
from trainer.evaluation.metrics import Predictions
from trainer.evaluation.trained import descriptions

_WORST = 10  # The report shows this many classes.


def write_and_show(report: Report, path: Path | None) -> None:
    """Write the report to a file, if one is given, and show it."""
    if path is None:
        show(report)
        return
    try:
        write_synced(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        show(report)
        raise UserError(f"run.json is {path}: cannot be written ({error.strerror}). Name another file") from error
    show(report)
    print(f"written to {path}")


def class_rows(predictions: Predictions, names: list[str]) -> list[ClassRow]:
    """For each class its id, words, images, accuracy in percent (None without images), and what it is taken for."""
    images, accuracy = metrics.per_class(predictions, len(names))
    rows: list[ClassRow] = []
    for label, (name, words) in enumerate(zip(names, descriptions(names), strict=True)):
        found = metrics.confusions(predictions, label) if images[label] else []
        taken_for: list[TakenFor] = [{"class": names[other], "percent": 100 * fraction} for other, fraction in found]
        top1 = 100 * float(accuracy[label]) if images[label] else None
        rows.append({"class": name, "words": words, "images": int(images[label]), "top1": top1, "taken_for": taken_for})
    return rows


def show(report: Report) -> None:
    """The report as a table, and the classes that are found least."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=120, highlight=False)
    kind = f", {report['weights']} weights" if report["weights"] else ""
    transform = report["view"]
    classes, outputs = len(report["classes"]), report["outputs"]
    among = "" if classes == outputs else f" told apart among {classes:,} of its {outputs:,} classes,"
    console.print(
        f"{report['model']} ({report['source']}{kind}) on {report['images']:,} images of {report['dataset']},{among} "
        f"{transform['image_size']} px, {transform['crop_mode']} crop {transform['crop_pct']:g}, "
        f"{transform['interpolation']}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    columns = [("top-1 %", report["top1"]), ("top-5 %", report["top5"]), ("loss", report["loss"])]
    columns += [("ECE %", report["ece"])]
    if "real" in report:
        real = report["real"]
        columns += [(f"ReaL top-1 % ({real['images']:,} images)", real["top1"])]
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" if name == "loss" else f"{value:.2f}" for name, value in columns))
    console.print(table)
    console.print(worst_classes(report["classes"]))
    if report["damaged"]:
        console.print(
            f"{len(report['damaged'])} damaged images were counted, in gray; the first: {report['damaged'][0]}",
            markup=False,
            soft_wrap=True,
        )


def worst_classes(rows: list[ClassRow]) -> Table:
    """The classes with the lowest accuracy, and what their images are taken for."""
    known = sorted(((row["top1"], row) for row in rows if row["top1"] is not None), key=lambda pair: pair[0])
    table = Table(title="Classes that are found least", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("class", "", "images", "top-1 %", "taken for"):
        table.add_column(name, justify="right" if name in ("images", "top-1 %") else "left")
    for top1, row in known[:_WORST]:
        taken_for = ", ".join(f"{other['class']} {other['percent']:.0f} %" for other in row["taken_for"])
        words = row["words"] if row["words"] != row["class"] else ""
        cells = (row["class"], words, f"{row['images']:,}", f"{top1:.1f}", taken_for)
        table.add_row(*map(escape, cells))
    return table
