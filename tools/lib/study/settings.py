"""The file of a study: which students are compared, how all of them are trained, and what is measured."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pipelines.common.errors import UserError, clipped
from pipelines.common.settings import Section, setting
from trainer.config.cli import read_yaml
from trainer.config.model_arguments import Kwargs, check_kwargs

Overrides = dict[str, Any]  # SECTION.NAME -> value, as on the command line of trainer/run.py
# The study decides these settings of a training itself.
_DECIDED = {
    *("data.root", "run.out", "run.stop_after_steps", "student.name", "student.kwargs", "student.seed"),
    *(f"teacher.{name}" for name in ("name", "kwargs", "checkpoint", "store", "others")),
}


@dataclasses.dataclass(frozen=True)
class RecipeSection(Section):
    """How every student is trained: a YAML file as trainer/run.py takes it, and what is changed of it."""

    config: str = "configs/usi.yaml"
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        _check_overrides(self.overrides)


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
        check_kwargs("teacher", self.kwargs)
        _check_overrides(self.train or {})
        if self.train is not None and self.checkpoint is not None:
            raise UserError("checkpoint and train are both given: leave one of them out")


@dataclasses.dataclass(frozen=True)
class Student(Section):
    """A student; each seed, of the initial weights and dropout, is a training of its own on the same images."""

    name: str
    title: str = setting("", may_be_empty=True)
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    seeds: list[int] = setting(factory=lambda: [0], at_least=0)
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        check_kwargs("student", self.kwargs)
        _check_overrides(self.overrides)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}: name at least one, and each once")

    @property
    def label(self) -> str:
        """What people call it."""
        return self.title or self.name


@dataclasses.dataclass(frozen=True)
class EvaluateSection(Section):
    """What is evaluated of the last checkpoint: kinds of weights, and the first of them in suites of other settings."""

    weights: list[Literal["ema", "raw"]] = dataclasses.field(default_factory=lambda: ["ema", "raw"])
    suites: dict[str, Overrides] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SpeedSection(Section):
    """How speed is measured: the options of tools/compare.py, whose defaults hold where they are null."""

    backends: list[str] | None = None
    batch: int | None = setting(None, at_least=1)
    repeats: int | None = setting(None, at_least=1)


@dataclasses.dataclass(frozen=True)
class Study(Section):
    """A study: docs/study.md describes each key."""

    students: list[Student]
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
        numbers: dict[str, int] = {}
        for number, student in enumerate(self.students):
            if (other := numbers.setdefault(student.label, number)) != number:
                raise UserError(
                    f"students[{other}] and students[{number}] are both called '{student.label}'. Give one of them a "
                    "title of its own"
                )


_SECTIONS = {"recipe": RecipeSection, "teacher": TeacherSection, "evaluate": EvaluateSection, "speed": SpeedSection}


def read_study(path: Path) -> Study:
    """The study in a YAML file; a UserError names the file, the key and what is wrong with it."""
    content = {"title": path.stem, **read_yaml(path)}
    with naming(path):
        for key, kind in _SECTIONS.items():
            if content.get(key) is not None:
                with naming(key):
                    content[key] = _filled(kind, content[key])
        if isinstance(content.get("students"), list):
            for number, each in enumerate(content["students"]):
                with naming(f"students[{number}]"):
                    content["students"][number] = _filled(Student, {"name": each} if isinstance(each, str) else each)
        return _filled(Study, content)


@contextlib.contextmanager
def naming(*where: object) -> Iterator[None]:
    """Inside, errors begin with what is at fault, such as the file and the key."""
    try:
        yield
    except UserError as error:
        raise UserError(": ".join([*map(str, where), error.in_command()])) from error


def _filled(kind: Any, content: Any) -> Any:
    """An instance of a section's dataclass with the values of a file."""
    if not isinstance(content, dict):
        raise UserError(f"is {clipped(content)}, not keys with values")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(fields)}"
            raise UserError(f"unknown key '{clipped(key)}'; {hint}")
    for name, field in fields.items():
        if field.default is field.default_factory and name not in content:  # Both are MISSING.
            raise UserError(f"'{name}' is missing")
    return kind(**content)


def _check_overrides(overrides: Overrides) -> None:
    if decided := _DECIDED & {*overrides}:
        raise UserError(f"{min(decided)} among its overrides: the study decides it. Leave it out")
