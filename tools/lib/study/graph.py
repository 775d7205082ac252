"""The graph of a study, from top to bottom: which commands there are, and which of them need the result of which.

    shards -> teacher -> store -> train each student and seed -> evaluate -> export -> speed -> report

A result depends on its stage's facts and on what the stage needs, and on nothing else: what changes no result, such as
a number of threads, is no fact.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.machine import expanded
from pipelines.plan.plan import IMAGENET_MEAN_RGB
from tools.lib.study.settings import Student, Study
from tools.lib.study.stage import SETTINGS, Stage, content_of
from trainer.config.natures import flat, setting_natures
from trainer.config.sections import Config, to_yaml
from trainer.state.checkpoint import BEST, checkpoints_folder

Settings = dict[str, Any]  # SECTION.NAME -> value


@dataclasses.dataclass(frozen=True)
class StudentStages:
    """The stages of a student with one seed.

    Attributes:
      config: of its training.
      differs: settings of the plan that this student alone has; its teacher is then live, since no store fits.
      evaluations: by what is evaluated, a kind of weights or a suite.
    """

    student: Student
    seed: int
    config: Config
    differs: list[str]
    train: Stage
    evaluations: dict[str, Stage]
    export: Stage

    @property
    def stages(self) -> list[Stage]:
        """All of them in their order."""
        return [self.train, *self.evaluations.values(), self.export]


@dataclasses.dataclass(frozen=True)
class Graph:
    """All stages of a study but the measurement of speed, which takes the students that are there by then.

    Attributes:
      dataset: folder of the shards; epochs: that the store holds, 0 without one.
      common: stages that are no student's, by their kind.
    """

    dataset: Path
    epochs: int
    common: dict[str, Stage]
    students: list[StudentStages]

    @property
    def stages(self) -> list[Stage]:
        """All stages, each behind those that it needs."""
        return [*self.common.values(), *(stage for each in self.students for stage in each.stages)]


def build_graph(study: Study, out: Path) -> Graph:
    """The graph of a study in a folder. Reads what it names; writes nothing.

    Raises:
      UserError: settings that do not parse, or two students that are the same.
    """
    stages: dict[str, Stage] = {}
    if study.source is None:
        dataset = expanded(str(study.dataset)).resolve()
        given = {"dataset": content_of(str(dataset))}
    else:
        stages["shards"] = shards_stage(study.source, out)
        dataset, given = stages["shards"].product, {}

    # One fill colour gives all students the same pixels.
    common: Settings = {"data.root": dataset, "teacher.name": None}
    common["augment.fill"] = load(study, common).augment.fill or IMAGENET_MEAN_RGB
    if study.teacher is not None and study.teacher.epochs:
        common["augment.cycle_epochs"] = study.teacher.epochs
    base = load(study, common)
    configs = [load(study, {**common, **each.overrides}, f"students[{n}]") for n, each in enumerate(study.students)]

    live, recorded, epochs = {}, {}, 0  # What students learn from: nothing, or the teacher itself, or the store.
    if study.teacher is not None:
        live = {"teacher.name": study.teacher.name, "teacher.kwargs": study.teacher.kwargs}
        if study.teacher.checkpoint is not None:
            live["teacher.checkpoint"] = expanded(study.teacher.checkpoint).resolve()
        if study.teacher.train is not None:
            stages["teacher"] = teacher_stage(study, out, common, given, tuple(stages.values()))
            live["teacher.checkpoint"] = checkpoints_folder(stages["teacher"].product) / BEST
        epochs = base.augment.cycle_epochs or max(each.schedule.total_epochs for each in configs)
        store = store_stage(study, out, {**common, **live}, epochs, given, tuple(stages.values()))
        recorded = {"teacher.name": study.teacher.name, "teacher.store": store.product}
        stages["store"] = store

    students = []
    for student, config in zip(study.students, configs, strict=True):
        differs = [key for key, value in flat(config).items() if is_of_plan(key) and value != flat(base)[key]]
        # The last of the common stages are the teacher and the store; a student needs the one that it learns from.
        needs = tuple(stage for kind, stage in stages.items() if not (differs and kind == "store"))[-1:]
        for seed in student.seeds:
            model = {"student.name": student.name, "student.kwargs": student.kwargs, "student.seed": seed}
            changed = {**common, **(live if differs else recorded), **student.overrides, **model}
            students.append(student_stages(study, out, student, seed, changed, differs, given, needs))
    graph = Graph(dataset, epochs, stages, students)
    check_distinct(graph.stages)
    return graph


def shards_stage(source: str, out: Path) -> Stage:
    """The conversion of images to shards."""
    images = out / source if source == "digits" else expanded(source).resolve()
    facts = {"source": source if source == "digits" else str(images)}
    stage = Stage(out, "shards", "", "dataset", facts, product_name="dataset")
    return stage.with_command("tools/shard_imagenet.py", "build", images, stage.product)


def teacher_stage(study: Study, out: Path, common: Settings, given: dict, needs: tuple[Stage, ...]) -> Stage:
    """The training of the teacher, on labels alone."""
    assert study.teacher is not None and study.teacher.train is not None
    model = {"student.name": study.teacher.name, "student.kwargs": study.teacher.kwargs}
    changed = {**common, **study.teacher.train, **model}
    slug = slug_of(study.teacher.name)
    return training("teacher", "", slug, study, out, changed, given, needs, "teacher.train")[0]


def store_stage(
    study: Study, out: Path, changed: Settings, epochs: int, given: dict, needs: tuple[Stage, ...]
) -> Stage:
    """The recording of the teacher for the longest of the trainings."""
    assert study.teacher is not None
    config, codec = load(study, changed), study.teacher.codec
    of_pixels = ("data.pipeline", "data.decode")
    facts = {
        key: value
        for key, value in facts_of(config, out).items()
        if is_of_plan(key) or key.startswith("teacher.") or key in of_pixels
    }
    facts |= {"codec": codec, "epochs": epochs, **given}
    stage = Stage(out, "store", "", slug_of(study.teacher.name), facts, needs, "store")
    words = ("--config", stage.folder / SETTINGS, "--codec", codec, "--epochs", epochs)
    return stage.with_command("tools/record_teacher.py", stage.product, *words, settings=to_yaml(config))


def student_stages(
    study: Study,
    out: Path,
    student: Student,
    seed: int,
    changed: Settings,
    differs: list[str],
    given: dict,
    needs: tuple[Stage, ...],
) -> StudentStages:
    """A student's training, and what follows it."""
    subject, slug = f"{student.label}-s{seed}", f"{slug_of(student.name)}-s{seed}"
    where = f"student {student.label}"
    train, config = training("train", subject, slug, study, out, changed, given, needs, where)
    weights = [kind for kind in study.evaluate.weights if config.ema.decay or kind == "raw"] or ["raw"]
    wanted = {kind: {"student.weights": kind} for kind in weights}
    wanted |= {name: {"student.weights": weights[0], **more} for name, more in study.evaluate.suites.items()}
    evaluations = {}
    for name, more in wanted.items():
        facts = {key: content_of(value) for key, value in more.items()}
        stage = Stage(out, f"evaluate {name}", subject, f"{slug}-{slug_of(name)}", facts, (train,), "report.json")
        options = {"data.root": changed["data.root"], "student.checkpoint": train.product, **more}
        options |= {"run.json": stage.product, "run.predictions": stage.product.with_suffix(".npz")}
        options |= {"run.device": config.run.device}
        evaluations[name] = stage.with_command("tools/evaluate.py", *as_options(options))
    measured = evaluations[weights[0]]
    export = Stage(out, "export", subject, slug, {"weights": weights[0]}, (train, measured), "model")
    options = {"weights": weights[0], "evaluation": measured.product}
    export = export.with_command("tools/export.py", train.product, export.product, *as_options(options))
    return StudentStages(student, seed, config, differs, train, evaluations, export)


