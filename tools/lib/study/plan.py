"""Checks a study before it runs anything, each mistake in one line, and prints what --dry-run shows."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.text import Text

from pipelines.common.errors import ROOM, UserError
from pipelines.common.files import check_can_be_made, read_json
from pipelines.common.machine import expanded
from pipelines.shards.manifest import MANIFEST, read_manifest
from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.study.graph import Graph, StudentStages
from tools.lib.study.running import REPOSITORY, command_of, jobs_of, shown
from tools.lib.study.stage import Stage
from trainer.config.sections import to_yaml
from trainer.models.checks import check_student
from trainer.models.factory import known_name
from trainer.models.files.model_folders import SOURCES, source_name
from trainer.models.student import build_student
from trainer.targets.codec import open_codec

_UNKNOWN_CLASSES = 1000  # The checks build models of this many classes where there is no dataset yet.
_BYTES_A_PARAMETER = 4 * (2 * 4 + 2)  # Two checkpoints with weights, EMA and two moments; best.pt; the exported model.


def check_study(graph: Graph) -> None:
    """Raise a UserError about what would fail later: a dataset, a model, an image size, space on the disk."""
    study, (classes, samples) = graph.study, check_images(graph)
    for each in (study.teacher, *study.students):
        if each is not None and not source_name(each.name).startswith(SOURCES):
            known_name(each.name)
    needed = 0
    if study.teacher is not None:
        row_bytes = open_codec(study.teacher.codec, classes).row_bytes
        needed += 0 if graph.common["store"].is_done else samples * graph.epochs * row_bytes
    for seeds in to_be_trained(graph).values():
        needed += len(seeds) * num_parameters(seeds[0], classes) * _BYTES_A_PARAMETER
    check_space(graph.out, needed)


def check_images(graph: Graph) -> tuple[int, int]:
    """The numbers of classes and training images, as far as they are known; a UserError if there are no images."""
    source = graph.study.source
    if source not in (None, "digits") and not expanded(source).exists():
        raise UserError(f"source is {source}: not found. Name a folder of images, or the word digits")
    if source is not None and not graph.common["shards"].is_done:
        return _UNKNOWN_CLASSES, 0
    manifest = read_manifest(graph.dataset)
    for split in ("train", "val"):
        if split not in manifest["splits"]:
            raise UserError(f"{graph.dataset}: has no split '{split}', which a study needs")
    return len(manifest["classes"]), manifest["splits"]["train"]["samples"]


def to_be_trained(graph: Graph) -> dict[str, list[StudentStages]]:
    """The seeds of each student that are not trained yet."""
    found: dict[str, list[StudentStages]] = {}
    for each in graph.students:
        if not each.train.is_done:
            found.setdefault(each.student.label, []).append(each)
    return found


def num_parameters(each: StudentStages, classes: int) -> int:
    """The number of a student's parameters, after checking that it takes its images."""
    with torch.random.fork_rng(devices=[]):
        model = build_student(each.config.student, classes, each.config.data.train_sizes[-1])
        check_student(model, each.config)
    return sum(parameter.numel() for parameter in model.parameters())


def check_space(out: Path, needed: int) -> None:
    """Raise a UserError if the folder cannot be written, or its disk has less room than the study needs."""
    free = shutil.disk_usage(check_can_be_made(out, "Change --out")).free
    if needed > free:
        raise UserError(
            f"{out}: the study needs about {human_bytes(needed)} for the store, checkpoints and exported models, and "
            f"its disk has {human_bytes(free)} left. {ROOM}, or change --out"
        )


def show_plan(graph: Graph, seconds: float) -> None:
    """Print what the command would do, without doing it; `seconds` as for tools/doctor.py, 0 measures nothing."""
    graph.add_speed()
    screen, costs = console(), {}
    if seconds and (graph.dataset / MANIFEST).is_file():
        with screen.status("measuring the students; --seconds 0 leaves that out"):
            for seeds in to_be_trained(graph).values():
                costs |= dict.fromkeys((each.train for each in seeds), estimate(seeds[0], seconds))
    rows = [(s.name, Text(state_of(s)), "" if s.is_done else costs.get(s, "unknown")) for s in graph.stages]
    screen.print(terminal_table(["stage", "state", "cost"], rows, text=(0, 1, 2)))
    for job in jobs_of(graph.stages, graph.study.together):
        screen.print(shown(command_of(job)), markup=False, highlight=False, soft_wrap=True)
    num_left = sum(not stage.is_done for stage in graph.stages)
    screen.print(f"{num_left} of {len(rows)} stages are to be done; the report comes last")
    if graph.study.speed is not None and "speed" not in graph.common:
        screen.print("speed is measured before the report, as soon as students are exported")
    if not (graph.dataset / MANIFEST).is_file():
        screen.print("costs, and the room for the store, are known as soon as there are shards")


def state_of(stage: Stage) -> str:
    """Whether a stage is done, and what its next start is for."""
    if stage.is_done:
        return f"done in {human_seconds(stage.seconds)}"
    if reason := stage.reason_to_redo():
        return f"again: {reason}"
    if stage.failure:
        return f"again, after it failed: {stage.failure}"
    return "to be resumed" if stage.folder.exists() else "to do"


def estimate(each: StudentStages, seconds: float) -> str:
    """How long a training would take, by tools/doctor.py.

    It is measured without a teacher, because the store may not be there yet, and reading it costs little.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.yaml", Path(folder) / "doctor.json"
        settings.write_text(to_yaml(each.config))
        without_teacher = [f"--teacher.{name}=null" for name in ("name", "store", "checkpoint")]
        words = ["--run.out", f"{folder}/run", "--seconds", str(seconds), "--no-trials", "--json", str(result)]
        command = [sys.executable, "tools/doctor.py", str(settings), *without_teacher, *words]
        subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        left = read_json(result).get("seconds_left")
        return human_seconds(left) if isinstance(left, int | float) else "unknown"
