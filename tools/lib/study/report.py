"""The report of a study: study.json with all numbers, a page that shows them, and study.csv with a line a student.

Equal files give equal bytes. What differs between two equal studies, such as all that was timed, is under `measured` in
study.json, in the last columns of study.csv, and in the picture of speed.
"""

import collections
import csv
import dataclasses
import io
import itertools
import json
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common.errors import UserError, named
from pipelines.common.files import read_json, write_synced
from tools.lib.common import front
from tools.lib.common.evaluation import read_report
from tools.lib.common.units import human_seconds
from tools.lib.study.graph import Graph, StudentStages
from tools.lib.study.significance import compare_students, letters
from trainer.config.paper import PaperModel, paper_models
from trainer.config.recipe import AuditRow
from trainer.monitor.report.charts import CHARTS, Chart, draw
from trainer.monitor.report.page import PAGE, RunRecord, charts, embedded, read_run, template, text
from trainer.monitor.run_files import SUMMARY

# The weights that are evaluated on the validation images; other evaluations are suites.
_WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
_FAR_BELOW = 0.95  # An EMA that recognises a smaller fraction of what the raw weights do lags behind them.
_STUDENT_SETTINGS = {"student.name", "student.kwargs", "student.seed", "teacher.store"}  # They differ on purpose.
_SESSION_KEYS = ("device", "precision", "pipeline")
_EVALUATION_KEYS = ("digest", "images", *_SESSION_KEYS, "software", "image_size", "crop_pct")
_PAIR_KEYS = ("difference", "interval", "distinguishable")
_SPEED_KEYS = ("images_per_s", "min", "max", "front")
# Functions that the page calls.
_HELPERS = {"in_words": _WEIGHTS, "command": shlex.join, "named": named, "duration": human_seconds}
Columns = dict[str, Any]  # Numbers of a student by the column of study.csv.
Panels = dict[str, dict[str, front.Point]]  # Title of a backend, student -> its point in the picture of speed.


@dataclasses.dataclass(frozen=True)
class StudentRun:
    """The run of a student with one seed, and the reports of its evaluations that are done."""

    stages: StudentStages
    record: RunRecord
    reports: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """Student and seed."""
        return self.stages.train.subject

    @property
    def title(self) -> str:
        """The student's."""
        return self.stages.student.label

    @property
    def top1(self) -> dict[str, float]:
        """Accuracies in percent: of the weights after the last update, as the run or an evaluation of it has them."""
        found = {**self.record.summary.get("evaluation", {}), **self.reports}
        return {name: each["top1"] for name, each in found.items() if "top1" in each}


def write_report(graph: Graph) -> tuple[Path, str]:
    """Write the page, study.csv and study.json of what is there to the study's folder, over older ones.

    Returns:
      the page's path, and the result in a sentence, as `_result`.
    """
    runs, weights = [_student_run(stages) for stages in graph.students], graph.study.evaluate.weights[0]
    compared = _compared(runs, weights)
    by_student = {title: [*mine] for title, mine in itertools.groupby(runs, lambda run: run.title)}
    paper = {model.name: model for model in paper_models()} if graph.study.paper == "usi" else {}
    students = {title: _accuracies(mine, compared, paper) for title, mine in by_student.items()}
    pairs = _compare(compared, students, weights)
    students = dict(sorted(students.items(), key=lambda item: -(item[1][f"top1_{weights}"] or -1)))
    comparison = read_json(graph.common["speed"].product) if "speed" in graph.common else {}
    panels, machine = _panels(graph, comparison, students, pairs, weights), comparison.get("measured_on", "?")
    timed = {title: _timed(mine, panels) for title, mine in by_student.items()}
    deviations = {row["key"]: row for run in runs for row in run.record.summary.get("deviations", ())}
    conditions, teacher = _conditions(runs, deviations), graph.common.get("teacher")
    content = {
        "title": graph.study.title,
        "result": _result(students, weights),
        "weights": weights,
        "warnings": [*_warnings(graph, runs, compared, conditions, weights)],
        "teacher": read_json(teacher.product / SUMMARY).get("best") if teacher else None,
        "students": students,
        "pairs": pairs,
        "runs": {
            run.name: {"failure": run.stages.failure, "top1": run.top1, "best": run.record.summary.get("best")}
            for run in runs
        },
        "conditions": conditions,
        "commands": {stage.name: stage.noted.get("command", stage.command) for stage in graph.stages},
        "measured": {"students": timed, "speed_on": machine, **_measured(graph, runs)},
    }
    page = template(Path(__file__).with_name("study.html")).render(
        **content,
        **_HELPERS,
        graph=graph,
        paper=paper,
        deviations=deviations,
        panels=panels,
        front=_picture(panels, machine, weights),
        curves={chart.title: embedded(draw(chart)) for chart in _curves(runs, weights)},
    )
    graph.out.mkdir(parents=True, exist_ok=True)
    write_synced(graph.out / "study.csv", _csv(students, timed).encode())
    write_synced(graph.out / "study.json", f"{json.dumps(content, indent=1)}\n".encode())
    write_synced(graph.out / PAGE, page.encode("utf-8", "backslashreplace"))
    return graph.out / PAGE, content["result"]


