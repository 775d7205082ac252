"""The file of a study: which students are compared, how all of them are trained, and what is measured."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

from pipelines.common.errors import UserError, naming
from pipelines.common.machine import expanded
from pipelines.common.settings import Section, filled, setting
from tools.lib.common.evaluation import EvalConfig
from tools.lib.common.hardware import check_backend
from tools.lib.study.stage import as_options
from trainer.config.cli import parse_settings, read_yaml
from trainer.config.model_arguments import Kwargs
from trainer.config.natures import flat
from trainer.config.sections import Config

Overrides = dict[str, Any]  # SECTION.NAME -> value, as on the command line of trainer/run.py
# The study decides these settings of a training, and of an evaluation, itself.
_DECIDED = {
    *("data.root", "run.out", "run.stop_after_steps", "student.name", "student.kwargs", "student.seed"),
    *(f"teacher.{name}" for name in ("name", "kwargs", "checkpoint", "store", "others")),
}
# It has no place for these, so that the recipe's own file must not set them either; others it sets itself.
_OF_NO_RECIPE = {f"teacher.{name}" for name in ("kwargs", "checkpoint", "store", "others")}
_DECIDED_OF_SUITES = {f"student.{name}" for name in ("name", "checkpoint", "weights")}
_DECIDED_OF_SUITES |= {f"run.{name}" for name in ("device", "json", "predictions")}


@dataclasses.dataclass(frozen=True)
class RecipeSection(Section):
    """How every student is trained: a YAML file as trainer/run.py takes it, and what is changed of it."""

    config: str = "configs/usi.yaml"
    overrides: Overrides = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TeacherSection(Section):
    """The teacher, which is recorded once.

    Attributes:
      name, kwargs, checkpoint: as of trainer/run.py.
      train: the teacher is trained first, on labels alone, by the recipe with these overrides; null takes `checkpoint`,
        or timm's weights.
      epochs: record this many, and let the students repeat their images for the rest of their training
        (augment.cycle_epochs); 0 is all. It does not change how `train` trains the teacher.
    """

    name: str
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    checkpoint: str | None = None
    train: Overrides | None = None
    codec: str = "int8"
    epochs: int = setting(0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.train is not None and self.checkpoint is not None:
            raise UserError("checkpoint and train are both given: leave one of them out")


@dataclasses.dataclass(frozen=True)
class StudentSection(Section):
    """A student; each seed, of the initial weights and dropout, is a training of its own on the same images."""

    name: str
    title: str = setting("", may_be_empty=True)
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    seeds: list[int] = setting(factory=lambda: [0], at_least=0)
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}: name at least one, and none twice")

    @property
    def label(self) -> str:
        """What people call it."""
        return self.title or self.name


@dataclasses.dataclass(frozen=True)
class EvaluateSection(Section):
    """What is evaluated of the last checkpoint: kinds of weights, and the first of them in suites of other settings."""

    weights: list[Literal["ema", "raw"]] = dataclasses.field(default_factory=lambda: ["ema", "raw"])
    suites: dict[str, Overrides] = dataclasses.field(default_factory=dict)

    @property
    def expanded_suites(self) -> dict[str, Overrides]:
        """The suites with paths from / on, by which the content of files is found and commands run in any folder."""
        suites = self.suites.items()
        return {name: {key: _in_full(key, value) for key, value in suite.items()} for name, suite in suites}

    def __post_init__(self):
        super().__post_init__()
        for name, suite in self.suites.items():
            with naming(f"suites.{name}"):
                if name in ("raw", "ema") or not re.fullmatch(r"[\w.-]+", name):
                    raise UserError("a suite is called by letters and digits, and not raw or ema. Give it another name")
                _check_decided(suite, _DECIDED_OF_SUITES)
                words = [str(word) for word in as_options(suite)]
                labels = parse_settings(EvalConfig, words, prog=None, description="").data.real_labels
                if labels is not None and str(labels) != "imagenet" and not labels.is_file():
                    raise UserError(f"data.real_labels is {labels}: not found. Name a file, or the word imagenet")


@dataclasses.dataclass(frozen=True)
class SpeedSection(Section):
    """How speed is measured: the options of tools/compare.py, whose defaults hold where they are null."""

    backends: list[str] | None = None
    batch: int | None = setting(None, at_least=1)
    repeats: int | None = setting(None, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        with naming("backends"):
            for name in self.backends or ():
                check_backend(name)


@dataclasses.dataclass(frozen=True)
class Study(Section):
    """A study: docs/study.md describes each key."""

    students: list[StudentSection]
    title: str = setting("", may_be_empty=True)
    dataset: str | None = None
    source: str | None = None
    recipe: RecipeSection = dataclasses.field(default_factory=RecipeSection)
    teacher: TeacherSection | None = None
    together: int = setting(1, at_least=1)
    evaluate: EvaluateSection = dataclasses.field(default_factory=EvaluateSection)
    speed: SpeedSection | None = None
    paper: Literal["usi"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.dataset is None) == (self.source is None):
            raise UserError("give either dataset, a folder of shards, or source, what to make them of")
        if not self.students or not self.evaluate.weights:
            raise UserError("students and evaluate.weights must name at least one each")
        trained = {"recipe.overrides": self.recipe.overrides, "teacher.train": self.teacher and self.teacher.train}
        trained |= {f"students[{number}].overrides": each.overrides for number, each in enumerate(self.students)}
        for key, overrides in trained.items():
            with naming(key):
                _check_decided(overrides or {}, _DECIDED)
        labels = [each.label for each in self.students]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise UserError(f"students: two are called '{twice[0]}'. Give one of them a title of its own")


def _in_full(key: str, value: object) -> object:
    if key in ("data.root", "data.real_labels") and isinstance(value, str) and value != "imagenet":
        return str(expanded(value).resolve())
    return value


def check_recipe(config: Config) -> None:
    """Raise a UserError if the configuration of a recipe's own file sets what the study decides about its teacher."""
    defaults = flat(Config())
    _check_decided({key: value for key, value in flat(config).items() if value != defaults[key]}, _OF_NO_RECIPE)


def _check_decided(overrides: Overrides, decided: set[str]) -> None:
    if wrong := [key for key in overrides if "." not in key]:
        raise UserError(f"'{wrong[0]}' is no setting. Give SECTION.NAME, such as schedule.epochs")
    if found := decided & {*overrides}:
        raise UserError(f"the study decides {min(found)}. Leave it out")


def read_study(path: Path) -> Study:
    """The study in a YAML file; a UserError names the file, the key and what is wrong with it."""
    content = {"title": path.stem, **read_yaml(path)}
    if isinstance(students := content.get("students"), list):
        content["students"] = [{"name": each} if isinstance(each, str) else each for each in students]
    with naming(path):
        return filled(Study, content)
