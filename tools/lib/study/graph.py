"""The graph of a study, from top to bottom: which commands there are, and which of them need the result of which.

    shards -> teacher -> store -> train each student and seed -> evaluate -> export -> speed -> report

A result depends on the stage's facts and on what it needs, and on nothing else. Where a setting changes no result, such
as a number of threads or a GPU's, it is no fact.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.machine import expanded
from pipelines.plan.plan import IMAGENET_MEAN_RGB
from tools.lib.study.settings import Student, Study
from tools.lib.study.stage import SETTINGS, Stage, content_of
from trainer.config.natures import flat, setting_natures
from trainer.config.paper import paper_models
from trainer.config.sections import Config, to_yaml
from trainer.state.checkpoint import BEST, checkpoints_folder

TRAIN = "trainer/run.py"
TOGETHER = "trainer/together.py"


@dataclasses.dataclass(frozen=True)
class StudentStages:
    """The stages of a student with one seed.

    Attributes:
      differs: settings of the plan in which this student differs from the others, so that it cannot learn from the
        store; its teacher is live.
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
      dataset: folder of the shards.
      base: the configuration that all students have in common.
      epochs: that the store holds, 0 without one.
    """

    dataset: Path
    base: Config
    epochs: int
    shards: Stage | None
    teacher: Stage | None
    store: Stage | None
    students: list[StudentStages]

    @property
    def common(self) -> list[Stage]:
        """The stages that are no student's."""
        return [stage for stage in (self.shards, self.teacher, self.store) if stage is not None]

    @property
    def stages(self) -> list[Stage]:
        """All stages, each behind those that it needs."""
        return [*self.common, *(stage for each in self.students for stage in each.stages)]


def build_graph(study: Study, out: Path) -> Graph:
    """The graph of a study in a folder. Reads the dataset's manifest and checkpoints that are given; writes nothing.

    Raises:
      UserError: settings that do not parse, or two students that are the same.
    """
    # 1. Shards, unless the study begins with a dataset.
    shards, dataset, first = None, expanded(study.dataset or "").resolve(), {}
    if study.source is not None:
        images = digits_folder(out) if study.source == "digits" else expanded(study.source).resolve()
        shards = Stage(out, "shards", "", "dataset", {"source": study.source}, product_name="dataset")
        shards = shards.running("tools/shard_imagenet.py", "build", images, shards.product)
        dataset = shards.product
    else:
        first = {"dataset": content_of(str(dataset))}
    after_shards = () if shards is None else (shards,)

    # 2. What all trainings have in common. One fill colour gives every student the same pixels.
    common: dict[str, Any] = {"data.root": dataset, "teacher.name": None}
    base = load(study, common)
    common["augment.fill"] = base.augment.fill or IMAGENET_MEAN_RGB
    if study.teacher is not None and study.teacher.epochs:
        common["augment.cycle_epochs"] = study.teacher.epochs
    base = load(study, common)

    # 3. The teacher: trained here on labels alone, or somebody's weights.
    teacher, learning = None, {}
    if study.teacher is not None:
        learning = {"teacher.name": study.teacher.name, "teacher.kwargs": study.teacher.kwargs}
        if study.teacher.checkpoint is not None:
            learning["teacher.checkpoint"] = expanded(study.teacher.checkpoint).resolve()
        if study.teacher.train is not None:
            model = {"student.name": study.teacher.name, "student.kwargs": study.teacher.kwargs}
            teacher = training("teacher", study.teacher.name, study, out, {**common, **model, **study.teacher.train})
            teacher = dataclasses.replace(teacher, facts=teacher.facts | first, needs=after_shards)
            teacher = training_command(teacher, study, {**common, **model, **study.teacher.train})
            learning["teacher.checkpoint"] = checkpoints_folder(teacher.product) / BEST
    after_teacher = after_shards if teacher is None else (*after_shards, teacher)

    # 4. The store: the teacher's outputs for the longest of the trainings.
    configs = [load(study, {**common, **each.overrides}, f"students[{n}]") for n, each in enumerate(study.students)]
    store, epochs = None, 0
    if study.teacher is not None:
        epochs = base.augment.cycle_epochs or max(each.schedule.total_epochs for each in configs)
        live = load(study, {**common, **learning})
        facts = {key: value for key, value in facts_of(live, out).items() if is_of_plan(key) or is_of_teacher(key)}
        facts |= {"codec": study.teacher.codec, "epochs": epochs, **first}
        store = Stage(out, "store", "", slug_of(study.teacher.name), facts, after_teacher, product_name="store")
        options = ("--codec", study.teacher.codec, "--epochs", epochs)
        words = ("tools/record_teacher.py", store.product, "--config", store.folder / SETTINGS, *options)
        store = store.running(*words, settings=to_yaml(live))

    # 5. Each student with each of its seeds.
    students = []
    for number, (student, config) in enumerate(zip(study.students, configs, strict=True)):
        differs = [key for key in flat(base) if is_of_plan(key) and flat(base)[key] != flat(config)[key]]
        changed = {**common, **student.overrides, "student.name": student.name, "student.kwargs": student.kwargs}
        if store is not None and not differs:
            changed |= {"teacher.store": store.product, "teacher.name": study.teacher and study.teacher.name}
        elif study.teacher is not None:
            changed |= learning
        needs = (store,) if store is not None and not differs else after_teacher
        for seed in student.seeds:
            mine = {**changed, "student.seed": seed}
            train = training("train", f"{student.title or student.name}-s{seed}", study, out, mine, f"students[{number}]")
            train = dataclasses.replace(train, facts=train.facts | first, needs=needs)
            train = training_command(train, study, mine)
            students.append(after_training(study, student, seed, train, dataset, differs, load(study, mine)))
    graph = Graph(dataset, base, epochs, shards, teacher, store, students)
    check_distinct(graph.stages)
    return graph


