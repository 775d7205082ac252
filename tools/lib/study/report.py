"""The report of a study: a page, study.csv with a line for each student, and study.json with everything.

Equal files give equal bytes. What was timed differs between two studies: it is under `measured` in study.json, in the
last columns of study.csv, and in the picture of speed.
"""

import collections
import csv
import dataclasses
import io
import itertools
import json
import os
import shlex
import statistics
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common.errors import UserError, named
from pipelines.common.files import read_json, write_synced
from tools.lib.common import front
from tools.lib.common.evaluation import Report, read_report
from tools.lib.common.units import human_seconds
from tools.lib.study.graph import Graph, StudentStages
from tools.lib.study.significance import compare_students, letters
from trainer.config.paper import PaperModel, paper_models
from trainer.config.recipe import AuditRow
from trainer.monitor.report.charts import CHARTS, Chart, draw
from trainer.monitor.report.page import PAGE, RunRecord, charts, embedded, read_run, template, text

# The weights that are evaluated on the validation images; other evaluations are suites.
_WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
_OF_THE_STUDENT = {"student.name", "student.kwargs", "student.seed"}
_OF_EVALUATIONS = ("digest", "images", "precision", "pipeline", "software", "image_size", "crop_pct")


@dataclasses.dataclass(frozen=True)
class Run:
    """A student with a seed.

    Attributes:
      record: holds what its folder has, nothing without one; reports: are its evaluations that can be read.
      correct: bool [N], which images the weights that are compared have recognised; None where that is not known.
    """

    stages: StudentStages
    record: RunRecord
    reports: dict[str, Report]
    correct: np.ndarray | None

    @property
    def title(self) -> str:
        """The title of the student."""
        return self.stages.student.label

    @property
    def name(self) -> str:
        """Student and seed."""
        return self.stages.train.subject

    def top1(self, name: str) -> float | None:
        """Accuracy in percent: of an evaluation, otherwise of the weights after the last update of the run."""
        at_the_end = self.record.summary.get("evaluation", {})
        found = self.reports[name] if name in self.reports else at_the_end.get(name, {})
        return found.get("top1")


@dataclasses.dataclass
class Student:
    """All seeds of a student, and its numbers by the column; what was timed is in `timed`."""

    title: str
    runs: list[Run]
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    timed: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the picture, as front.Plotted describes it."""

    model: str
    top1: float
    images_per_s: float
    top1_interval: tuple[float, float]
    on_front: bool
    top1_is_the_papers: bool = False


def write_report(graph: Graph) -> Path:
    """Write the page, study.csv, study.json and the pictures of what is there to the study's folder, over older ones.

    Returns:
      the page's path.
    """
    out = graph.out
    done = {name for each in graph.students for name, stage in each.evaluations.items() if stage.is_done}
    kind = next((kind for kind in _WEIGHTS if kind in done), "ema")
    runs = [_read(each, kind) for each in graph.students]
    paper = {model.name: model for model in paper_models()} if graph.study.paper == "usi" else {}
    students = [_student(title, [*some], paper) for title, some in itertools.groupby(runs, lambda run: run.title)]
    pairs = _pairs(students, kind)
    panels = _panels(students, graph, kind)
    students.sort(key=lambda student: -(student.row[f"top1_{kind}"] or -1))
    facts = _facts(runs)
    warnings = _warnings(graph, runs, facts, kind)
    title = f"Accuracy ({_WEIGHTS[kind]}) and speed"
    drawn = front.picture(panels, title, {False: "mean over the seeds"}) if panels else None
    page = template(Path(__file__).with_name("study.html")).render(
        graph=graph,
        title=graph.study.title,
        weights=_WEIGHTS[kind],
        warnings=[*warnings, *_logged(graph)],
        students=students,
        images=len(next((run.correct for run in runs if run.correct is not None), ())),
        devices=", ".join(dict.fromkeys(line.get("device", "?") for run in runs for line in run.record.of("session"))),
        backends=[*panels],
        suites=[*dict.fromkeys(name for run in runs for name in run.reports if name not in _WEIGHTS)],
        paper=paper,
        pairs={(pair["a"], pair["b"]): pair for pair in pairs},
        facts=facts,
        recipe=_recipe(runs),
        front=drawn and embedded(drawn),
        curves={chart.title: embedded(draw(chart)) for chart in _curves(runs, kind)},
        link=lambda path: urllib.parse.quote(os.fsencode(os.path.relpath(path, out))) if path.exists() else "",
        command=lambda stage: shlex.join(stage.noted.get("command", stage.command)),
        duration=human_seconds,
    )
    everything = json.dumps(_everything(graph, students, warnings, pairs), indent=1)
    out.mkdir(parents=True, exist_ok=True)
    write_synced(out / "study.csv", _csv(students).encode())
    write_synced(out / "study.json", f"{everything}\n".encode())
    write_synced(out / PAGE, page.encode("utf-8", "backslashreplace"))
    return out / PAGE


def _read(stages: StudentStages, kind: str) -> Run:
    folder, title, correct = stages.train.product, stages.student.label, None
    try:
        record = read_run(folder, title)
    except UserError:  # The run has not made its folder.
        record = RunRecord(folder, title, config={}, lines=[], summary={}, num_damaged=0, unusable=[])
    done = {name: stage.product for name, stage in stages.evaluations.items() if stage.is_done}
    reports = {name: read_report(path, lambda report: report) for name, path in done.items()}
    if kind in reports and (path := done[kind].with_suffix(".npz")).is_file():
        with np.load(path) as predictions:
            correct = predictions["top"][:, 0] == predictions["label"]
    return Run(stages, record, reports, correct)


# --- the runs beside each other ---


def _recipe(runs: Sequence[Run]) -> dict[str, AuditRow]:
    """A row of the audit for each setting that some run has other than the recipe."""
    return {row["key"]: row for run in runs for row in run.record.deviations or ()}


def _facts(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Collect what runs should have in common: name -> value -> which runs have it; the most common value is first."""
    known, found = _recipe(runs), {}
    for run in runs:
        if not run.record.lines:
            continue
        rows, summary = {row["key"]: row["here"] for row in run.record.deviations or ()}, run.record.summary
        facts: dict[str, object] = {key: rows.get(key, row["usi"]) for key, row in known.items()}
        if summary:
            facts["version of the code"] = [summary["version"], summary["source"]]
            facts["digest of the dataset"] = summary["dataset"]
        facts["number of damaged images"] = run.record.num_damaged
        for name, report in run.reports.items():
            facts |= {f"evaluation {name}, {key}": {**report, **report["view"]}[key] for key in _OF_EVALUATIONS}
        for name, value in facts.items():
            found.setdefault(name, {}).setdefault(text(value), []).append(run.name)
    return {
        name: {value: named(those, 4) for value, those in sorted(values.items(), key=lambda item: -len(item[1]))}
        for name, values in found.items()
    }