# --- what the stages have left behind ---


def _student_run(stages: StudentStages) -> StudentRun:
    folder, title = stages.train.product, stages.student.label
    try:
        record = read_run(folder, title)
    except UserError:  # The run has not made its folder.
        record = RunRecord(folder, title, config={}, lines=[], summary={}, num_damaged=0, unusable=[])
    done = {name: stage.product for name, stage in stages.evaluations.items() if stage.is_done}
    return StudentRun(stages, record, {name: read_report(path, dict) for name, path in done.items()})


def _accuracies(runs: Sequence[StudentRun], compared: Sequence[StudentRun], paper: Mapping[str, PaperModel]) -> Columns:
    """The size of a student and its accuracies, over those of its runs that are compared, if any are."""
    student, shown = runs[0].stages.student, [run for run in runs if run in compared] or runs
    row: Columns = {"name": student.name, "kwargs": json.dumps(student.kwargs), "seeds": len(runs)}
    row["seeds_done"] = sum(not run.stages.failure for run in runs)
    for name in dict.fromkeys([*_WEIGHTS, *runs[0].stages.evaluations]):
        values = [run.top1[name] for run in shown if name in run.top1]
        row[f"top1_{name}"] = statistics.mean(values) if values else None
        row[f"sd_{name}"] = statistics.stdev(values) if len(values) > 1 else None
    row["parameters"] = next((each["parameters"] for run in runs for each in run.reports.values()), None)
    return {**row, "paper": paper[student.name].top1 if student.name in paper else None}


def _timed(runs: Sequence[StudentRun], panels: Panels) -> Columns:
    """The time of a student's trainings, their speed where it was trained alone, and its own speed on each backend."""
    done = [run.record for run in runs if run.stages.train.is_done]
    alone = [record for record in done if not any(line.get("together") for line in record.of("session"))]
    speeds = [line["images_per_s"] for record in alone for line in record.of("train")]
    hours = sum(run.stages.train.seconds for run in runs) / 3600  # A stage is one process, on one device.
    row = {"train_images_per_s": statistics.median(speeds) if speeds else None, "device_hours": hours}
    for backend, points in panels.items():
        if (point := points.get(runs[0].title)) is not None:
            row |= {f"{backend}, {key}": getattr(point, key) for key in _SPEED_KEYS}
    return row


def _measured(graph: Graph, runs: Sequence[StudentRun]) -> dict[str, Any]:
    """Collect what may differ between equal studies: warnings of commands, what runs log of the teacher, and times."""
    warnings, key = collections.defaultdict(list), "teacher_top1"
    for stage in graph.stages:
        for line in stage.warnings:
            line = re.sub(r"\S*/export/(\S+)-[0-9a-f]{8}/model", r"\1", line).replace(f"{graph.out}/", "")
            warnings[line.replace("--repeats", "speed.repeats")].append(stage.name)
    teacher = {run.name: [line[key] for line in run.record.of("train") if key in line] for run in runs}
    return {
        "warnings": [f"{named(stages, 4)}: {line}" for line, stages in warnings.items()],
        key: {name: statistics.mean(top1) for name, top1 in teacher.items() if top1},
        "seconds": {stage.name: stage.seconds for stage in graph.stages if stage.seconds},
    }


# --- what a reader must know before the numbers ---


