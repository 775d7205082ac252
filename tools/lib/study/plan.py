"""Checks a study before it runs anything, each mistake in one line, and prints what --dry-run shows."""

import contextlib
import dataclasses
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from pipelines.common.errors import ROOM, UserError
from pipelines.common.files import check_can_be_made, read_json
from pipelines.common.machine import expanded
from pipelines.shards.manifest import MANIFEST, read_manifest
from tools.lib.common.terminal import console
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.study.graph import Graph
from tools.lib.study.running import command_of_job, jobs_of
from tools.lib.study.settings import naming
from tools.lib.study.stage import SETTINGS, Stage, command_of
from trainer.builder import build
from trainer.config.sections import Config, DistillConfig, TeacherConfig, to_yaml
from trainer.models.class_names import order_doubt
from trainer.models.factory import starting_weights
from trainer.models.teacher import build_teacher, check_and_fold
from trainer.targets.codec import open_codec

_BYTES_A_PARAMETER = 4 * (2 * 4 + 2)  # Two checkpoints with weights, EMA and two moments; best.pt; the exported model.


class Images(NamedTuple):
    """The dataset as far as it is known: before there are shards, 0 and None stand for the rest."""

    num_classes: int
    classes: list[str] | None = None
    num_train: int = 0


def check_study(graph: Graph) -> None:
    """Raise a UserError about what would fail later: a dataset, a model, a setting of a run, space on the disk."""
    images, needed = check_images(graph), 0
    store = graph.common.get("store")
    with torch.random.fork_rng(devices=[]):
        if graph.study.teacher is not None and store is not None and not store.is_done:
            row_bytes = open_codec(graph.study.teacher.codec, images.num_classes or 1).row_bytes
            needed += max(0, images.num_train * store.epochs * row_bytes - num_bytes_in(store.folder))
            if "teacher" not in graph.common and store.config is not None:
                with naming(graph.file, "teacher"):
                    check_teacher(store.config, images)
        for where, trainings in to_be_trained(graph).items():
            with naming(graph.file, where):
                num_bytes = num_parameters(trainings[0], images) * _BYTES_A_PARAMETER
                needed += sum(max(0, num_bytes - num_bytes_in(training.folder)) for training in trainings)
    free = shutil.disk_usage(check_can_be_made(graph.out, "Change --out")).free
    if needed > free:
        raise UserError(
            f"{graph.out}: the study needs about {human_bytes(needed)} more for the store, checkpoints and exported "
            f"models, and its disk has {human_bytes(free)} left. {ROOM}, or change --out"
        )