def after_training(
    study: Study, student: Student, seed: int, train: Stage, dataset: Path, differs: list[str], config: Config
) -> StudentStages:
    """The stages of a student: its training, and what follows."""
    out, subject = train.study, train.subject
    weights = [kind for kind in study.evaluate.weights if config.ema.decay or kind == "raw"] or ["raw"]
    wanted = {kind: {"student.weights": kind} for kind in weights}
    wanted |= {name: {"student.weights": weights[0], **more} for name, more in study.evaluate.suites.items()}
    evaluations = {}
    for name, more in wanted.items():
        facts = {key: content_of(value) for key, value in more.items()}
        stage = Stage(out, "evaluate", f"{name} {subject}", f"{train.slug}-{slug_of(name)}", facts, (train,), "report.json")
        given = {"data.root": dataset, "student.checkpoint": train.product, "run.device": config.run.device, **more}
        given |= {"run.json": stage.product, "run.predictions": stage.product.with_suffix(".npz")}
        evaluations[name] = stage.running("tools/evaluate.py", *as_options(given))
    measured = evaluations[weights[0]]
    export = Stage(out, "export", subject, train.slug, {"weights": weights[0]}, (train, measured), "model")
    options = ("--weights", weights[0], "--evaluation", measured.product)
    export = export.running("tools/export.py", train.product, export.product, *options)
    return StudentStages(student, seed, config, differs, train, evaluations, export)


def speed_stage(study: Study, graph: Graph) -> Stage | None:
    """The measurement of speed, once for all students that are exported by now; None where there are none of them.

    Speed does not depend on weights, so each student is measured with the first of its seeds that is there.
    """
    models: dict[str, Stage] = {}
    for each in graph.students:
        if each.export.is_done:
            models.setdefault(each.student.title or each.student.name, each.export)
    if study.speed is None or not models:
        return None
    out = graph.students[0].train.study
    stage = Stage(out, "speed", "", "comparison", dataclasses.asdict(study.speed), tuple(models.values()), "comparison.json")
    device = graph.base.run.device
    given = {"backends": study.speed.backends, "batch": study.speed.batch, "repeats": study.speed.repeats}
    given |= {"device": None if device == "auto" else device, "out": stage.folder}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", *listed(value))]
    return stage.running("tools/compare.py", *(model.product for model in models.values()), *words)


