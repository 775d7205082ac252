"""The report of a study: a page, study.csv with a line for each student, and study.json with everything.

Equal files give equal bytes. What was timed differs between two studies: it is under `measured` in study.json, in the
last columns of study.csv, and in front.png.
"""

import contextlib
import csv
import dataclasses
import functools
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
from tools.lib.study.significance import Comparison, compare_students, letters
from trainer.config.natures import setting_natures
from trainer.models.files.torch_files import load_plain
from trainer.monitor.report.charts import CHARTS, Chart, draw
from trainer.monitor.report.page import PAGE, RunRecord, charts, embedded, read_run, template, text
from trainer.state.checkpoint import BEST, checkpoints_folder

# The weights that are evaluated on the validation images; other evaluations are suites.
_WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
_OF_THE_STUDENT = {"student.name", "student.kwargs", "student.seed"}
_OF_MODELS = ("student.", "teacher.")  # The files that these settings name change results, unlike other paths.


@dataclasses.dataclass(frozen=True)
class Run:
    """A student with a seed.

    Attributes:
      record: what its folder holds, None without one; reports: its evaluations that can be read.
      correct: bool [N], which images the weights that are compared have recognised; None where that is not known.
      hours: of each device, over all sessions, divided by the students that were trained at once.
    """

    result: StudentResult
    record: RunRecord | None
    reports: dict[str, Report]
    correct: np.ndarray | None
    hours: float

    @property
    def key(self) -> tuple[str, int]:
        """Student and seed."""
        return self.result.title, self.result.seed

    def lines(self, kind: str) -> list[dict]:
        """The lines of its metrics.jsonl of this kind."""
        return self.record.of(kind) if self.record is not None else []

    def top1(self, name: str) -> float | None:
        """Accuracy in percent: of an evaluation, otherwise of the weights after the last update of the run."""
        if name in self.reports:
            return self.reports[name]["top1"]
        evaluation = self.record.summary.get("evaluation", {}) if self.record else {}
        return evaluation.get(name, {}).get("top1")


@dataclasses.dataclass
class Student:
    """All seeds of a student; `row` has what the table shows, `measured` what was timed, both by the column."""

    title: str
    runs: list[Run]
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)


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
    warnings = _warnings(results, runs, kind)
    compared, comparison = _compared(students)
    for student in students:
        _fill_row(student, results)
    for place, student in enumerate(compared):
        low, high = comparison.top1_interval[place].tolist()
        letter = letters(comparison.top1, comparison.distinguishable)[place]
        student.row |= {"low": low, "high": high, "letters": letter}
    panels = _fronts(students, compared, comparison, results, kind)
    students.sort(key=lambda student: -(student.row.get(f"top1_{kind}") or -1))
    pictures = {chart.name: (chart.title, draw(chart)) for chart in _curves(runs, kind)}
    if panels:
        legend = {False: "trained here", True: "the paper's accuracy"}
        drawn = front.picture(panels, f"Accuracy ({_WEIGHTS[kind]}) and speed", legend)
        pictures = {"front": ("Accuracy and speed", drawn), **pictures}
    pairs = _pairs(compared, comparison)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("front", *(chart.name for chart in CHARTS)):
        if name in pictures:
            write_synced(out / f"{name}.png", pictures[name][1])
        else:  # An earlier report may have had it.
            (out / f"{name}.png").unlink(missing_ok=True)
    write_synced(out / "study.csv", _csv(students).encode())
    everything = json.dumps(_everything(results, students, warnings, pairs), indent=1)
    write_synced(out / "study.json", f"{everything}\n".encode())
    page = template(Path(__file__).with_name("study.html")).render(
        title=results.title,
        results=results,
        weights=_WEIGHTS[kind],
        devices=", ".join(dict.fromkeys(line.get("device", "?") for run in runs for line in run.lines("session"))),
        warnings=warnings,
        students=students,
        backends=[key for key in dict.fromkeys(key for each in students for key in each.measured) if ":" in key],
        suites=list(dict.fromkeys(name for run in runs for name in run.reports if name not in _WEIGHTS)),
        pairs={(pair["a"], pair["b"]): pair for pair in pairs},
        images=len(next((run.correct for run in runs if run.correct is not None), ())),
        audit=_audit(runs),
        pictures={name: (title, embedded(content)) for name, (title, content) in pictures.items()},
        link=functools.partial(_link, out),
        command=shlex.join,
        duration=human_seconds,
    )
    write_synced(out / PAGE, page.encode("utf-8", "backslashreplace"))
    return out / PAGE


