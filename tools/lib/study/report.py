"""The report of a study: study.json with all numbers, a page that shows them, and study.csv with a line a student.

Equal files give equal bytes. What differs between two equal studies, such as all that was timed, is under `measured` in
study.json, in the last columns of study.csv, and in the picture of speed.
"""

import csv
import dataclasses
import io
import itertools
import json
import shlex
import statistics
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
from trainer.monitor.run_files import SUMMARY

# The weights that are evaluated on the validation images; other evaluations are suites.
_WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
_FAR_BELOW = 0.95  # An EMA that recognises a smaller fraction of what the raw weights do lags behind them.
_OF_THE_STUDENT = {"student.name", "student.kwargs", "student.seed", "teacher.store"}
_OF_EVALUATIONS = ("digest", "images", "precision", "pipeline", "software", "image_size", "crop_pct")
_OF_PAIRS = ("difference", "interval_alone", "interval", "distinguishable")
Columns = dict[str, Any]  # Numbers of a student by the column of study.csv.


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """The run of a student with one seed, and its evaluations that are done."""

    stages: StudentStages
    record: RunRecord
    reports: dict[str, Report]

    @property
    def student(self) -> str:
        """The title of the student."""
        return self.stages.student.label

    @property
    def name(self) -> str:
        """Student and seed."""
        return self.stages.train.subject

    @property
    def is_trained_alone(self) -> bool:
        """Whether its training is done, in a process of its own."""
        command = self.stages.train.noted.get("command", [])
        return self.stages.train.is_done and not any(word.endswith("trainer/together.py") for word in command)

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
    seeds, wanted = [_seed_result(stages) for stages in graph.students], graph.study.evaluate.weights
    weights = next((each for each in (*wanted, "raw") if any(each in seed.reports for seed in seeds)), wanted[0])
    paper = {model.name: model for model in paper_models()} if graph.study.paper == "usi" else {}
    students: dict[str, Columns] = {}
    timed: dict[str, Columns] = {}
    for title, group in itertools.groupby(seeds, lambda seed: seed.student):
        students[title], timed[title] = _student([*group], paper)
    pairs = _compare(seeds, students, weights)
    panels = _panels(graph, students, timed, pairs, weights)
    conditions, teacher = _conditions(seeds), graph.common.get("teacher")
    content = {
        "title": graph.study.title,
        "weights": weights,
        "warnings": _warnings(graph, seeds, students, conditions, weights),
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
    title, legend = f"Accuracy ({_WEIGHTS[weights]}) and speed", {False: "mean over the seeds"}
    page = template(Path(__file__).with_name("study.html")).render(
        **content,
        graph=graph,
        in_words=_WEIGHTS,
        paper=paper,
        suites=[*dict.fromkeys(name for seed in seeds for name in seed.reports if name not in _WEIGHTS)],
        deviations=_deviations([seed for seed in seeds if seed.record.summary]),
        front=panels and embedded(front.picture(panels, title, legend)),
        backends=[*panels],
        curves={chart.title: embedded(draw(chart)) for chart in _curves(seeds, weights)},
        command=shlex.join,
        named=named,
        duration=human_seconds,
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
    return SeedResult(stages, record, {name: read_report(path, lambda report: report) for name, path in done.items()})


def _student(seeds: Sequence[SeedResult], paper: Mapping[str, PaperModel]) -> tuple[Columns, Columns]:
    """The accuracies of a student over its seeds, and its size; and what its trainings took."""
    student = seeds[0].stages.student
    row: Columns = {"name": student.name, "kwargs": json.dumps(student.kwargs)}
    failed = [any(stage.failure for stage in seed.stages.stages) for seed in seeds]
    row |= {"seeds": len(seeds), "failed": sum(failed)}
    row["not_done"] = sum(bool(seed.stages.failure) for seed in seeds) - row["failed"]
    for name in dict.fromkeys([*_WEIGHTS, *(name for seed in seeds for name in seed.top1)]):
        values = [seed.top1[name] for seed in seeds if name in seed.top1]
        row[f"top1_{name}"] = statistics.mean(values) if values else None
        row[f"sd_{name}"] = statistics.stdev(values) if len(values) > 1 else None
    row["parameters"] = next((each["parameters"] for seed in seeds for each in seed.reports.values()), None)
    row["paper"] = paper[student.name].top1 if student.name in paper else None
    speeds = [line["images_per_s"] for seed in seeds if seed.is_trained_alone for line in seed.record.of("train")]
    ranks = [line["ranks"] for seed in seeds for line in seed.record.of("session")[-1:]]
    hours = sum(seed.stages.train.seconds for seed in seeds) / 3600 * max(ranks, default=1)
    return row, {"train_images_per_s": statistics.median(speeds) if speeds else None, "device_hours": hours}


def _measured(graph: Graph, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """Collect what may differ between equal studies: warnings of commands, what runs log of the teacher, and times."""
    warnings: dict[str, list[str]] = {}
    for stage in graph.stages:
        for line in stage.warnings:
            line = line.replace(f"{graph.out}/", "").replace("--repeats", "speed.repeats")
            warnings.setdefault(line, []).append(stage.name)
    key = "teacher_top1"
    teacher = {seed.name: [line[key] for line in seed.record.of("train") if key in line] for seed in seeds}
    return {
        "warnings": [f"{named(stages, 4)}: {line}" for line, stages in warnings.items()],
        key: {name: statistics.mean(top1) for name, top1 in teacher.items() if top1},
        "devices": [*dict.fromkeys(line.get("device", "?") for seed in seeds for line in seed.record.of("session"))],
        "seconds": {stage.name: stage.seconds for stage in graph.stages if stage.seconds},
    }


# --- what a reader must know before the numbers ---


def _deviations(seeds: Sequence[SeedResult]) -> dict[str, AuditRow]:
    """A row of the audit for each setting that some run has other than the recipe."""
    return {row["key"]: row for seed in seeds for row in seed.record.deviations or ()}


def _conditions(seeds: Sequence[SeedResult]) -> dict[str, dict[str, str]]:
    """Collect what runs should have in common: name -> value -> which runs have it; the most common value is first.

    Runs that have not ended are left out, for they have no result.
    """
    ended, found = [seed for seed in seeds if seed.record.summary], {}
    known, inputs = _deviations(ended), dict.fromkeys(key for seed in ended for key in seed.stages.train.inputs)
    for seed in ended:
        here, summary = {row["key"]: row["here"] for row in seed.record.deviations or ()}, seed.record.summary
        conditions: dict[str, object] = {key: seed.stages.train.inputs.get(key, "default") for key in inputs}
        conditions |= {key: here.get(key, row["usi"]) for key, row in known.items()}
        conditions["version of the code"] = [summary["version"], summary["source"]]
        conditions["digest of the dataset"] = summary["dataset"]
        conditions["number of damaged images"] = seed.record.num_damaged
        for name, report in seed.reports.items():
            conditions |= {f"evaluation {name}, {key}": {**report, **report["view"]}[key] for key in _OF_EVALUATIONS}
        for name, value in conditions.items():
            found.setdefault(name, {}).setdefault(text(value), []).append(seed.name)
    return {
        name: {
            value: named(runs, 4) if len(runs) < len(ended) else "all runs"
            for value, runs in sorted(values.items(), key=lambda item: -len(item[1]))
        }
        for name, values in found.items()
    }


def _warnings(
    graph: Graph,
    seeds: Sequence[SeedResult],
    students: Mapping[str, Columns],
    conditions: Mapping[str, Mapping[str, str]],
    weights: str,
) -> list[str]:
    """Collect the sentences that a reader must know before the numbers."""
    found = [f"stage {stage.name} has failed: {stage.failure}" for stage in graph.common.values() if stage.failure]
    found += [f"{seed.name} is not complete: {seed.stages.failure}" for seed in seeds if seed.stages.failure]
    teachers = {seed.name: seed.stages.config.teacher for seed in seeds if seed.reports and "store" in graph.common}
    if live := [name for name, teacher in teachers.items() if teacher.name and not teacher.store]:
        found.append(f"{named(live)} learned from the live teacher, because the recording is of other images")
    for name, values in conditions.items():
        of_the_student = name.partition(" ")[0] in _OF_THE_STUDENT or (live and name.startswith("teacher."))
        if len(values) > 1 and not of_the_student:
            words = [f"{value} in {runs}" for value, runs in values.items()]
            found.append(f"runs differ in {name}: {'; '.join(words)}")
    evaluated = [seed.student for seed in seeds if weights in seed.reports]
    if evaluated and len(evaluated) == len({*evaluated}):
        found.append("each student has one seed: intervals are over images alone, another seed may differ by more")
    lagging = []
    for title, row in students.items():
        ema, raw = row["top1_ema"], row["top1_raw"]
        if weights == "ema" and None not in (ema, raw) and ema < _FAR_BELOW * raw:
            lagging.append(f"{title} {ema:.2f} % against {raw:.2f} %")
    if lagging:
        found.append(
            f"the EMA weights are compared, and are far below the raw weights: {', '.join(lagging)}. Compare the raw "
            "weights, with evaluate.weights: [raw, ema] in the study's file, or train again with ema.warmup: true or a "
            "smaller ema.decay in recipe.overrides"
        )
    return found


# --- accuracy and speed ---


def _compare(seeds: Sequence[SeedResult], students: Mapping[str, Columns], weights: str) -> list[dict[str, Any]]:
    """Each pair of the students that were evaluated on the same images, the better one first.

    Intervals and letters go into the columns of these students.
    """
    correct: dict[str, dict[str, list[np.ndarray]]] = {}  # Digest of the images, student -> bool [N] of each seed.
    for seed in (seed for seed in seeds if weights in seed.reports):
        path = seed.stages.evaluations[weights].product.with_suffix(".npz")
        if path.is_file():
            with np.load(path) as predictions:
                recognised = predictions["top"][:, 0] == predictions["label"]
            correct.setdefault(seed.reports[weights]["digest"], {}).setdefault(seed.student, []).append(recognised)
    if not correct:
        return []
    titles, of_seeds = zip(*max(correct.values(), key=len).items(), strict=True)
    owner = [place for place, mine in enumerate(of_seeds) for _ in mine]
    found = compare_students(np.concatenate(of_seeds), owner)
    groups = letters(found.top1, found.distinguishable)
    for title, (low, high), group in zip(titles, found.top1_interval.tolist(), groups, strict=True):
        students[title].update(images=len(of_seeds[0][0]), low=low, high=high, letters=group)
    return [
        {"a": titles[i], "b": titles[j], **{key: getattr(found, key)[i, j].tolist() for key in _OF_PAIRS}}
        for i, j in itertools.combinations(np.argsort(-found.top1, kind="stable").tolist(), 2)
    ]


def _panels(
    graph: Graph, students: Mapping[str, Columns], timed: Mapping[str, Columns], pairs: Sequence[Mapping], weights: str
) -> dict[str, list[front.Point]]:
    """The points of each backend by its title. Speeds, and who is on the front, go into what was timed of students."""
    compared = [each for each in graph.students if "letters" in students[each.student.label]]
    exported = {each.export.folder.name: each.student.label for each in compared}  # A study's folder may be moved.
    rows = read_json(graph.common["speed"].product).get("rows", []) if "speed" in graph.common else []
    backends: dict[str, dict[str, Mapping]] = {}  # Title of the backend, student -> its row of tools/compare.py.
    for row in (row for row in rows if "images_per_s" in row):
        backend = f"{row['backend']}: {row['precision']}, batches of {row['batch']}"
        if title := exported.get(Path(row["model"]).parent.name):
            backends.setdefault(backend, {})[title] = row
    panels = {}
    for backend, speeds in backends.items():
        panels[backend] = []
        for title, row in speeds.items():
            measured = {key: row[key] for key in ("images_per_s", "min", "max")}
            measured["front"] = _standing(title, speeds, pairs)
            timed[title].update({f"{backend}, {key}": value for key, value in measured.items()})
            interval = students[title]["low"], students[title]["high"]
            panels[backend].append(
                front.Point(title, students[title][f"top1_{weights}"], **measured, top1_interval=interval)
            )
    return panels


def _standing(title: str, speeds: Mapping[str, Mapping], pairs: Sequence[Mapping]) -> str:
    """Whether a student is on the front of a backend, as far as noise lets anybody know.

    It is not where another one is surely faster, which a lower rank in tools/compare.py says, and distinguishably more
    accurate. It surely is where each other one is surely slower or distinguishably less accurate.
    """
    better = {(pair["a"], pair["b"]) for pair in pairs if pair["distinguishable"]}
    mine, others = speeds[title], {other: row for other, row in speeds.items() if other != title}
    if all((title, other) in better or mine["rank"] < row["rank"] for other, row in others.items()):
        return front.FRONT
    faster = [other for other, row in others.items() if row["rank"] < mine["rank"]]
    return front.BEHIND if any((other, title) in better for other in faster) else front.PERHAPS


# --- writing ---


def _curves(seeds: Sequence[SeedResult], weights: str) -> list[Chart]:
    """The curves of all runs; seeds of a student have its color, and one entry of the legend."""
    shown = {"loss": "train/loss", "top1": f"eval/{weights}/top1", "agreement": "train/agreement"}
    kinds = [dataclasses.replace(each, series={"": shown[each.name]}) for each in CHARTS if each.name in shown]
    titles = {"top1": f"Validation accuracy, {_WEIGHTS[weights]}"}
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
