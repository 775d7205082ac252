"""Checks a study before it runs anything, each mistake in one line, and prints what --dry-run shows."""

import contextlib
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from pipelines.common.errors import ROOM, UserError, named, naming
from pipelines.common.files import check_can_be_made, read_json
from pipelines.common.machine import expanded
from pipelines.shards.dataset import Dataset, open_dataset
from pipelines.shards.manifest import MANIFEST
from tools.lib.common.terminal import console
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.study.graph import Graph
from tools.lib.study.running import command_of_job, jobs_of
from tools.lib.study.screen import shortened
from tools.lib.study.stage import INPUTS, SETTINGS, Stage, changes, command_of
from trainer.builder import build_for_check
from trainer.config.sections import Config, to_yaml
from trainer.models.class_names import order_doubt
from trainer.models.factory import starting_weights
from trainer.models.teacher import build_teachers
from trainer.targets.codec import open_codec

_BYTES_A_PARAMETER = 4 * (2 * 4 + 2)  # Two checkpoints with weights, EMA and two moments; best.pt; the exported model.


def check_study(graph: Graph) -> None:
    """Raise a UserError about what would fail later: a dataset, a model, a setting of a run, space on the disk."""
    dataset = open_images(graph)
    num_classes = len(dataset.classes) if dataset else {"digits": 10}.get(str(graph.study.source), 0)  # 0: not known
    teacher, store, needed = graph.study.teacher, graph.common.get("store"), 0
    with torch.random.fork_rng(devices=[]):
        if teacher is not None and store is not None and store.config is not None and not store.is_done:
            with naming(graph.file, "teacher"):
                row_bytes = open_codec(teacher.codec, num_classes or 1).row_bytes
                if teacher.train is None:
                    check_teacher(store.config, num_classes, dataset)
            num_bytes = len(dataset.train) * store.epochs * row_bytes if dataset else 0
            needed += max(0, num_bytes - num_bytes_in(store.folder))
        for where, trainings in to_be_trained(graph).items():
            assert (config := trainings[0].config) is not None
            with naming(graph.file, where):
                run = build_for_check(config, None if dataset else num_classes or 1000)
            num_bytes = sum(each.numel() for each in run.state.student.parameters()) * _BYTES_A_PARAMETER
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


def open_images(graph: Graph) -> Dataset | None:
    """The dataset, None as long as the study has not made it. Raises a UserError if there are no images."""
    source = graph.study.source
    if source not in (None, "digits") and not expanded(source).exists():
        raise UserError(f"{graph.file}: source is {source}: not found. Name a folder of images, or the word digits")
    if source is not None and not graph.common["shards"].is_done:
        return None
    dataset = open_dataset(graph.dataset)
    if dataset.val is None:
        raise UserError(f"{graph.dataset}: has no split 'val', which a study needs")
    return dataset


def to_be_trained(graph: Graph) -> dict[str, list[Stage]]:
    """The trainings that are not done, those that differ in the seed alone together, by the key that names them."""
    trainings = [("teacher.train", graph.common["teacher"])] if "teacher" in graph.common else []
    trainings += [(f"students[{graph.study.students.index(each.student)}]", each.train) for each in graph.students]
    found: dict[str, list[Stage]] = {}
    for where, training in trainings:
        if not training.is_done:
            found.setdefault(where, []).append(training)
    return found


def check_teacher(config: Config, num_classes: int, dataset: Dataset | None) -> None:
    """Raise a UserError if a teacher that is not trained here has no weights for the classes, or takes no such size."""
    teacher, names, doubt = config.teacher, None, ""
    if dataset is not None:
        names, doubt = list(dataset.classes), order_doubt(config.data.root)
    outputs = starting_weights(str(teacher.name), teacher.checkpoint, teacher.classes).outputs
    build_teachers(config, num_classes or outputs or 1000, names, doubt)


def show_stages(graph: Graph, seconds: float) -> None:
    """Print what the command would do, without doing it; `seconds` as for tools/doctor.py, 0 measures nothing."""
    graph, screen = graph.with_speed(), console()
    has_shards = (graph.dataset / MANIFEST).is_file()
    alike = {stage: (stage.kind, stage.subject.rpartition("-s")[0]) for stage in graph.stages}
    taken = {alike[stage]: f"took {human_seconds(stage.seconds)}" for stage in graph.stages if stage.is_done}
    costs = {stage: f"{taken[key]} with another seed" for stage, key in alike.items() if key in taken}
    if seconds and has_shards:
        with screen.status("measuring the trainings; --seconds 0 leaves that out"):
            for trainings in to_be_trained(graph).values():
                costs |= dict.fromkeys(trainings, f"takes {estimate(trainings[0], seconds)}")
    left = [stage for stage in graph.stages if not stage.is_done]
    lines = [f"# {stage.name}: {stage.state}" for stage in graph.stages if stage not in left]
    for job in jobs_of(left, graph.study.together):
        for stage in job:
            needs = f"needs {stage.missing}" if stage.missing else ""
            parts = (stage.state, shortened(stage.failure), costs.get(stage), needs)
            lines.append(f"# {stage.name}: {'; '.join(filter(None, parts))}")
        lines.append(shlex.join(command_of_job(job)))
    lines += [*redone(graph), f"to be done: {len(left)} of {len(graph.stages)} stages, and the report"]
    lines.append(f"the study writes the {SETTINGS} of a stage when the stage begins")
    if graph.study.speed is not None and "speed" not in graph.common:
        lines.append("speed is measured before the report, as soon as students are exported")
    if not has_shards:
        lines.append("costs, and the room for the store, are known as soon as there are shards")
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def redone(graph: Graph) -> list[str]:
    """A line for each change since the last start that makes stages be done again."""
    found, num = changes(graph.stages, read_json(graph.out / INPUTS)), len(graph.stages)
    names = {change: [stage.name for stage in stages] for change, stages in found.items()}
    return [f"{change}: does {len(each)} of {num} stages again: {named(each, 4)}" for change, each in names.items()]


def estimate(training: Stage, seconds: float) -> str:
    """How long a training would take, by tools/doctor.py.

    It is measured without a teacher, because the store may not be there yet, and reading it costs little.
    """
    assert training.config is not None
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.yaml", Path(folder) / "doctor.json"
        settings.write_text(to_yaml(training.config))
        without_teacher = [f"--teacher.{name}=null" for name in ("name", "store", "checkpoint", "classes")]
        without_teacher += ["--teacher.image_size=0", "--distill.label_weight=1"]
        words = ["--run.out", f"{folder}/run", "--seconds", str(seconds), "--no-trials", "--json", str(result)]
        command = command_of("tools/doctor.py", settings, *without_teacher, *words)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        left = read_json(result).get("seconds_left")
        return human_seconds(left) if isinstance(left, int | float) else "unknown"