def _conditions(runs: Sequence[StudentRun], deviations: Mapping[str, AuditRow]) -> dict[str, dict[str, list[str]]]:
    """Collect what runs should have in common: name -> value -> the runs that have it.

    Runs that have not ended are left out, for they have no result.
    """
    ended, found = [run for run in runs if run.record.summary], {}
    inputs = dict.fromkeys(key for run in ended for key in run.stages.train.inputs)
    for run in ended:
        summary = run.record.summary
        here = {row["key"]: row["here"] for row in summary["deviations"]}
        conditions: dict[str, object] = {key: run.stages.train.inputs.get(key, "default") for key in inputs}
        conditions |= {key: here.get(key, row["usi"]) for key, row in deviations.items()}
        for key in _SESSION_KEYS:  # A run may have been resumed on another device. Old sessions have fewer keys.
            if values := sorted({str(line[key]) for line in run.record.of("session") if key in line}):
                conditions[f"{key} of the training"] = " and ".join(values)
        conditions["version of the code"] = [summary["version"], summary["source"]]
        conditions["digest of the dataset"] = summary["dataset"]
        conditions["number of damaged images"] = run.record.num_damaged
        for name, report in run.reports.items():
            conditions |= {f"evaluation {name}, {key}": {**report, **report["view"]}[key] for key in _EVALUATION_KEYS}
        for name, value in conditions.items():
            found.setdefault(name, {}).setdefault(text(value), []).append(run.name)
    return found


def _warnings(
    graph: Graph,
    runs: Sequence[StudentRun],
    compared: Sequence[StudentRun],
    conditions: Mapping[str, Mapping],
    weights: str,
) -> Iterator[str]:
    """The sentences that a reader must know before the numbers."""
    yield from (f"stage {stage.name} has failed: {stage.failure}" for stage in graph.common.values() if stage.failure)
    yield from (f"{run.name} is not complete: {run.stages.failure}" for run in runs if run.stages.failure)
    for run in (run for run in runs if run not in compared):
        if weights in run.reports:
            yield f"{run.name} is not compared: it was evaluated on other images than {compared[0].name}"
    if live := [run.name for run in compared if run.name in graph.learning_live]:
        yield f"{named(live)} learned from the live teacher, because no recording fits the settings"
    for name, values in conditions.items():
        is_the_students = name.partition(" ")[0] in _STUDENT_SETTINGS or (live and name.startswith("teacher."))
        if len(values) > 1 and not is_the_students:
            words = [f"{value} in {named(names, 4)}" for value, names in values.items()]
            yield f"runs differ in {name}: {'; '.join(words)}"
    if compared and len(compared) == len({run.title for run in compared}):
        yield "each student has one seed, so intervals are over images alone: another seed may differ by more"
    both = [(run.name, run.top1["ema"], run.top1["raw"]) for run in compared if {*_WEIGHTS} <= {*run.top1}]
    lagging = [f"{name} {ema:.2f} % against {raw:.2f} %" for name, ema, raw in both if ema < _FAR_BELOW * raw]
    if lagging and weights == "ema":
        yield (
            f"EMA weights are compared, and recognise far fewer images than the raw weights: {named(lagging, 4)}. To "
            "compare the raw weights, for which nothing is trained again, set evaluate.weights: [raw, ema] in the "
            "study's file. Or train again with ema.warmup: true or a smaller ema.decay in recipe.overrides"
        )


# --- accuracy and speed ---


def _compared(runs: Sequence[StudentRun], weights: str) -> list[StudentRun]:
    """The runs whose weights were evaluated on the same images; of several such groups that of the most students."""
    groups: dict[str, list[StudentRun]] = collections.defaultdict(list)
    for run in (run for run in runs if weights in run.reports):
        groups[run.reports[weights]["digest"]].append(run)
    return max(groups.values(), key=lambda group: len({run.title for run in group}), default=[])


def _compare(compared: Sequence[StudentRun], students: Mapping[str, Columns], weights: str) -> list[dict[str, Any]]:
    """Each pair of students of the runs that are compared, the better one first.

    Intervals and letters go into the columns of these students.
    """
    if not compared:
        return []
    titles, correct = [*dict.fromkeys(run.title for run in compared)], []
    for run in compared:
        with np.load(run.stages.evaluations[weights].product.with_suffix(".npz")) as predictions:
            correct.append(predictions["top"][:, 0] == predictions["label"])
    found = compare_students(np.stack(correct), [titles.index(run.title) for run in compared])
    groups = letters(found.top1, found.distinguishable)
    for title, (low, high), group in zip(titles, found.top1_interval.tolist(), groups, strict=True):
        students[title].update(images=len(correct[0]), low=low, high=high, letters=group)
    return [
        {"a": titles[i], "b": titles[j], **{key: getattr(found, key)[i, j].tolist() for key in _PAIR_KEYS}}
        for i, j in itertools.combinations(np.argsort(-found.top1, kind="stable").tolist(), 2)
    ]