# --- reading ---


def _read(result: StudentResult, everybody: Sequence[StudentResult], kind: str) -> Run:
    record, reports, correct = None, {}, None
    with contextlib.suppress(UserError):  # A run may have failed before it made its folder.
        record = read_run(result.run, result.title) if result.run is not None else None
    for name, path in result.evaluations.items():
        reports[name] = read_report(path, lambda report: report)
    if kind in reports and (path := result.evaluations[kind].with_suffix(".npz")).is_file():
        with np.load(path) as predictions:
            correct = predictions["top"][:, 0] == predictions["label"]
    return Run(result, record, reports, correct, _hours(record, result, everybody))


def _hours(record: RunRecord | None, result: StudentResult, everybody: Sequence[StudentResult]) -> float:
    """Hours of devices from the first line of each session to its last."""
    seconds, first, last, ranks = 0.0, 0.0, 0.0, 0
    for line in record.lines if record else ():
        if line["kind"] == "session":
            seconds, first, ranks = seconds + ranks * (last - first), line.get("time", 0.0), line.get("ranks", 1)
        last = line.get("time", first)
    together = [command for command in result.commands if any(word.endswith("together.py") for word in command)]
    at_once = sum(together[0] in other.commands for other in everybody) if together else 1
    return (seconds + ranks * (last - first)) / 3600 / at_once


# --- the runs beside each other ---


def _warnings(results: StudyResults, runs: Sequence[Run], kind: str) -> list[str]:
    """What a reader must know before the numbers."""
    found = [f"stage {name} has failed: {reason}" for name, reason in results.stages_failed.items()]
    found += [
        f"{run.result.title}, seed {run.result.seed}, has no result: {run.result.failed or 'it is not finished'}"
        for run in runs
        if run.result.failed or run.top1(kind) is None
    ]
    found += _differences({run.key: _facts(run) for run in runs if run.record is not None})
    if runs and len({run.key[0] for run in runs if run.correct is not None}) == sum(
        run.correct is not None for run in runs
    ):
        found.append("each student has one seed: intervals are over images alone, another seed may differ by more")
    return found


def _facts(run: Run) -> dict[str, str]:
    """Everything about a run that its student does not decide, as text by its name."""
    record = run.record
    assert record is not None
    settings = {f"{name}.{key}": value for name, section in record.config.items() for key, value in section.items()}
    paths = {key for key, nature in setting_natures().items() if nature.per_machine and not key.startswith(_OF_MODELS)}
    found = {key: value for key, value in settings.items() if key not in paths | _OF_THE_STUDENT}
    for row in record.deviations or ():
        if row["here"] != settings.get(row["key"]) and row["key"] not in _OF_THE_STUDENT:
            found[f"{row['key']}, as the run has found it"] = row["here"]
    if settings.get("augment.fill", 0) is None:
        found["augment.fill, which the student decides"] = _fill_color(record)
    session, summary = (record.of("session") or [{}])[-1], record.summary
    found |= {
        "digest of the dataset": summary.get("dataset", "not known"),
        "digest of the validation images": session.get("validation", "not known"),
        "version of the code": [summary.get("version", "not known"), summary.get("source", "not known")],
        "number of steps": f"{record.lines[-1]['step'] if record.lines else 0:,}",
        "number of damaged images": record.num_damaged,
    }
    for name, report in run.reports.items():
        seen = {**report, **report["view"]}
        keys = ("digest", "images", "precision", "pipeline", "software", "image_size", "crop_pct")
        found |= {f"evaluation {name}, {key}": seen[key] for key in keys}
    return {key: text(value) for key, value in found.items()}