def speed_stage(study: Study, graph: Graph) -> Stage | None:
    """The measurement of speed, once for all students that are exported by now; None where there are none of them.

    Speed does not depend on weights, so each student is measured with the first of its seeds that is there.
    """
    models: dict[str, Stage] = {}
    for each in graph.students:
        if each.export.is_done:
            models.setdefault(each.student.label, each.export)
    if study.speed is None or not models:
        return None
    facts, device = dataclasses.asdict(study.speed), graph.students[0].config.run.device
    out = graph.students[0].train.study
    stage = Stage(out, "speed", "", "comparison", facts, tuple(models.values()), "comparison.json")
    options = {"out": stage.folder, **facts, "device": None if device == "auto" else device}
    return stage.with_command("tools/compare.py", *(model.product for model in models.values()), *as_options(options))


# --- settings and facts ---


def load(study: Study, changed: Mapping[str, object], where: str = "recipe") -> Config:
    """The configuration of a training: the recipe with its overrides, and with what the study changes."""
    try:
        return Config.load(expanded(study.recipe.config), {**study.recipe.overrides, **changed})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def training(
    kind: str,
    subject: str,
    slug: str,
    study: Study,
    out: Path,
    changed: Settings,
    given: dict,
    needs: tuple[Stage, ...],
    where: str,
) -> tuple[Stage, Config]:
    """A training, and its configuration: its command reads a file of all settings, which stays while others change."""
    config = load(study, changed, where)
    facts = facts_of(config, out) | given
    others = [value for item in facts.items() if not item[0].startswith("student.") for value in item]
    stage = Stage(out, kind, subject, slug, facts, needs, "run", group=json.dumps(others))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=stage.product))
    stage = stage.with_command("trainer/run.py", "--config", stage.folder / SETTINGS, settings=to_yaml(config))
    return stage, config


def facts_of(config: Config, out: Path) -> Settings:
    """The settings that a result depends on, where they are not the default.

    Files that they name stand there by their content; what the study has made itself is a need and no fact.
    """
    natures, defaults, found = setting_natures(), flat(Config()), {}
    for key, value in flat(config).items():
        nature = natures[key]
        if nature.per_machine:
            if isinstance(value, str) and Path(value).is_file() and not Path(value).is_relative_to(out):
                found[key] = content_of(value)
        elif value != defaults[key] and (nature.recipe or nature.on_resume != "ignored"):
            found[key] = value
    return found


def is_of_plan(key: str) -> bool:
    """Whether a setting decides what the plan of all students is."""
    return setting_natures()[key].on_resume == "refused" and not key.startswith("student.")


def slug_of(name: str) -> str:
    """A name as the beginning of a folder's."""
    return re.sub(r"[^\w.-]+", "_", name)


def as_options(values: Mapping[str, object]) -> list[object]:
    """Values as words of a command line; those that are None are left out."""
    words: list[object] = []
    for name, value in values.items():
        if value is not None:
            many = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *many]
    return words


def check_distinct(stages: Iterable[Stage]) -> None:
    """Raise a UserError if two stages have one name or one folder."""
    names, folders = set(), {}
    for stage in stages:
        if stage.name in names:
            raise UserError(f"students: two of them are called '{stage.subject}'. Give one of them another title")
        if (other := folders.get(stage.folder)) is not None:
            raise UserError(f"students: '{stage.subject}' and '{other.subject}' are the same. Leave one of them out")
        names.add(stage.name)
        folders[stage.folder] = stage