def _result(students: Mapping[str, Columns], weights: str) -> str:
    """The result in a sentence; "" where no two students are compared."""
    letters_of = {title: row["letters"].split() for title, row in students.items() if "letters" in row}
    leaders = [title for title, mine in letters_of.items() if "a" in mine]
    if len(letters_of) < 2:
        return ""
    by = f"by the top-1 of the {_WEIGHTS[weights]}"
    if len(leaders) == len(letters_of):
        return f"No two of the {len(leaders)} students that are compared are distinguishable {by}."
    several = f"{named(leaders, 4)} lead, and are not distinguishable"
    lead = several if len(leaders) > 1 else f"{leaders[0]} leads, and is distinguishable from each other one"
    return f"Of the {len(letters_of)} students that are compared, {lead}, {by}."


def _panels(
    graph: Graph, comparison: Mapping, students: Mapping[str, Columns], pairs: Sequence[Mapping], weights: str
) -> Panels:
    """The points of the students that are compared, on each backend of a comparison of speeds."""
    exports = {each.export.folder.name: each.student.label for each in graph.students}  # A study's folder may be moved.
    speeds = collections.defaultdict(dict)  # Title of the backend, student -> its row of tools/compare.py.
    for row in (row for row in comparison.get("rows", []) if "images_per_s" in row):
        title = exports.get(Path(row["model"]).parent.name)
        if title is not None and "letters" in students[title]:
            speeds[f"{row['backend']}: {row['precision']}, batches of {row['batch']}"][title] = row
    better = {(pair["a"], pair["b"]) for pair in pairs if pair["distinguishable"]}

    def point(title: str, mine: Mapping[str, Mapping]) -> front.Point:
        top1, low, high = (students[title][key] for key in (f"top1_{weights}", "low", "high"))
        speed = mine[title]["images_per_s"], mine[title]["min"], mine[title]["max"]
        return front.Point(title, top1, *speed, _standing(title, mine, better), (low, high))

    return {backend: {title: point(title, mine) for title in mine} for backend, mine in speeds.items()}


def _standing(title: str, rows: Mapping[str, Mapping], better: set[tuple[str, str]]) -> str:
    """Whether a student is on the front of a backend, as far as noise lets anybody know.

    It is not where another one is surely faster, which a lower rank in tools/compare.py says, and distinguishably more
    accurate. It surely is where each other one is surely slower or distinguishably less accurate.

    Args:
      better: pairs of students, the first of which is distinguishably more accurate.
    """
    rank, others = rows[title]["rank"], {other: row["rank"] for other, row in rows.items() if other != title}
    if all((title, other) in better or rank < its for other, its in others.items()):
        return front.FRONT
    is_behind = any((other, title) in better and its < rank for other, its in others.items())
    return front.BEHIND if is_behind else front.PERHAPS


# --- writing ---


def _picture(panels: Panels, machine: str, weights: str) -> str:
    """The picture of accuracy and speed, as the address of itself; "" where no speed is known."""
    if not panels:
        return ""
    points, words = {name: [*mine.values()] for name, mine in panels.items()}, f"{_WEIGHTS[weights]}, mean over seeds"
    return embedded(front.picture(points, f"Accuracy and speed on {machine}", {False: words}))


def _curves(runs: Sequence[StudentRun], weights: str) -> list[Chart]:
    """The curves of all runs; seeds of a student have its color, and one entry of the legend."""
    shown = {"loss": "train/loss", "top1": f"eval/{weights}/top1", "agreement": "train/agreement"}
    kinds = [dataclasses.replace(each, series={"": shown[each.name]}) for each in CHARTS if each.name in shown]
    titles = {"top1": f"Validation accuracy, {_WEIGHTS[weights]}", "agreement": "Agreement with the teacher"}
    found = charts([run.record for run in runs if run.record.lines], kinds)
    # Without marks a study that was killed and completed looks like one that was not.
    return [dataclasses.replace(chart, title=titles.get(chart.name, chart.title), marks=()) for chart in found]


def _csv(students: Mapping[str, Columns], timed: Mapping[str, Columns]) -> str:
    """A line for each student; what was timed is in the last columns."""
    file = io.StringIO()
    columns = dict.fromkeys(itertools.chain(*students.values(), *timed.values()))
    writer = csv.DictWriter(file, ["student", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"student": title, **row, **timed[title]} for title, row in students.items())
    return file.getvalue()
