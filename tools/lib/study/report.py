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
_OF_THE_STUDENT = {"student.name", "student.kwargs", "student.seed", "teacher.store"}
_OF_EVALUATIONS = ("digest", "images", "precision", "pipeline", "software", "image_size", "crop_pct")
_OF_PAIRS = ("difference", "interval_alone", "interval", "distinguishable")
_OF_SPEED = ("images_per_s", "min", "max", "front")
# What the page calls.
_HELPERS = {"in_words": _WEIGHTS, "command": shlex.join, "named": named, "duration": human_seconds}
Columns = dict[str, Any]  # Numbers of a student by the column of study.csv.
Panels = dict[str, dict[str, front.Point]]  # Title of a backend, student -> its point in the picture of speed.


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """The run of a student with one seed, and the reports of its evaluations that are done."""

    stages: StudentStages
    record: RunRecord
    reports: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """Student and seed."""
        return self.stages.train.subject

    @property
    def top1(self) -> dict[str, float]:
        """Accuracies in percent: of the weights after the last update, as the run or an evaluation of it has them."""
        found = {**self.record.summary.get("evaluation", {}), **self.reports}
        return {name: each["top1"] for name, each in found.items() if "top1" in each}


def write_report(graph: Graph) -> Path:
    """Write the page, study.csv and study.json of what is there to the study's folder, over older ones.

    Returns:
      the page's path.
    """
    seeds, wanted = [_seed_result(stages) for stages in graph.students], (*graph.study.evaluate.weights, "raw")
    weights = next(kind for kind in wanted if any(kind in seed.stages.evaluations for seed in seeds))
    of_students = {title: [*mine] for title, mine in itertools.groupby(seeds, lambda seed: seed.stages.student.label)}
    paper = {model.name: model for model in paper_models()} if graph.study.paper == "usi" else {}
    students = {title: _accuracies(mine, paper) for title, mine in of_students.items()}
    pairs = _compare(seeds, students, weights)
    panels = _panels(graph, students, pairs, weights)
    timed = {title: _timed(title, mine, panels) for title, mine in of_students.items()}
    deviations = {row["key"]: row for seed in seeds for row in seed.record.summary.get("deviations", ())}
    conditions, teacher = _conditions(seeds, deviations), graph.common.get("teacher")
    content = {
        "title": graph.study.title,
        "weights": weights,
        "warnings": [*_warnings(graph, seeds, conditions, weights)],
        "teacher": read_json(teacher.product / SUMMARY).get("best") if teacher else None,
        "students": dict(sorted(students.items(), key=lambda item: -(item[1][f"top1_{weights}"] or -1))),
        "pairs": pairs,
        "runs": {
            seed.name: {"failure": seed.stages.failure, "top1": seed.top1, "best": seed.record.summary.get("best")}
            for seed in seeds
        },
        "conditions": conditions,
        "commands": {stage.name: stage.noted.get("command", stage.command) for stage in graph.stages},
        "measured": {"students": timed, **_measured(graph, seeds)},
    }
    page = template(Path(__file__).with_name("study.html")).render(
        **content,
        **_HELPERS,
        graph=graph,
        paper=paper,
        deviations=deviations,
        panels=panels,
        front=_picture(panels, weights),
        curves={chart.title: embedded(draw(chart)) for chart in _curves(seeds, weights)},
    )
    graph.out.mkdir(parents=True, exist_ok=True)
    write_synced(graph.out / "study.csv", _csv(content["students"], timed).encode())
    write_synced(graph.out / "study.json", f"{json.dumps(content, indent=1)}\n".encode())
    write_synced(graph.out / PAGE, page.encode("utf-8", "backslashreplace"))
    return graph.out / PAGE


# --- what the stages have left behind ---


def _seed_result(stages: StudentStages) -> SeedResult:
    folder, title = stages.train.product, stages.student.label
    try:
        record = read_run(folder, title)
    except UserError:  # The run has not made its folder.
        record = RunRecord(folder, title, config={}, lines=[], summary={}, num_damaged=0, unusable=[])
    done = {name: stage.product for name, stage in stages.evaluations.items() if stage.is_done}
    return SeedResult(stages, record, {name: read_report(path, dict) for name, path in done.items()})


