"""The graph of a study, from top to bottom: which commands there are, and which of them need the result of which.

    shards -> teacher -> store -> train each student and seed -> evaluate -> export -> speed -> report

A result depends on its stage's inputs and on what the stage needs, and on nothing else: what changes no result, such as
a number of threads, is no input.
"""

import dataclasses
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError, naming
from pipelines.common.machine import expanded
from pipelines.plan.plan import IMAGENET_MEAN_RGB
from tools.lib.study.inputs import content_of, inputs_of
from tools.lib.study.settings import EvaluateSection, StudentSection, Study, TeacherSection, check_recipe, read_study
from tools.lib.study.stage import SETTINGS, Stage, as_options
from trainer.config.natures import flat, plan_settings
from trainer.config.sections import Config
from trainer.state.checkpoint import BEST, checkpoints_folder

Settings = dict[str, Any]  # SECTION.NAME -> value
_PIXELS = ("data.root", "data.pipeline", "data.decode")  # With the plan they decide what the teacher sees.


@dataclasses.dataclass(frozen=True)
class StudentStages:
    """The stages of a student with one seed; `evaluations` by what is evaluated, a kind of weights or a suite."""

    student: StudentSection
    seed: int
    config: Config
    train: Stage
    evaluations: dict[str, Stage]
    export: Stage

    @property
    def stages(self) -> list[Stage]:
        """All of them in their order."""
        return [self.train, *self.evaluations.values(), self.export]

    @property
    def failure(self) -> str:
        """The first stage that is not done, and why; "" where all are."""
        missing = next((stage for stage in self.stages if not stage.is_done), None)
        return "" if missing is None else f"{missing.name}: {missing.failure or 'was not carried out'}"


@dataclasses.dataclass(frozen=True)
class Graph:
    """All stages of a study in a folder.

    Attributes:
      file: the YAML file of the study; out: its folder.
      dataset: folder of the shards.
      common: stages that are no student's, by their kind.
    """

    file: Path
    out: Path
    study: Study
    dataset: Path
    common: dict[str, Stage]
    students: list[StudentStages]

    @property
    def stages(self) -> list[Stage]:
        """All stages, each behind those that it needs; the measurement of speed is the last."""
        common = [*self.common.values(), *(stage for each in self.students for stage in each.stages)]
        return sorted(common, key=lambda stage: stage.kind == "speed")

    @property
    def learning_live(self) -> list[str]:
        """The students and seeds that learn from the teacher itself, while there is a recording for others."""
        store = self.common.get("store")
        return [each.train.subject for each in self.students if store and store not in each.train.needs]

    def with_speed(self) -> "Graph":
        """The same with a measurement of speed, once for all students that are exported by now, if there are any.

        Speed does not depend on weights, so each student is measured with the first of its seeds that is there.
        """
        exports = {each.student.label: each.export for each in reversed(self.students) if each.export.is_done}
        if self.study.speed is None or not exports:
            return self
        models = tuple(reversed(exports.values()))
        device = self.students[0].config.run.device
        inputs = dataclasses.asdict(self.study.speed) | {"device": None if device == "auto" else device}
        stage = Stage(self.out, "speed", "", "comparison", inputs, models, "comparison.json")
        stage.by("tools/compare.py", *(each.product for each in models), *as_options({"out": stage.folder, **inputs}))
        return dataclasses.replace(self, common={**self.common, "speed": stage})


def read_graph(file: Path, out: Path) -> Graph:
    """The graph of the study in a YAML file. It reads what the study names, and writes nothing.

    Raises:
      UserError: settings that do not parse, or two students that are the same; it names the file and the key.
    """
    study = read_study(file)
    recipe = Recipe(out, expanded(study.recipe.config), {})
    with naming(file, "recipe.config"):
        config = recipe.load()
        with naming(recipe.file):
            check_recipe(config)
    common = [_shards(out, study.source)] if study.source else []
    dataset = common[0].product if common else expanded(str(study.dataset)).resolve()
    name = None if study.teacher is None else study.teacher.name
    recipe = recipe.having(study.recipe.overrides | {"data.root": dataset, "teacher.name": name})
    with naming(file, "recipe.overrides"):  # One fill colour gives all students the same pixels.
        recipe = recipe.having({"augment.fill": recipe.load().augment.fill or IMAGENET_MEAN_RGB})

    live: Settings = {}  # What students learn from: labels alone, or the teacher, or its store.
    if (teacher := study.teacher) is not None:
        with naming(file, "teacher.train"):
            common += [_teacher(recipe, teacher, common)] if teacher.train is not None else []
        live = _live(teacher, common)
        if teacher.epochs:  # Students repeat what is recorded; a teacher that is trained sees others in each epoch.
            recipe = recipe.having({"augment.cycle_epochs": teacher.epochs})

    recorded, readers = _recorded_settings(recipe.load()), {}
    for number, student in enumerate(study.students):
        with naming(file, f"students[{number}]"):
            config = recipe.having(student.overrides).load()
        if _recorded_settings(config) == recorded:
            readers[number] = config
    replayed, before = live, common[-1:]
    if teacher is not None and readers:
        with naming(file, "teacher"):
            store = _store(recipe.having(live), teacher, [*readers.values()], common)
        common = [*common, store]
        replayed = {"teacher.store": store.product, "teacher.classes": None}  # The store is in the dataset's order.

    students = []
    for number, student in enumerate(study.students):
        # No recording fits a student that sees other images, or whose teacher has other settings.
        source, needs = (replayed, common[-1:]) if number in readers else (live, before)
        with naming(file, f"students[{number}]"):
            learning = recipe.having({**source, **student.overrides})
            students += [_student(learning, study.evaluate, student, seed, needs) for seed in student.seeds]
    subjects: dict[Path, str] = {}
    for each in students:
        if (other := subjects.setdefault(each.train.folder, each.train.subject)) != each.train.subject:
            raise UserError(f"{file}: students: '{each.train.subject}' and '{other}' are the same. Leave one out")
    return Graph(file, out, study, dataset, {stage.kind: stage for stage in common}, students)


