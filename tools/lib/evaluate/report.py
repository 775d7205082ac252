"""The report of an evaluation: its rows, and how it is written and shown."""

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipelines.common.files import write_synced
from tools.lib.common.evaluation import ClassRow, Report, TakenFor
from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from trainer.evaluation import metrics
from trainer.evaluation.metrics import Predictions
from trainer.evaluation.trained import descriptions

_WORST = 10  # The report shows this many classes.


def write_and_show(report: Report, path: Path | None) -> None:
    """Write the report to a file if one is given, and show it; if it cannot be written it is shown all the same.

    The file comes first, because rich ends the process where nobody reads what it prints.
    """
    try:
        if path is not None:
            write_synced(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    finally:
        show(report)
    if path is not None:
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
    screen = console()
    kind = f", {report['weights']} weights" if report["weights"] else ""
    transform = report["view"]
    classes, outputs = len(report["classes"]), report["outputs"]
    among = "" if classes == outputs else f" told apart among {classes:,} of its {outputs:,} classes,"
    lines = [
        f"{report['model']} ({report['source']}{kind}) on {report['dataset']} (images: {report['images']:,}),{among} "
        f"{transform['image_size']} px, {transform['crop_mode']} crop {transform['crop_pct']:g}, "
        f"{transform['interpolation']}"
    ]
    if report["damaged"]:
        lines += [f"damaged images, counted in gray: {len(report['damaged'])}; the first: {report['damaged'][0]}"]
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    numbers = {"top-1 %": report["top1"], "top-5 %": report["top5"], "loss": report["loss"], "ECE %": report["ece"]}
    if "real" in report:
        numbers[f"ReaL top-1 % (images: {report['real']['images']:,})"] = report["real"]["top1"]
    cells = [f"{value:.4f}" if name == "loss" else f"{value:.2f}" for name, value in numbers.items()]
    screen.print(terminal_table([*numbers], [cells], text=()))
    screen.print(worst_classes(report["classes"]))


def worst_classes(rows: list[ClassRow]) -> Table:
    """The classes with the lowest accuracy, and what their images are taken for."""
    known = sorted(((row["top1"], row) for row in rows if row["top1"] is not None), key=lambda pair: pair[0])
    cells = []
    for top1, row in known[:_WORST]:
        taken_for = ", ".join(f"{other['class']} {other['percent']:.0f} %" for other in row["taken_for"])
        words = row["words"] if row["words"] != row["class"] else ""
        cells.append([Text(row["class"]), Text(words), f"{row['images']:,}", f"{top1:.1f}", Text(taken_for)])
    headings = ("class", "", "images", "top-1 %", "taken for")
    return terminal_table(headings, cells, text=(0, 1, 4), title="Classes that are found least")
