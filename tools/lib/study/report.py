"""The report of a study: a page, study.csv with a line for each student, and study.json with everything.

Equal files give equal bytes. What was timed differs between two studies: it is under `measured` in study.json, in the
last columns of study.csv, and in front.png.
"""

import collections
import contextlib
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

from pipelines.common.errors import UserError
from pipelines.common.files import read_json, write_synced
from tools.lib.common import front
from tools.lib.common.evaluation import Report, read_report
from tools.lib.common.units import human_seconds
from tools.lib.study.results import StudentResult, StudyResults
from tools.lib.study.significance import compare_students, letters
from trainer.config.natures import setting_natures
from trainer.models.files.torch_files import load_plain
from trainer.monitor.report.charts import CHARTS, Chart, draw
from trainer.monitor.report.page import PAGE, RunRecord, charts, embedded, read_run, template, text
from trainer.state.checkpoint import BEST, checkpoints_folder

# The weights that are evaluated on the validation images; other evaluations are suites.
_WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
_OF_THE_STUDENT = {"student.name", "student.kwargs", "student.seed"}
_OF_MODELS = ("student.", "teacher.")  # The files that these settings name change results, unlike other paths.
_OF_EVALUATIONS = ("digest", "images", "precision", "pipeline", "software", "image_size", "crop_pct")
Key = tuple[str, int]  # The title of a student, and a seed.


@dataclasses.dataclass(frozen=True)
class Run:
    """A student with a seed.

    Attributes:
      record: holds what its folder has, None without one; reports: are its evaluations that can be read.
      correct: bool [N], which images the weights that are compared have recognised; None where that is not known.
      hours: each device was used for this long, over all sessions; students that were trained at once divide it.
    """

    result: StudentResult
    record: RunRecord | None
    reports: dict[str, Report]
    correct: np.ndarray | None
    hours: float

    @property
    def key(self) -> Key:
        """Student and seed."""
        return self.result.title, self.result.seed

    def lines(self, kind: str) -> list[dict]:
        """The lines of its metrics.jsonl of this kind."""
        return self.record.of(kind) if self.record is not None else []

    def top1(self, name: str) -> float | None:
        """Accuracy in percent: of an evaluation, otherwise of the weights after the last update of the run."""
        at_the_end = self.record.summary.get("evaluation", {}) if self.record else {}
        found = self.reports[name] if name in self.reports else at_the_end.get(name, {})
        return found.get("top1")