# --- stages ---


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings with which all trainings of a study in the folder `out` begin: those of a file, some replaced."""

    out: Path
    file: Path
    settings: Settings

    def having(self, settings: Settings) -> "Recipe":
        """The same with other settings."""
        return dataclasses.replace(self, settings={**self.settings, **settings})

    def load(self) -> Config:
        """The configuration of a training, which ends at its last step whatever the file says."""
        return Config.load(self.file, {**self.settings, "run.stop_after_steps": 0})

    def training(self, kind: str, subject: str, prefix: str, needs: list[Stage], also: tuple[str, ...] = ()) -> Stage:
        """A training, whose command reads a file of all settings; `also` as of `inputs_of`."""
        config = self.load()
        stage = Stage(self.out, kind, subject, prefix, inputs_of(config, needs, also), (*needs,), "run")
        stage.config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=stage.product))
        return stage.by("trainer/run.py", "--config", stage.folder / SETTINGS)


def _shards(out: Path, source: str) -> Stage:
    images = out / source if source == "digits" else expanded(source).resolve()
    inputs = {"source": source if source == "digits" else str(images)}
    stage = Stage(out, "shards", "", "dataset", inputs, (), "dataset")
    return stage.by("tools/shard_imagenet.py", "build", images, stage.product)


def _teacher(recipe: Recipe, teacher: TeacherSection, needs: list[Stage]) -> Stage:
    """The training of the teacher on labels alone."""
    model = {"student.name": teacher.name, "student.kwargs": teacher.kwargs}
    alone = {key: value for key, value in flat(Config()).items() if key.startswith("teacher.")} | {"teacher.name": None}
    recipe = recipe.having({**(teacher.train or {}), **model, **alone})
    return recipe.training("teacher", "", teacher.name, needs, ("run.eval_every",))  # It chooses best.pt.


def _live(teacher: TeacherSection, stages: list[Stage]) -> Settings:
    """The settings of students that learn from the teacher itself; where it is trained here, that is the last stage."""
    own = expanded(teacher.checkpoint).resolve() if teacher.checkpoint is not None else None
    checkpoint = checkpoints_folder(stages[-1].product) / BEST if teacher.train is not None else own
    live = {"teacher.name": teacher.name, "teacher.kwargs": teacher.kwargs, "teacher.checkpoint": checkpoint}
    return {key: value for key, value in live.items() if value is not None}


def _recorded_settings(config: Config) -> Settings:
    """The settings that decide what a recording of the teacher holds: what it sees, and its own."""
    return {key: value for key, value in flat(config).items() if key.startswith("teacher.")} | plan_settings(config)


def _store(recipe: Recipe, teacher: TeacherSection, readers: list[Config], needs: list[Stage]) -> Stage:
    """The recording of the teacher, of as many epochs as the longest training of its readers needs."""
    config, longest = recipe.load(), max(reader.schedule.total_epochs for reader in readers)
    epochs = min(longest, teacher.epochs or longest)
    seen = {*_recorded_settings(config), *_PIXELS}
    seen.remove("augment.cycle_epochs")  # The epochs that are recorded are the same whatever repeats them.
    inputs = {key: value for key, value in inputs_of(config, needs).items() if key.partition(" ")[0] in seen}
    inputs["codec"] = teacher.codec
    stage = Stage(recipe.out, "store", "", teacher.name, inputs, (*needs,), "store", config, epochs)
    words = ("--config", stage.folder / SETTINGS, "--codec", teacher.codec, "--epochs", epochs)
    return stage.by("tools/record_teacher.py", stage.product, *words)


def _student(
    recipe: Recipe, evaluate: EvaluateSection, student: StudentSection, seed: int, needs: list[Stage]
) -> StudentStages:
    """A student's training with one seed, and what follows it."""
    subject, prefix = f"{student.label}-s{seed}", f"{student.name}-s{seed}"
    model = {"student.name": student.name, "student.kwargs": student.kwargs, "student.seed": seed}
    train = recipe.having(model).training("train", subject, prefix, needs)
    assert (config := train.config) is not None
    kinds = evaluate.weights
    if "ema" in kinds and config.ema.decay == 0:
        raise UserError("ema.decay is 0: there are no EMA weights. Give evaluate.weights: [raw]")
    evaluated = {kind: {"student.weights": kind} for kind in kinds}
    evaluated |= {name: {"student.weights": kinds[0], **suite} for name, suite in evaluate.expanded_suites.items()}
    evaluations = {}
    for name, settings in evaluated.items():
        inputs = {key: content_of(value) for key, value in settings.items()}
        stage = Stage(recipe.out, f"evaluate {name}", subject, prefix, inputs, (train,), "report.json")
        options = {"data.root": config.data.root, "student.checkpoint": train.product, **settings}
        options |= {"run.json": stage.product, "run.predictions": stage.product.with_suffix(".npz")}
        evaluations[name] = stage.by("tools/evaluate.py", *as_options({**options, "run.device": config.run.device}))
    first = evaluations[kinds[0]]
    export = Stage(recipe.out, "export", subject, prefix, {"weights": kinds[0]}, (train, first), "model")
    options = {"weights": kinds[0], "evaluation": first.product}
    export.by("tools/export.py", train.product, export.product, *as_options(options))
    return StudentStages(student, seed, config, train, evaluations, export)