def _warnings(graph: Graph, runs: Sequence[Run], facts: Mapping[str, Mapping[str, str]], kind: str) -> list[str]:
    """Collect the sentences that a reader must know before the numbers."""
    found = [f"stage {stage.name} has failed: {stage.failure}" for stage in graph.common.values() if stage.failure]
    for run in runs:
        if run.stages.failure:
            found.append(f"{run.name} is not complete: {run.stages.failure}")
    for name, values in facts.items():
        if len(values) > 1 and name not in _OF_THE_STUDENT:
            words = [f"{value} in {those}" for value, those in values.items()]
            found.append(f"runs differ in {name}: {'; '.join(words)}")
    if set(collections.Counter(run.title for run in runs if run.correct is not None).values()) == {1}:
        found.append("each student has one seed: intervals are over images alone, another seed may differ by more")
    return found


def _logged(graph: Graph) -> list[str]:
    """Collect the warnings of the commands; an interrupted one may word them differently."""
    found: dict[str, list[str]] = {}
    for stage in graph.stages:
        for line in stage.warnings:
            found.setdefault(line, []).append(stage.name)
    return [f"{named(stages, 4)}: {line}" for line, stages in found.items()]


# --- numbers ---


def _student(title: str, runs: list[Run], paper: Mapping[str, PaperModel]) -> Student:
    """A student with its accuracies over its seeds, its size and its costs."""
    student = runs[0].stages.student
    row: dict[str, Any] = {"name": student.name, "kwargs": json.dumps(student.kwargs)}
    row |= {"seeds": len(runs), "failed": sum(bool(run.stages.failure) for run in runs)}
    for name in dict.fromkeys([*_WEIGHTS, *(name for run in runs for name in run.reports)]):
        values = [value for run in runs if (value := run.top1(name)) is not None]
        row[f"top1_{name}"] = statistics.mean(values) if values else None
        row[f"sd_{name}"] = statistics.stdev(values) if len(values) > 1 else None
    row["parameters"] = next((each["parameters"] for run in runs for each in run.reports.values()), None)
    row["paper"] = paper[student.name].top1 if student.name in paper else None
    speeds = [line["images_per_s"] for run in runs for line in run.record.of("train")]
    ranks = [line["ranks"] for run in runs for line in run.record.of("session")[-1:]]
    hours = sum(run.stages.train.seconds for run in runs) / 3600 * max(ranks, default=1)
    timed = {"train_images_per_s": statistics.median(speeds) if speeds else None, "device_hours": hours}
    return Student(title, runs, row, timed)