@dataclasses.dataclass
class Student:
    """All seeds of a student, and its numbers by the column: `measured` was timed, `speeds` too, by the backend."""

    title: str
    runs: list[Run]
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, float | None] = dataclasses.field(default_factory=dict)
    speeds: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the picture, as front.Plotted describes it."""

    model: str
    top1: float
    images_per_s: float
    top1_interval: tuple[float, float] | None = None
    top1_is_the_papers: bool = False
    on_front: bool = False


def write_report(out: Path, results: StudyResults) -> Path:
    """Write the page, study.csv, study.json and the pictures to `out`, over those that are there.

    Returns:
      the page's path.
    """
    kind = next((kind for kind in _WEIGHTS if any(kind in each.evaluations for each in results.students)), "ema")
    runs = [_read(each, results.students, kind) for each in results.students]
    students = [Student(title, [*group]) for title, group in itertools.groupby(runs, lambda run: run.result.title)]
    for student in students:
        _fill_row(student, results)
    pairs = _pairs(students, kind)
    panels = _panels(students, pairs, results, kind)
    students.sort(key=lambda student: -(student.row[f"top1_{kind}"] or -1))
    warnings = _warnings(results, runs, kind)
    curves = {chart.name: (chart.title, draw(chart)) for chart in _curves(runs, kind)}
    legend = {False: "trained here", True: "the paper's accuracy"}
    drawn = front.picture(panels, f"Accuracy ({_WEIGHTS[kind]}) and speed", legend) if panels else None
    everything = json.dumps(_everything(results, students, warnings, pairs), indent=1)
    page = template(Path(__file__).with_name("study.html")).render(
        title=results.title,
        results=results,
        weights=_WEIGHTS[kind],
        devices=", ".join(dict.fromkeys(line.get("device", "?") for run in runs for line in run.lines("session"))),
        warnings=warnings,
        students=students,
        backends=[*dict.fromkeys(backend for each in students for backend in each.speeds)],
        suites=[*dict.fromkeys(name for run in runs for name in run.reports if name not in _WEIGHTS)],
        pairs={(pair["a"], pair["b"]): pair for pair in pairs},
        images=len(next((run.correct for run in runs if run.correct is not None), ())),
        audit=_audit(runs),
        front=drawn and embedded(drawn),
        curves={title: embedded(content) for title, content in curves.values()},
        link=lambda path: urllib.parse.quote(os.fsencode(os.path.relpath(path, out))) if path.exists() else "",
        command=shlex.join,
        duration=human_seconds,
    )
    out.mkdir(parents=True, exist_ok=True)
    files = {f"{chart.name}.png": curves.get(chart.name, ("", None))[1] for chart in CHARTS} | {"front.png": drawn}
    files |= {"study.csv": _csv(students).encode(), "study.json": f"{everything}\n".encode()}
    for name, content in {**files, PAGE: page.encode("utf-8", "backslashreplace")}.items():
        if content is None:  # An earlier report may have had it.
            (out / name).unlink(missing_ok=True)
        else:
            write_synced(out / name, content)
    return out / PAGE


def _read(result: StudentResult, everybody: Sequence[StudentResult], kind: str) -> Run:
    record, correct = None, None
    with contextlib.suppress(UserError):  # A run may have failed before it made its folder.
        record = read_run(result.run, result.title) if result.run is not None else None
    reports = {name: read_report(path, lambda report: report) for name, path in result.evaluations.items()}
    if kind in reports and (path := result.evaluations[kind].with_suffix(".npz")).is_file():
        with np.load(path) as predictions:
            correct = predictions["top"][:, 0] == predictions["label"]
    seconds, last, ranks = 0.0, 0.0, 0
    for line in record.lines if record else ():
        now = line.get("time", last)
        if line["kind"] == "session":
            last, ranks = now, line.get("ranks", 1)
        seconds, last = seconds + ranks * (now - last), now
    together = [command for command in result.commands if any(word.endswith("together.py") for word in command)]
    at_once = sum(together[0] in other.commands for other in everybody) if together else 1
    return Run(result, record, reports, correct, seconds / 3600 / at_once)


# --- the runs beside each other ---


def _warnings(results: StudyResults, runs: Sequence[Run], kind: str) -> list[str]:
    """What a reader must know before the numbers."""
    found = [f"stage {name} has failed: {reason}" for name, reason in results.stages_failed.items()]
    for run in runs:
        if run.result.failed or run.top1(kind) is None:
            title, seed = run.key
            found.append(f"{title}, seed {seed}, has no result: {run.result.failed or 'it is not finished'}")
    facts = {run.key: _facts(run, run.record) for run in runs if run.record is not None}
    for name, values in _by_value(facts).items():
        if len(values) > 1:
            words = [f"{'not set' if value is None else value} in {those}" for value, those in values.items()]
            found.append(f"runs differ in {name}: {'; '.join(words)}")
    if set(collections.Counter(run.key[0] for run in runs if run.correct is not None).values()) == {1}:
        found.append("each student has one seed: intervals are over images alone, another seed may differ by more")
    return found


def _facts(run: Run, record: RunRecord) -> dict[str, str]:
    """Everything about a run that its student does not decide, as text by its name."""
    settings = {f"{name}.{key}": value for name, section in record.config.items() for key, value in section.items()}
    paths = {key for key, nature in setting_natures().items() if nature.per_machine and not key.startswith(_OF_MODELS)}
    found = {key: value for key, value in settings.items() if key not in paths | _OF_THE_STUDENT}
    for row in record.deviations or ():
        if row["here"] != settings.get(row["key"]) and row["key"] not in _OF_THE_STUDENT:
            found[f"{row['key']}, as the run has found it"] = row["here"]
    if settings.get("augment.fill", 0) is None:
        found["augment.fill, which the student decides"] = "not known"
        with contextlib.suppress(UserError, OSError, LookupError, TypeError, ValueError):
            plan = load_plain(checkpoints_folder(record.folder) / BEST)["plan"]
            found["augment.fill, which the student decides"] = plan["fill"]
    session, summary = (record.of("session") or [{}])[-1], record.summary
    found |= {
        "digest of the dataset": summary.get("dataset", "not known"),
        "digest of the validation images": session.get("validation", "not known"),
        "version of the code": [summary.get("version", "not known"), summary.get("source", "not known")],
        "number of steps": f"{record.lines[-1]['step'] if record.lines else 0:,}",
        "number of damaged images": record.num_damaged,
    }
    for name, report in run.reports.items():
        found |= {f"evaluation {name}, {key}": {**report, **report["view"]}[key] for key in _OF_EVALUATIONS}
    return {key: text(value) for key, value in found.items()}


def _by_value(of_runs: Mapping[Key, Mapping[str, str]]) -> dict[str, dict[str | None, str]]:
    """The values of each fact, that of most runs first, None where a run lacks it; and in words which runs have it."""
    found = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(of_runs.values())):
        values: dict[str | None, list[Key]] = {}
        for run, facts in of_runs.items():
            values.setdefault(facts.get(name), []).append(run)
        ordered = sorted(values.items(), key=lambda item: -len(item[1]))
        found[name] = {value: _in_words(those, [*of_runs]) for value, those in ordered}
    return found


def _in_words(runs: Sequence[Key], everybody: Sequence[Key]) -> str:
    """Names of students, with seeds where not all runs of a student are meant."""
    if len(runs) == len(everybody):
        return "all"
    parts = []
    for title in dict.fromkeys(title for title, _ in runs):
        seeds, all_seeds = ([seed for name, seed in some if name == title] for some in (runs, everybody))
        parts.append(title if seeds == all_seeds else f"{title} (seed {', '.join(map(str, seeds))})")
    return ", ".join(parts)


def _audit(runs: Sequence[Run]) -> list[dict]:
    """The settings that differ from the recipe's, and the runs in which they do."""
    of_runs = {run.key: run.record.deviations or [] for run in runs if run.record is not None}
    known = {row["key"]: row for rows in of_runs.values() for row in rows}
    here = _by_value({run: {row["key"]: text(row["here"]) for row in rows} for run, rows in of_runs.items()})
    return [
        {**known[key], "here": value, "runs": those}
        for key, values in here.items()
        for value, those in values.items()
        if value is not None
    ]


