"""What a study has found, as its report reads it: plain values, and where the files are."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class StudentResult:
    """A student with one seed.

    Attributes:
      title: what people call the student; all its seeds have the same one.
      name, kwargs: timm's name of it, and arguments for timm.create_model.
      seed: of its initial weights and dropout (student.seed).
      overrides: settings that this student alone has, SECTION.NAME -> value; {} in a fair comparison.
      run: folder of the training, which may be unfinished; None where it never began.
      evaluations: JSON files of tools/evaluate.py --run.json, by what was evaluated: "ema" and "raw" weights of the
        last checkpoint on the dataset's own validation images, then a name for each suite. Those that failed or were
        not asked for are absent ("raw" may be: the run's summary.json has its accuracy). Beside each lies a file with
        .npz in place of .json: the predictions of each image, as tools/evaluate.py --run.predictions writes them
        (arrays sample, label, top, confidence, loss).
      exported: folder of tools/export.py with the model card; None where it failed.
      failed: the first stage that failed and the last line that it printed; "" where all are done.
      log: file with the output of the failed stage; None where all are done.
      commands: of all its stages in the order of time, each a list of words as a user would type them.
    """

    title: str
    name: str
    kwargs: dict[str, Any]
    seed: int
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: Path | None = None
    evaluations: dict[str, Path] = dataclasses.field(default_factory=dict)
    exported: Path | None = None
    failed: str = ""
    log: Path | None = None
    commands: list[list[str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class TeacherResult:
    """The teacher.

    Attributes:
      name: timm's name of it.
      run: folder of its training, None where it was not trained here.
    """

    name: str
    run: Path | None = None


@dataclasses.dataclass(frozen=True)
class PaperPoint:
    """An accuracy that somebody has published, to be shown beside ours and marked so.

    Attributes:
      name: timm's name of the model.
      top1: percent.
      source: where it was published.
    """

    name: str
    top1: float
    source: str


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """Everything that a study has made.

    Attributes:
      title: name of the study.
      dataset: folder of the shards; None where they could not be made.
      students: in the order of the study's file, the seeds of a student one after the other.
      teacher: None in a study that learns from labels alone.
      store: folder of the recorded teacher, None without one.
      speed: comparison.json of tools/compare.py, None where it was not asked for or failed.
      speed_models: title of a student -> what its rows in that file have as `model`.
      seconds: how long each finished stage has taken, over all its starts, by the stage's name.
      stages_failed: stages that belong to no student (shards, teacher, store, speed) and failed: name -> last line.
      commands: of these stages, by name.
      paper: published accuracies of these students.
    """

    title: str
    dataset: Path | None
    students: list[StudentResult]
    teacher: TeacherResult | None = None
    store: Path | None = None
    speed: Path | None = None
    speed_models: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    stages_failed: dict[str, str] = dataclasses.field(default_factory=dict)
    commands: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    paper: list[PaperPoint] = dataclasses.field(default_factory=list)
