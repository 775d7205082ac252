"""The file of a study: which students are compared, how all of them are trained, and what is measured."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal

from pipelines.common.errors import UserError, clipped
from pipelines.common.settings import Section, setting
from trainer.config.cli import read_yaml
from trainer.config.model_arguments import Kwargs, check_kwargs

Overrides = dict[str, Any]
# The study decides these settings of a training itself.
_DECIDED = {
    *("data.root", "run.out", "run.stop_after_steps", "student.name", "student.kwargs", "student.seed"),
    *(f"teacher.{name}" for name in ("name", "kwargs", "checkpoint", "store", "others")),
}


@dataclasses.dataclass(frozen=True)
class RecipeSection(Section):
    """How every student is trained.

    Attributes:
      config: YAML file as trainer/run.py takes it.
      overrides: SECTION.NAME -> value, as on its command line.
    """

    key = "recipe"
    config: str = "configs/usi.yaml"
    overrides: Overrides = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TeacherSection(Section):
    """The teacher, which is recorded once.

    Attributes:
      name, kwargs, checkpoint: as of trainer/run.py.
      train: the teacher is trained first, on labels alone, by the recipe with these overrides; null takes `checkpoint`,
        or timm's weights.
      codec: of the store.
      epochs: record this many, and repeat their images for the rest of the training (augment.cycle_epochs); 0 is all.
    """

    key = "teacher"
    name: str
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    checkpoint: str | None = None
    train: Overrides | None = None
    codec: str = "int8"
    epochs: int = setting(0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        check_kwargs("teacher", self.kwargs)
        if self.train is not None and self.checkpoint is not None:
            raise UserError("teacher.checkpoint and teacher.train are both given: leave one of them out")


@dataclasses.dataclass(frozen=True)
class Student(Section):
    """A student.

    Attributes:
      name, kwargs: as of trainer/run.py.
      title: what the report calls it; empty is the name.
      seeds: of the initial weights and dropout; each is a training of its own on the same images.
      overrides: settings that this student alone has. The report warns of them.
    """

    name: str
    title: str = setting("", may_be_empty=True)
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    seeds: list[int] = setting(factory=lambda: [0], at_least=0)
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        check_kwargs("student", self.kwargs)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}: name at least one, and each once")

    @property
    def label(self) -> str:
        """What people call it."""
        return self.title or self.name


@dataclasses.dataclass(frozen=True)
class EvaluateSection(Section):
    """What is evaluated of each student.

    Attributes:
      weights: of the last checkpoint; the first kind is exported. Without an EMA raw is evaluated alone.
      suites: name -> settings of tools/evaluate.py, for further evaluations of the first kind of weights.
    """

    key = "evaluate"
    weights: list[Literal["ema", "raw"]] = dataclasses.field(default_factory=lambda: ["ema", "raw"])
    suites: dict[str, Overrides] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SpeedSection(Section):
    """How speed is measured: the options of tools/compare.py, whose defaults hold where they are null."""

    key = "speed"
    backends: list[str] | None = None
    batch: int | None = setting(None, at_least=1)
    repeats: int | None = setting(None, at_least=1)


@dataclasses.dataclass(frozen=True)
class Study(Section):
    """A study.

    Attributes:
      students: at least one.
      title: heading of the report; empty is the file's name.
      dataset: folder of shards; source: what to make them of, a folder that tools/shard_imagenet.py takes, or the word
        digits for scikit-learn's. One of the two is given.
      teacher: null trains on labels alone.
      together: students that are trained in one process, on the same batches.
      speed: null measures no speed.
      paper: usi shows the paper's accuracies beside the measured ones.
    """

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


def read_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
      UserError: the file is missing or malformed, or a key or value is none of a study's; it names the file.
    """
    content = read_yaml(path)
    parts = {"recipe": RecipeSection, "teacher": TeacherSection, "evaluate": EvaluateSection, "speed": SpeedSection}
    try:
        for key, kind in parts.items():
            if content.get(key) is not None:
                content[key] = _filled(kind, content[key], f"{key}: ")
        if isinstance(content.get("students"), list):
            content["students"] = [
                _filled(Student, {"name": each} if isinstance(each, str) else each, f"students[{number}]: ")
                for number, each in enumerate(content["students"])
            ]
        study = _filled(Study, {"title": path.stem, **content}, "")
        _check_overrides("recipe", study.recipe.overrides)
        _check_overrides("teacher", (study.teacher and study.teacher.train) or {})
        for number, student in enumerate(study.students):
            _check_overrides(f"students[{number}]", student.overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return study


def _filled(kind: Any, content: Any, where: str) -> Any:
    """An instance of a section's dataclass with the values of a file."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(content, dict):
        raise UserError(f"{where}is {clipped(content)}, not keys with values")
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(fields)}"
            raise UserError(f"{where}unknown key '{clipped(key)}'; {hint}")
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if name not in content and not has_default:
            raise UserError(f"{where}'{name}' is missing")
    try:
        return kind(**content)
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _check_overrides(where: str, overrides: Overrides) -> None:
    for key in overrides:
        if key in _DECIDED:
            raise UserError(f"{where}: {key} among its overrides: the study decides it. Leave it out")
