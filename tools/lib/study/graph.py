"""The graph of a study, from top to bottom: which commands there are, and which of them need the result of which.

    shards -> teacher -> store -> train each student and seed -> evaluate -> export -> speed -> report

A result depends on its stage's facts and on what the stage needs, and on nothing else: what changes no result, such as
a number of threads, is no fact.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from pipelines.common.machine import expanded
from pipelines.plan.plan import IMAGENET_MEAN_RGB
from tools.lib.study.settings import Student, TeacherSection, naming, read_study
from tools.lib.study.stage import SETTINGS, Stage, content_of
from trainer.config.natures import flat, setting_natures
from trainer.config.sections import Config
from trainer.models.files.model_folders import model_contents, source_name
from trainer.state.checkpoint import BEST, checkpoints_folder

Settings = dict[str, Any]  # SECTION.NAME -> value
_OF_TEACHING = {"distill.weight", "distill.temperature"}  # Labels alone are learned without them.
_PIXELS = ("data.root", "data.pipeline", "data.decode")  # With the plan they decide what the teacher sees.


@dataclasses.dataclass(frozen=True)
class StudentStages:
    """The stages of a student with one seed; `evaluations` by what is evaluated, a kind of weights or a suite."""

    student: Student
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


class Graph:
    """All stages of a study in a folder. It reads what the study names, and writes nothing.

    Attributes:
      file: the YAML file of the study.
      dataset: folder of the shards.
      common: stages that are no student's, by their kind.

    Raises:
      UserError: settings that do not parse, or two students that are the same; it names the file and the key.
    """

    def __init__(self, file: Path, out: Path):
        self.file, self.out, self.study = file, out, (study := read_study(file))
        self.common: dict[str, Stage] = {}
        self._shared: Settings = {}
        self._load("recipe.config", {}, overrides={})
        self.dataset = self._shards() if study.source else expanded(str(study.dataset)).resolve()

        # One fill colour gives all students the same pixels.
        self._shared = {"data.root": self.dataset, "teacher.name": None}
        self._shared["augment.fill"] = self._load("recipe.overrides", {}).augment.fill or IMAGENET_MEAN_RGB
        # Students repeat the images that are recorded; a teacher that is trained first sees others in each epoch.
        cycle = study.teacher.epochs if study.teacher is not None else 0
        views: Settings = {"augment.cycle_epochs": cycle} if cycle else {}
        base = self._load("recipe.overrides", views)
        plan = plan_of(base)
        configs = [self._load(self._where(each), {**views, **each.overrides}) for each in study.students]
        lengths = [config.schedule.total_epochs for config in configs if plan_of(config) == plan]

        live, recorded = {}, {}  # What students learn from: nothing, or the teacher, or its store.
        if study.teacher is not None:
            live = self._teacher(study.teacher)
            if lengths:
                longest = max(lengths)
                epochs = min(longest, base.augment.cycle_epochs or longest)
                recorded = self._store(study.teacher, {**views, **live}, epochs)

        self.students: list[StudentStages] = []
        for student, config in zip(study.students, configs, strict=True):
            # No recording fits a student that sees other images, so it learns from the teacher itself.
            source, without = (recorded, "") if plan_of(config) == plan else (live, "store")
            needs = tuple(stage for kind, stage in self.common.items() if kind != without)[-1:]
            self.students += [self._student(student, seed, {**views, **source}, needs) for seed in student.seeds]
        self._check_distinct()

    @property
    def stages(self) -> list[Stage]:
        """All stages, each behind those that it needs; the measurement of speed is the last."""
        common = {**self.common}
        speed = [common.pop("speed")] if "speed" in common else []
        return [*common.values(), *(stage for each in self.students for stage in each.stages), *speed]

    def _shards(self) -> Path:
        source = str(self.study.source)
        images = self.out / source if source == "digits" else expanded(source).resolve()
        facts = {"source": source if source == "digits" else str(images)}
        stage = Stage(self.out, "shards", "", "dataset", facts, (), "dataset")
        self.common["shards"] = stage.by("tools/shard_imagenet.py", "build", images, stage.product)
        return stage.product

    def _teacher(self, teacher: TeacherSection) -> Settings:
        """The settings of a live teacher, which is trained first, on labels alone, where the study wants that."""
        live = {"teacher.name": teacher.name, "teacher.kwargs": teacher.kwargs}
        if teacher.checkpoint is not None:
            live["teacher.checkpoint"] = expanded(teacher.checkpoint).resolve()
        if teacher.train is not None:
            changed = {**teacher.train, "student.name": teacher.name, "student.kwargs": teacher.kwargs}
            needs = (*self.common.values(),)
            self.common["teacher"], _ = self._training("teacher", "", teacher.name, changed, needs, "teacher.train")
            live["teacher.checkpoint"] = checkpoints_folder(self.common["teacher"].product) / BEST
        return live

    def _store(self, teacher: TeacherSection, changed: Settings, epochs: int) -> Settings:
        """The settings of students that learn from the store, which holds at least `epochs` epochs."""
        config = self._load("teacher", changed)
        seen = {key for key in flat(config) if key.startswith("teacher.")} | {*plan_of(config), *_PIXELS}
        seen.remove("augment.cycle_epochs")  # The epochs that are recorded are the same whatever repeats them.
        found = self._facts(config, "teacher").items()
        facts = {key: value for key, value in found if key.partition(" ")[0] in seen} | {"codec": teacher.codec}
        stage = Stage(self.out, "store", "", teacher.name, facts, (*self.common.values(),), "store", config)
        stage.epochs = epochs
        words = ("--config", stage.folder / SETTINGS, "--codec", teacher.codec, "--epochs", epochs)
        self.common["store"] = stage.by("tools/record_teacher.py", stage.product, *words)
        return {"teacher.name": teacher.name, "teacher.store": stage.product}

    def _where(self, student: Student) -> str:
        """The key of the study's file that holds what the student alone has."""
        return f"students[{self.study.students.index(student)}].overrides"

    def _student(self, student: Student, seed: int, source: Settings, needs: tuple[Stage, ...]) -> StudentStages:
        """A student's training, and what follows it."""
        subject, title = f"{student.label}-s{seed}", f"{student.name}-s{seed}"
        model = {"student.name": student.name, "student.kwargs": student.kwargs, "student.seed": seed}
        changed = {**source, **student.overrides, **model}
        train, config = self._training("train", subject, title, changed, needs, self._where(student))
        kinds, suites = self.study.evaluate.weights, self.study.evaluate.suites
        weights = [kind for kind in kinds if config.ema.decay or kind == "raw"] or ["raw"]
        wanted = {kind: {"student.weights": kind} for kind in weights}
        wanted |= {name: {"student.weights": weights[0], **more} for name, more in suites.items()}
        evaluations = {}
        for name, more in wanted.items():
            facts = {key: content_of(value) for key, value in more.items()}
            stage = Stage(self.out, f"evaluate {name}", subject, title, facts, (train,), "report.json")
            options = {"data.root": self.dataset, "student.checkpoint": train.product, **more}
            options |= {"run.json": stage.product, "run.predictions": stage.product.with_suffix(".npz")}
            options |= {"run.device": config.run.device}
            evaluations[name] = stage.by("tools/evaluate.py", *as_options(options))
        first = evaluations[weights[0]]
        export = Stage(self.out, "export", subject, title, {"weights": weights[0]}, (train, first), "model")
        options = {"weights": weights[0], "evaluation": first.product}
        export.by("tools/export.py", train.product, export.product, *as_options(options))
        return StudentStages(student, seed, config, train, evaluations, export)

    def add_speed(self) -> None:
        """Add the measurement of speed, once for all students that are exported by now, if there are any.

        Speed does not depend on weights, so each student is measured with the first of its seeds that is there.
        """
        exports = {each.student.label: each.export for each in reversed(self.students) if each.export.is_done}
        if self.study.speed is None or not exports:
            return
        models = tuple(stage for stage in self.stages if stage in exports.values())
        facts, device = dataclasses.asdict(self.study.speed), self.students[0].config.run.device
        stage = Stage(self.out, "speed", "", "comparison", facts, models, "comparison.json")
        options = {"out": stage.folder, **facts, "device": None if device == "auto" else device}
        self.common["speed"] = stage.by("tools/compare.py", *(each.product for each in models), *as_options(options))

    # --- settings and facts ---

    def _load(self, where: str, changed: Settings, overrides: Settings | None = None) -> Config:
        """The configuration of a training: the recipe with its overrides, and with what the study changes.

        Args:
          where: the key of the study's file that is at fault if this fails.
          overrides: in place of the recipe's.
        """
        recipe = self.study.recipe
        file, overrides = expanded(recipe.config), recipe.overrides if overrides is None else overrides
        with naming(self.file, where):
            try:
                return Config.load(file, {**overrides, **self._shared, **changed})
            except UserError as error:  # What is wrong in the recipe's own file has been found before.
                raise UserError(str(error).removeprefix("" if where == "recipe.config" else f"{file}: ")) from error

    def _training(
        self, kind: str, subject: str, title: str, changed: Settings, needs: tuple[Stage, ...], where: str
    ) -> tuple[Stage, Config]:
        """A training, whose command reads a file of all settings, and its configuration."""
        config = self._load(where, changed)
        more = ("run.eval_every",) if kind == "teacher" else ()  # Its best.pt is chosen among its evaluations.
        stage = Stage(self.out, kind, subject, title, self._facts(config, where, *more), needs, "run")
        stage.config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=stage.product))
        return stage.by("trainer/run.py", "--config", stage.folder / SETTINGS), config

    def _facts(self, config: Config, where: str, *more: str) -> Settings:
        """The settings that a result depends on, where they are not the default.

        What they name stands there by its content; what the study has made itself is a need and no fact.

        Args:
          where: as of `_load`.
          more: settings that count here, though they change no other result.
        """
        natures, defaults, found = setting_natures(), flat(Config()), {}
        unused = set() if config.teacher.members else _OF_TEACHING
        for key, value in flat(config).items():
            nature = natures[key]
            if key in unused:
                continue
            if nature.per_machine:
                own = isinstance(value, str) and any(Path(value).is_relative_to(s.folder) for s in self.common.values())
                if not own and (content := content_of(value)) != value:
                    found[key] = content
            elif value != defaults[key] and (nature.recipe or nature.on_resume != "ignored" or key in more):
                found[key] = value
        with naming(self.file, where.removesuffix(".overrides")):
            return {**found, **contents_of_folders(config)}

    def _check_distinct(self) -> None:
        folders = {}
        for stage in self.stages:
            if (other := folders.get(stage.folder)) is not None:
                raise UserError(f"{self.file}: students: '{stage.subject}' and '{other}' are the same. Leave one out")
            folders[stage.folder] = stage.subject


def plan_of(config: Config) -> Settings:
    """The settings that decide which images a student sees, in which order."""
    of_plan = {key for key, nature in setting_natures().items() if nature.on_resume == "refused"}
    return {key: value for key, value in flat(config).items() if key in of_plan and not key.startswith("student.")}


def contents_of_folders(config: Config) -> Settings:
    """Digests of what a training reads of models that are folders of this machine, such as "student.name (weights)"."""
    names = [source_name(str(name)) for name in (config.student.name, config.teacher.name)]
    contents = model_contents(config) if any(name.startswith("local-dir:") for name in names) else {}
    return {key.removeprefix("content of "): digest for key, digest in contents.items() if ".name (" in key}


def as_options(values: Mapping[str, object]) -> list[object]:
    """Values as words of a command line; those that are None are left out."""
    words: list[object] = []
    for name, value in values.items():
        if value is not None:
            many = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *many]
    return words