def _fill_color(record: RunRecord) -> Any:
    """The colour that the plan of a run puts outside of images."""
    try:
        return load_plain(checkpoints_folder(record.folder) / BEST)["plan"]["fill"]
    except (UserError, OSError, LookupError, TypeError, ValueError):
        return "not known"


def _differences(of_runs: Mapping[tuple[str, int], Mapping[str, str]]) -> list[str]:
    """A line for each fact that is not the same in all runs: its values, and in which runs."""
    found = []
    for key in dict.fromkeys(key for each in of_runs.values() for key in each):
        values: dict[str, list[tuple[str, int]]] = {}
        for run, each in of_runs.items():
            values.setdefault(each.get(key, "not set"), []).append(run)
        if len(values) > 1:
            usual, *others = sorted(values, key=lambda value: -len(values[value]))
            words = [f"{value} in {_in_words(values[value], of_runs)}" for value in (usual, *others)]
            found.append(f"runs differ in {key}: {'; '.join(words)}")
    return found


def _in_words(runs: Sequence[tuple[str, int]], of: Mapping[tuple[str, int], Any]) -> str:
    """Names of students, with seeds where not all runs of a student are meant."""
    parts = []
    for title in dict.fromkeys(title for title, _ in runs):
        seeds, all_seeds = ([seed for name, seed in some if name == title] for some in (runs, of))
        parts.append(title if seeds == all_seeds else f"{title} (seed {', '.join(map(str, seeds))})")
    return ", ".join(parts)


def _audit(runs: Sequence[Run]) -> list[dict]:
    """The settings that differ from the recipe's, and the runs in which they do."""
    known = {run.key: run for run in runs if run.record is not None}
    found: dict[str, dict] = {}
    for key, run in known.items():
        for row in (run.record.deviations if run.record else None) or ():
            found.setdefault(json.dumps([row["key"], row["here"]], default=str), {**row, "runs": []})["runs"].append(
                key
            )
    return [
        {**row, "runs": "all" if len(row["runs"]) == len(known) else _in_words(row["runs"], known)}
        for row in found.values()
    ]


# --- numbers ---


def _compared(students: Sequence[Student]) -> tuple[list[Student], Comparison]:
    """The students whose predictions are of the same images as the first one's, and how they compare."""
    known = {}
    for run in (run for student in students for run in student.runs if run.correct is not None):
        report = next(run.reports[kind] for kind in _WEIGHTS if kind in run.reports)
        known.setdefault(report["digest"], {}).setdefault(run.key[0], []).append(run.correct)
    found = max(known.values(), key=len, default={})
    if not found:
        return [], compare_students(np.zeros((0, 0), bool), [])
    owner = [place for place, mine in enumerate(found.values()) for _ in mine]
    comparison = compare_students(np.stack([row for mine in found.values() for row in mine]), owner)
    return [student for student in students if student.title in found], comparison


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