def _pairs(students: Sequence[Student], kind: str) -> list[dict]:
    """Each pair of the students that were evaluated on the same images, the better one first.

    Intervals and letters go into the rows of these students.
    """
    known: dict[str, dict[str, list[np.ndarray]]] = {}
    for run in (run for student in students for run in student.runs):
        if run.correct is not None:
            known.setdefault(run.reports[kind]["digest"], {}).setdefault(run.title, []).append(run.correct)
    if not known:
        return []
    titles, correct = zip(*max(known.values(), key=len).items(), strict=True)
    owner = [place for place, mine in enumerate(correct) for _ in mine]
    found = compare_students(np.stack([*itertools.chain(*correct)]), owner)
    rows = {student.title: student.row for student in students}
    groups = letters(found.top1, found.distinguishable)
    for title, (low, high), group in zip(titles, found.top1_interval.tolist(), groups, strict=True):
        rows[title] |= {"low": low, "high": high, "letters": group}
    return [
        {
            "a": titles[i],
            "b": titles[j],
            "difference": float(found.difference[i, j]),
            "interval_alone": found.interval_alone[i, j].tolist(),
            "interval": found.interval[i, j].tolist(),
            "distinguishable": bool(found.distinguishable[i, j]),
        }
        for i, j in itertools.combinations(np.argsort(-found.top1, kind="stable").tolist(), 2)
    ]


def _panels(students: Sequence[Student], graph: Graph, kind: str) -> dict[str, list[Point]]:
    """The points of each backend by its title. Speeds, and who is on the front, go into what was timed of students."""
    models = {str(run.stages.export.product): student for student in students for run in student.runs}
    measured: dict[str, list[Student]] = {}
    rows = read_json(graph.common["speed"].product).get("rows", []) if "speed" in graph.common else []
    for row in (row for row in rows if "images_per_s" in row and row["model"] in models):
        title, student = f"{row['backend']}: {row['precision']}, batch {row['batch']}", models[row["model"]]
        student.timed |= {f"{title}, {key}": row[key] for key in ("images_per_s", "min", "max")}
        if "letters" in student.row:
            measured.setdefault(title, []).append(student)
    panels = {}
    for title, placed in measured.items():
        places = [(student.row[f"top1_{kind}"], student.timed[f"{title}, images_per_s"]) for student in placed]
        on_front = front.pareto_front(places)
        for student, is_on in zip(placed, on_front, strict=True):
            student.timed[f"{title}, front"] = "front" if is_on else ""
        panels[title] = [
            Point(student.title, top1, speed, (student.row["low"], student.row["high"]), is_on)
            for student, (top1, speed), is_on in zip(placed, places, on_front, strict=True)
        ]
    return panels


# --- writing ---


def _curves(runs: Sequence[Run], kind: str) -> list[Chart]:
    """The curves of all runs; seeds of a student have its color, and one entry of the legend."""
    shown = {"loss": "train/loss", "top1": f"eval/{kind}/top1", "agreement": "train/agreement"}
    kinds = [dataclasses.replace(each, series={"": shown[each.name]}) for each in CHARTS if each.name in shown]
    found = charts([run.record for run in runs if run.record.lines], kinds)
    # Without marks a study that was killed and completed looks like one that was not.
    return [dataclasses.replace(chart, marks=()) for chart in found]


def _csv(students: Sequence[Student]) -> str:
    """A line for each student; what was timed is in the last columns."""
    columns = dict.fromkeys(itertools.chain(*(each.row for each in students), *(each.timed for each in students)))
    file = io.StringIO()
    writer = csv.DictWriter(file, ["student", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"student": each.title, **each.row, **each.timed} for each in students)
    return file.getvalue()


def _everything(graph: Graph, students: Sequence[Student], warnings: list[str], pairs: list[dict]) -> dict:
    return {
        "title": graph.study.title,
        "warnings": warnings,
        "students": {student.title: student.row for student in students},
        "runs": {
            run.name: {
                "failed": run.stages.failure,
                "top1": {name: run.top1(name) for name in dict.fromkeys([*_WEIGHTS, *run.reports])},
                "best": run.record.summary.get("best"),
                "deviations": run.record.deviations,
            }
            for student in students
            for run in student.runs
        },
        "pairs": pairs,
        "measured": {
            "warnings": _logged(graph),
            "seconds": {stage.name: stage.seconds for stage in graph.stages if stage.seconds},
            "students": {student.title: student.timed for student in students},
        },
        "commands": {stage.name: stage.noted.get("command", stage.command) for stage in graph.stages},
    }