def _accuracies(seeds: Sequence[SeedResult], paper: Mapping[str, PaperModel]) -> Columns:
    """The accuracies of a student over its seeds, and its size."""
    student = seeds[0].stages.student
    row: Columns = {"name": student.name, "kwargs": json.dumps(student.kwargs), "seeds": len(seeds)}
    row["seeds_done"] = sum(not seed.stages.failure for seed in seeds)
    for name in dict.fromkeys([*_WEIGHTS, *seeds[0].stages.evaluations]):
        values = [seed.top1[name] for seed in seeds if name in seed.top1]
        row[f"top1_{name}"] = statistics.mean(values) if values else None
        row[f"sd_{name}"] = statistics.stdev(values) if len(values) > 1 else None
    row["parameters"] = next((each["parameters"] for seed in seeds for each in seed.reports.values()), None)
    return {**row, "paper": paper[student.name].top1 if student.name in paper else None}


def _timed(title: str, seeds: Sequence[SeedResult], panels: Panels) -> Columns:
    """The time of a student's trainings, their speed where it was trained alone, and its own speed on each backend."""
    done = [seed for seed in seeds if seed.stages.train.is_done]
    alone = [seed for seed in done if "trainer/together.py" not in " ".join(seed.stages.train.noted.get("command", ()))]
    speeds = [line["images_per_s"] for seed in alone for line in seed.record.of("train")]
    hours = sum(seed.stages.train.seconds for seed in seeds) / 3600  # A stage is one process, on one device.
    row = {"train_images_per_s": statistics.median(speeds) if speeds else None, "device_hours": hours}
    for backend, points in panels.items():
        if title in points:
            row |= {f"{backend}, {key}": getattr(points[title], key) for key in _OF_SPEED}
    return row