def _fronts(
    students: Sequence[Student], compared: Sequence[Student], comparison: Comparison, results: StudyResults, kind: str
) -> dict[str, list[Point]]:
    """The points of each backend by its title. Speeds and places on the front go into what is measured of a student."""
    rows = read_json(results.speed).get("rows", []) if results.speed else []
    panels = {}
    for backend in dict.fromkeys(row["backend"] for row in rows if "images_per_s" in row):
        mine = {row["model"]: row for row in rows if row["backend"] == backend and "images_per_s" in row}
        known = [(each, mine[model]) for each in students if (model := results.speed_models.get(each.title)) in mine]
        title = f"{backend}: {known[0][1]['precision']}, batch {known[0][1]['batch']}" if known else backend
        for student, row in known:
            student.measured[title] = {key: row[key] for key in ("images_per_s", "min", "max")}
        placed = [(student, row) for student, row in known if student in compared]
        accuracy = {student.title: comparison.top1[compared.index(student)] for student, _ in placed}
        on_front = front.pareto_front([(accuracy[student.title], row["images_per_s"]) for student, row in placed])
        panels[title] = []
        for (student, row), is_on_front in zip(placed, on_front, strict=True):
            faster = [compared.index(other) for other, its in placed if its["images_per_s"] > row["images_per_s"]]
            is_sure = bool(comparison.distinguishable[compared.index(student), faster].all())
            student.measured[title]["front"] = ("front" if is_sure else "front?") if is_on_front else ""
            interval, speed = (student.row["low"], student.row["high"]), row["images_per_s"]
            panels[title].append(Point(student.title, accuracy[student.title], speed, interval, on_front=is_on_front))
            if student.row["paper"] is not None:
                panels[title].append(Point(f"{student.title}, paper", student.row["paper"], speed, None, True))
    return {title: points for title, points in panels.items() if points}


def _pairs(students: Sequence[Student], comparison: Comparison) -> list[dict]:
    """Each pair of students, the better one first."""
    order = np.argsort(-comparison.top1, kind="stable").tolist()
    return [
        {
            "a": students[i].title,
            "b": students[j].title,
            "difference": float(comparison.difference[i, j]),
            "interval_alone": comparison.interval_alone[i, j].tolist(),
            "interval": comparison.interval[i, j].tolist(),
            "distinguishable": bool(comparison.distinguishable[i, j]),
        }
        for i, j in itertools.combinations(order, 2)
    ]


# --- writing ---


def _curves(runs: Sequence[Run], kind: str) -> list[Chart]:
    """The curves of all runs; seeds of a student have its color, and one entry of the legend."""
    series = {"loss": "train/loss", "top1": f"eval/{kind}/top1", "agreement": "train/agreement"}
    titles_of = {"top1": f"Validation accuracy, {_WEIGHTS[kind]}", "agreement": "Agreement of student and teacher"}
    kinds = [
        dataclasses.replace(chart, title=titles_of.get(chart.name, chart.title), series={"": series[chart.name]})
        for chart in CHARTS
        if chart.name in series
    ]
    records = [run.record for run in runs if run.record is not None]
    titles = list(dict.fromkeys(record.name for record in records))
    return [
        dataclasses.replace(
            chart,
            marks=(),  # A study that was killed and completed looks like one that was not.
            curves=[
                dataclasses.replace(curve, color=titles.index(curve.label) if len(records) > 1 else 0)
                for curve in chart.curves
            ],
        )
        for chart in charts(records, kinds)
    ]


def _csv(students: Sequence[Student]) -> str:
    """A line for each student; what was timed is in the last columns."""
    rows = []
    for student in students:
        flat = {key: value for key, value in student.measured.items() if not isinstance(value, dict)}
        for backend, speed in ((key, value) for key, value in student.measured.items() if isinstance(value, dict)):
            flat |= {f"{backend} {key}": value for key, value in speed.items()}
        rows.append(({"student": student.title, **student.row}, flat))
    names = [list(dict.fromkeys(key for row in rows for key in row[part])) for part in (0, 1)]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names[0], *names[1]], lineterminator="\n")
    writer.writeheader()
    for row, measured in rows:
        cells = {**row, "kwargs": json.dumps(row["kwargs"]), **measured}
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
        "measured": {"seconds": results.seconds, "students": {each.title: each.measured for each in students}},
        "commands": {
            **results.commands,
            **{f"{run.result.title}, seed {run.result.seed}": run.result.commands for run in runs},
        },
    }


def _link(out: Path, path: Path) -> str:
    """The address of a file as the page needs it, "" where there is none."""
    return urllib.parse.quote(os.fsencode(os.path.relpath(path, out))) if path.exists() else ""