# --- settings and facts ---


def load(study: Study, changed: Mapping[str, object], where: str = "recipe") -> Config:
    """The configuration of a training: the recipe with its overrides, and with what the study changes."""
    try:
        return Config.load(expanded(study.recipe.config), {**study.recipe.overrides, **changed})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def training(kind: str, subject: str, study: Study, out: Path, changed: Mapping[str, Any], where: str = "") -> Stage:
    """A training, without what it needs and without its command, which names its folder."""
    config = load(study, changed, where or kind)
    facts = facts_of(config, out)
    slug = slug_of(config.student.name) + (f"-s{changed['student.seed']}" if kind == "train" else "")
    others = {key: value for key, value in facts.items() if not key.startswith("student.")}
    return Stage(out, kind, subject, slug, facts, product_name="run", group=json.dumps(others, sort_keys=True))


def training_command(stage: Stage, study: Study, changed: Mapping[str, Any]) -> Stage:
    """The training with its command and a file of all its settings, which nobody changes while the study runs."""
    config = load(study, {**changed, "run.out": stage.product})
    return stage.running(TRAIN, "--config", stage.folder / SETTINGS, settings=to_yaml(config))


def facts_of(config: Config, out: Path) -> dict[str, Any]:
    """The settings that a result depends on where they are not the default, as plain values by SECTION.NAME.

    Files that are named stand there by their content. What the study has made itself is a need and no fact.
    """
    natures, defaults, found = setting_natures(), flat(Config()), {}
    for key, value in flat(config).items():
        nature = natures[key]
        if nature.per_machine:
            is_own = isinstance(value, str) and Path(value).is_relative_to(out)
            if not is_own and (content := content_of(value)) != value and isinstance(content, str):
                found[key] = content
        elif value != defaults[key] and (nature.recipe or nature.on_resume != "ignored"):
            found[key] = value
    return found


def is_of_plan(key: str) -> bool:
    """Whether a setting decides the plan, or the pixels that are rendered from it."""
    on_resume = setting_natures()[key].on_resume
    return on_resume == "refused" and not key.startswith("student.") or key in ("data.pipeline", "data.decode")


def is_of_teacher(key: str) -> bool:
    """Whether a setting is one of the teacher's."""
    return key.startswith("teacher.")


def slug_of(name: str) -> str:
    """The beginning of a folder's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def as_options(given: Mapping[str, object]) -> Sequence[str]:
    """Settings as words of a command line."""
    return [f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in given.items()]


def listed(value: object) -> list[object]:
    """A list, or a single value as one."""
    return value if isinstance(value, list) else [value]


def digits_folder(out: Path) -> Path:
    """Where the images of the source `digits` lie."""
    return out / "digits"


def check_distinct(stages: Sequence[Stage]) -> None:
    """Raise a UserError if two stages have one name or one folder."""
    names, folders = set(), {}
    for stage in stages:
        if stage.name in names:
            raise UserError(f"students: two of them are called '{stage.subject}'. Give one of them another title")
        if (other := folders.get(stage.folder)) is not None:
            raise UserError(f"students: '{stage.subject}' and '{other.subject}' are the same. Leave one of them out")
        names.add(stage.name)
        folders[stage.folder] = stage


def paper_points(study: Study) -> dict[str, tuple[float, str]]:
    """Of the students' names, what the paper has published: top-1 in percent and the source."""
    names = {student.name for student in study.students} if study.paper else set()
    return {model.name: (model.top1, model.source) for model in paper_models() if model.name in names}