def _measured(graph: Graph, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """Collect what may differ between equal studies: warnings of commands, what runs log of the teacher, and times."""
    warnings, key = collections.defaultdict(list), "teacher_top1"
    for stage in graph.stages:
        for line in stage.warnings:
            line = re.sub(r"\S*/export/(\S+)-[0-9a-f]{8}/model", r"\1", line).replace(f"{graph.out}/", "")
            warnings[line.replace("--repeats", "speed.repeats")].append(stage.name)
    teacher = {seed.name: [line[key] for line in seed.record.of("train") if key in line] for seed in seeds}
    return {
        "warnings": [f"{named(stages, 4)}: {line}" for line, stages in warnings.items()],
        key: {name: statistics.mean(top1) for name, top1 in teacher.items() if top1},
        "devices": [*dict.fromkeys(line.get("device", "?") for seed in seeds for line in seed.record.of("session"))],
        "seconds": {stage.name: stage.seconds for stage in graph.stages if stage.seconds},
    }


# --- what a reader must know before the numbers ---


def _conditions(seeds: Sequence[SeedResult], deviations: Mapping[str, AuditRow]) -> dict[str, dict[str, list[str]]]:
    """Collect what runs should have in common: name -> value -> the runs that have it.

    Runs that have not ended are left out, for they have no result.
    """
    ended, found = [seed for seed in seeds if seed.record.summary], {}
    inputs = dict.fromkeys(key for seed in ended for key in seed.stages.train.inputs)
    for seed in ended:
        summary = seed.record.summary
        here = {row["key"]: row["here"] for row in summary["deviations"]}
        conditions: dict[str, object] = {key: seed.stages.train.inputs.get(key, "default") for key in inputs}
        conditions |= {key: here.get(key, row["usi"]) for key, row in deviations.items()}
        conditions["version of the code"] = [summary["version"], summary["source"]]
        conditions["digest of the dataset"] = summary["dataset"]
        conditions["number of damaged images"] = seed.record.num_damaged
        for name, report in seed.reports.items():
            conditions |= {f"evaluation {name}, {key}": {**report, **report["view"]}[key] for key in _OF_EVALUATIONS}
        for name, value in conditions.items():
            found.setdefault(name, {}).setdefault(text(value), []).append(seed.name)
    return found


def _warnings(graph: Graph, seeds: list[SeedResult], conditions: Mapping[str, Mapping], weights: str) -> Iterator[str]:
    """The sentences that a reader must know before the numbers."""
    yield from (f"stage {stage.name} has failed: {stage.failure}" for stage in graph.common.values() if stage.failure)
    yield from (f"{seed.name} is not complete: {seed.stages.failure}" for seed in seeds if seed.stages.failure)
    evaluated = [seed for seed in seeds if weights in seed.reports]
    if live := [seed.name for seed in evaluated if seed.name in graph.learning_live]:
        yield f"{named(live)} learned from the live teacher, because the recorded answers are about other images"
    for name, values in conditions.items():
        of_the_student = name.partition(" ")[0] in _OF_THE_STUDENT or (live and name.startswith("teacher."))
        if len(values) > 1 and not of_the_student:
            words = [f"{value} in {named(runs, 4)}" for value, runs in values.items()]
            yield f"runs differ in {name}: {'; '.join(words)}"
    if evaluated and len(evaluated) == len({seed.stages.student.label for seed in evaluated}):
        yield "each student has one seed, so intervals are over images alone: another seed may differ by more"
    both = [(seed.name, seed.top1["ema"], seed.top1["raw"]) for seed in evaluated if {*_WEIGHTS} <= {*seed.top1}]
    lagging = [f"{name} {ema:.2f} % against {raw:.2f} %" for name, ema, raw in both if ema < _FAR_BELOW * raw]
    if lagging and weights == "ema":
        yield (
            f"EMA weights are compared, and recognise far fewer images than the raw weights: {named(lagging, 4)}. To "
            "compare the raw weights, for which nothing is trained again, set evaluate.weights: [raw, ema] in the "
            "study's file. Or train again with ema.warmup: true or a smaller ema.decay in recipe.overrides"
        )


# --- accuracy and speed ---


def _compare(seeds: Sequence[SeedResult], students: Mapping[str, Columns], weights: str) -> list[dict[str, Any]]:
    """Each pair of the students that were evaluated on the same images, the better one first.

    Intervals and letters go into the columns of these students.
    """
    # Digest of the images, student -> bool [N] of each seed.
    correct: dict[str, dict[str, list[np.ndarray]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for seed in (seed for seed in seeds if weights in seed.reports):
        with np.load(seed.stages.evaluations[weights].product.with_suffix(".npz")) as predictions:
            recognised = predictions["top"][:, 0] == predictions["label"]
        correct[seed.reports[weights]["digest"]][seed.stages.student.label].append(recognised)
    if not correct:
        return []
    titles, of_seeds = zip(*max(correct.values(), key=len).items(), strict=True)
    found = compare_students(np.concatenate(of_seeds), [i for i, runs in enumerate(of_seeds) for _ in runs])
    groups = letters(found.top1, found.distinguishable)
    for title, (low, high), group in zip(titles, found.top1_interval.tolist(), groups, strict=True):
        students[title].update(images=len(of_seeds[0][0]), low=low, high=high, letters=group)
    return [
        {"a": titles[i], "b": titles[j], **{key: getattr(found, key)[i, j].tolist() for key in _OF_PAIRS}}
        for i, j in itertools.combinations(np.argsort(-found.top1, kind="stable").tolist(), 2)
    ]


def _panels(graph: Graph, students: Mapping[str, Columns], pairs: Sequence[Mapping], weights: str) -> Panels:
    """The points of the students that are compared, on each backend."""
    exports = {each.export.folder.name: each.student.label for each in graph.students}  # A study's folder may be moved.
    rows = read_json(graph.common["speed"].product).get("rows", []) if "speed" in graph.common else []
    speeds = collections.defaultdict(dict)  # Title of the backend, student -> its row of tools/compare.py.
    for row in (row for row in rows if "images_per_s" in row):
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


def _picture(panels: Panels, weights: str) -> str:
    """The picture of accuracy and speed, as the address of itself; "" where no speed is known."""
    title, points = f"Accuracy ({_WEIGHTS[weights]}) and speed", {name: [*of.values()] for name, of in panels.items()}
    return embedded(front.picture(points, title, {False: "mean over the seeds"})) if points else ""


def _curves(seeds: Sequence[SeedResult], weights: str) -> list[Chart]:
    """The curves of all runs; seeds of a student have its color, and one entry of the legend."""
    shown = {"loss": "train/loss", "top1": f"eval/{weights}/top1", "agreement": "train/agreement"}
    kinds = [dataclasses.replace(each, series={"": shown[each.name]}) for each in CHARTS if each.name in shown]
    titles = {"top1": f"Validation accuracy, {_WEIGHTS[weights]}", "agreement": "Agreement with the teacher"}
    found = charts([seed.record for seed in seeds if seed.record.lines], kinds)
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