# --- numbers ---


def _fill_row(student: Student, results: StudyResults) -> None:
    """The accuracies of a student over its seeds, its size and its costs."""
    row, runs = student.row, student.runs
    row |= {"name": runs[0].result.name, "kwargs": runs[0].result.kwargs}
    row |= {"seeds": len(runs), "failed": sum(bool(run.result.failed) for run in runs)}
    for name in dict.fromkeys([*_WEIGHTS, *(name for run in runs for name in run.reports)]):
        values = [value for run in runs if (value := run.top1(name)) is not None]
        row[f"top1_{name}"] = statistics.mean(values) if values else None
        row[f"sd_{name}"] = statistics.stdev(values) if len(values) > 1 else None
    row["parameters"] = next((each["parameters"] for run in runs for each in run.reports.values()), None)
    row["paper"] = next((point.top1 for point in results.paper if point.name == row["name"]), None)
    speeds = [line["images_per_s"] for run in runs for line in run.lines("train")]
    student.measured["train_images_per_s"] = statistics.median(speeds) if speeds else None
    student.measured["device_hours"] = sum(run.hours for run in runs)


def _pairs(students: Sequence[Student], kind: str) -> list[dict]:
    """Each pair of the students that were evaluated on the same images, the better one first.

    Intervals and letters go into the rows of these students.
    """
    known: dict[str, dict[str, list[np.ndarray]]] = {}
    for run in (run for student in students for run in student.runs):
        if run.correct is not None:
            known.setdefault(run.reports[kind]["digest"], {}).setdefault(run.key[0], []).append(run.correct)
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