def num_bytes_in(folder: Path) -> int:
    """The size of all files in a folder, 0 where it is not there."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # A running study replaces files.
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def check_images(graph: Graph) -> Images:
    """Find out what can be known of the images now; raise a UserError if there are none."""
    source = graph.study.source
    if source not in (None, "digits") and not expanded(source).exists():
        raise UserError(f"{graph.file}: source is {source}: not found. Name a folder of images, or the word digits")
    if source is not None and not graph.common["shards"].is_done:
        return Images(10 if source == "digits" else 0)
    manifest = read_manifest(graph.dataset)
    for split in ("train", "val"):
        if split not in manifest["splits"]:
            raise UserError(f"{graph.dataset}: has no split '{split}', which a study needs")
    return Images(len(manifest["classes"]), list(manifest["classes"]), manifest["splits"]["train"]["samples"])


def to_be_trained(graph: Graph) -> dict[str, list[Stage]]:
    """The trainings that are not done, those that differ in the seed alone together, by the key that names them."""
    found = {"teacher.train": [graph.common["teacher"]] if "teacher" in graph.common else []}
    for number, student in enumerate(graph.study.students):
        found[f"students[{number}]"] = [each.train for each in graph.students if each.student is student]
    left = {where: [stage for stage in stages if not stage.is_done] for where, stages in found.items()}
    return {where: stages for where, stages in left.items() if stages}


def check_teacher(config: Config, images: Images) -> None:
    """Raise a UserError if a teacher that is not trained here has no weights for the classes, or takes no such size."""
    teacher, sizes = config.teacher, config.data.train_sizes
    start = starting_weights(str(teacher.name), teacher.checkpoint, teacher.classes)
    if images.num_classes:
        doubt = order_doubt(config.data.root) if images.classes is not None else ""
        built = build_teacher(teacher, images.num_classes, sizes[-1], names=images.classes, doubt=doubt)
        check_and_fold(built, teacher, "teacher", sizes)
    elif teacher.checkpoint is not None:
        start.build(start.outputs or 1000, teacher.image_size or sizes[-1], teacher.kwargs)


def num_parameters(training: Stage, images: Images) -> int:
    """The number of a model's parameters, after a run of its settings has been built.

    It is built without the teacher, on the CPU, and of synthetic images as long as there are no shards. What depends on
    the machine of the run, such as its GPUs, is left to the run.
    """
    config = training.config
    assert config is not None
    batch_norm = "reduce" if config.run.batch_norm == "sync" else config.run.batch_norm  # The former needs GPUs.
    # The folder is none that exists, so that no checkpoint is read.
    changed = {"out": training.folder / "check", "device": "cpu", "compile": False, "loggers": []}
    run = dataclasses.replace(config.run, batch_norm=batch_norm, **changed)
    data = dataclasses.replace(config.data, pipeline="torchvision")
    if images.classes is None:
        synthetic = {"synthetic_classes": images.num_classes or 1000, "synthetic_samples": run.global_batch}
        data = dataclasses.replace(data, root=None, pipeline="synthetic", **synthetic)
    student = build(
        dataclasses.replace(config, data=data, run=run, teacher=TeacherConfig(name=None), distill=DistillConfig())
    ).state.student
    return sum(parameter.numel() for parameter in student.parameters())


def show_plan(graph: Graph, seconds: float) -> None:
    """Print what the command would do, without doing it; `seconds` as for tools/doctor.py, 0 measures nothing."""
    graph.add_speed()
    screen, costs = console(), {}
    has_shards = (graph.dataset / MANIFEST).is_file()
    if seconds and has_shards:
        with screen.status("measuring the trainings; --seconds 0 leaves that out"):
            for trainings in to_be_trained(graph).values():
                costs |= dict.fromkeys(trainings, estimate(trainings[0], seconds))
    lines = [f"# {stage.name}: {state_of(stage)}" for stage in graph.stages if stage.is_done]
    for job in jobs_of(graph.stages, graph.study.together):
        for stage in job:
            missing = ", ".join(need.name for need in stage.needs if not need.is_done)
            behind = f"; needs {missing}" if missing else ""
            lines.append(f"# {stage.name}: {state_of(stage)}; takes {costs.get(stage, 'an unknown time')}{behind}")
        lines.append(shlex.join(command_of_job(job)))
    num_left = sum(not stage.is_done for stage in graph.stages)
    lines.append(f"{num_left} of {len(graph.stages)} stages are to be done; the report comes last")
    lines.append(f"the study writes the {SETTINGS} of a stage when the stage begins")
    if graph.study.speed is not None and "speed" not in graph.common:
        lines.append("speed is measured before the report, as soon as students are exported")
    if not has_shards:
        lines.append("costs, and the room for the store, are known as soon as there are shards")
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def state_of(stage: Stage) -> str:
    """Whether a stage is done, and what its next start is for."""
    if stage.is_done:
        return f"done in {human_seconds(stage.seconds)}"
    if reason := stage.reason_to_redo():
        return f"again: {reason}"
    if stage.failure:
        return f"again, after it failed: {stage.failure}"
    if stage.num_steps_saved:
        return f"to be resumed after step {stage.num_steps_saved}"
    return "to be resumed" if stage.folder.exists() else "to do"


def estimate(training: Stage, seconds: float) -> str:
    """How long a training would take, by tools/doctor.py.

    It is measured without a teacher, because the store may not be there yet, and reading it costs little.
    """
    assert training.config is not None
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.yaml", Path(folder) / "doctor.json"
        settings.write_text(to_yaml(training.config))
        without_teacher = [f"--teacher.{name}=null" for name in ("name", "store", "checkpoint")]
        words = ["--run.out", f"{folder}/run", "--seconds", str(seconds), "--no-trials", "--json", str(result)]
        command = command_of("tools/doctor.py", settings, *without_teacher, *words)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        left = read_json(result).get("seconds_left")
        return human_seconds(left) if isinstance(left, int | float) else "unknown"