def _panels(
    students: Sequence[Student], pairs: Sequence[dict], results: StudyResults, kind: str
) -> dict[str, list[Point]]:
    """The points of each backend by its title. Speeds and places on the front go into the speeds of the students."""
    differ = {frozenset((pair["a"], pair["b"])) for pair in pairs if pair["distinguishable"]}
    models = {results.speed_models.get(student.title): student for student in students}
    panels: dict[str, list[Point]] = {}
    for row in read_json(results.speed).get("rows", []) if results.speed else []:
        if "images_per_s" in row and (student := models.get(row["model"])):
            title = f"{row['backend']}: {row['precision']}, batch {row['batch']}"
            student.speeds[title] = {key: row[key] for key in ("images_per_s", "min", "max")}
            panels[title] = []
    for title, points in panels.items():
        placed = [student for student in students if "letters" in student.row and title in student.speeds]
        places = [(student.row[f"top1_{kind}"], student.speeds[title]["images_per_s"]) for student in placed]
        for student, (top1, speed), on_front in zip(placed, places, front.pareto_front(places), strict=True):
            faster = {other.title for other, (_, its) in zip(placed, places, strict=True) if its > speed}
            is_sure = all(frozenset((student.title, other)) in differ for other in faster)
            student.speeds[title]["front"] = ("front" if is_sure else "front?") if on_front else ""
            points.append(Point(student.title, top1, speed, (student.row["low"], student.row["high"]), False, on_front))
            if (paper := student.row["paper"]) is not None:
                points.append(Point(f"{student.title}, paper", paper, speed, None, True))
    return {title: points for title, points in panels.items() if points}


# --- writing ---


def _curves(runs: Sequence[Run], kind: str) -> list[Chart]:
    """The curves of all runs; seeds of a student have its color, and one entry of the legend."""
    shown = {
        "loss": ("Training loss", "train/loss"),
        "top1": (f"Validation accuracy, {_WEIGHTS[kind]}", f"eval/{kind}/top1"),
        "agreement": ("Agreement of student and teacher", "train/agreement"),
    }
    kinds = [
        dataclasses.replace(chart, title=shown[chart.name][0], series={"": shown[chart.name][1]})
        for chart in CHARTS
        if chart.name in shown
    ]
    records = [run.record for run in runs if run.record is not None]
    color = {title: number for number, title in enumerate(dict.fromkeys(record.name for record in records))}
    found = []
    for chart in charts(records, kinds):
        curves = [dataclasses.replace(curve, color=color.get(curve.label, 0)) for curve in chart.curves]
        # Without marks a study that was killed and completed looks like one that was not.
        found.append(dataclasses.replace(chart, marks=(), curves=curves))
    return found


def _csv(students: Sequence[Student]) -> str:
    """A line for each student; what was timed is in the last columns."""
    rows = [{"student": each.title, **each.row, "kwargs": json.dumps(each.row["kwargs"])} for each in students]
    timed = [
        each.measured | {f"{name} {key}": value for name, its in each.speeds.items() for key, value in its.items()}
        for each in students
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*dict.fromkeys(itertools.chain(*rows, *timed))], lineterminator="\n")
    writer.writeheader()
    for cells in map(dict.__or__, rows, timed):
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in cells.items()})
    return file.getvalue()


def _everything(results: StudyResults, students: Sequence[Student], warnings: list[str], pairs: list[dict]) -> dict:
    runs = [run for student in students for run in student.runs]
    return {
        "title": results.title,
        "warnings": warnings,
        "students": {student.title: student.row for student in students},
        "runs": [
            {
                **{"student": run.result.title, "seed": run.result.seed, "failed": run.result.failed},
                "top1": {name: run.top1(name) for name in dict.fromkeys([*_WEIGHTS, *run.reports])},
                "best": run.record.summary.get("best") if run.record else None,
                "deviations": run.record.deviations if run.record else None,
            }
            for run in runs
        ],
        "pairs": pairs,
        "paper": [dataclasses.asdict(point) for point in results.paper],
        "measured": {
            "seconds": results.seconds,
            "students": {each.title: each.measured | each.speeds for each in students},
        },
        "commands": results.commands
        | {f"{title}, seed {seed}": run.result.commands for run in runs for title, seed in [run.key]},
    }
