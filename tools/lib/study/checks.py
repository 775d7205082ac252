"""Checks a study before it runs anything. Each mistake is one line, which names the key of the study's file."""

import contextlib
import shutil
from pathlib import Path

import torch

from pipelines.common.errors import ROOM, UserError, naming
from pipelines.common.files import check_can_be_made
from pipelines.common.machine import expanded
from pipelines.shards.dataset import Dataset, open_dataset
from tools.lib.common.units import human_bytes
from tools.lib.study.graph import Graph
from tools.lib.study.stage import Stage
from trainer.builder import build_for_check
from trainer.config.sections import Config
from trainer.models.class_names import order_doubt
from trainer.models.factory import starting_weights
from trainer.models.teacher import build_teachers
from trainer.targets.codec import open_codec

_BYTES_OF_A_CHECKPOINT = 4 * 4  # A parameter: its weight, its EMA, and two moments of the optimizer.


def check_study(graph: Graph) -> int:
    """Raise a UserError about what would fail later: a dataset, a model, a setting of a run, space on the disk.

    Returns:
      how many bytes the study still needs on the disk, without those of a dataset that it makes.
    """
    dataset = open_images(graph)
    num_classes = len(dataset.classes) if dataset else {"digits": 10}.get(str(graph.study.source), 0)  # 0: not known
    teacher, store, needed = graph.study.teacher, graph.common.get("store"), 0
    with torch.random.fork_rng(devices=[]):
        if teacher is not None and store is not None and store.config is not None and not store.is_done:
            with naming(graph.file, "teacher"):
                # Most codecs serve 10,000 classes, which stand for a number that is not known yet.
                codec = open_codec(teacher.codec, num_classes or 10_000)
                temperatures = {each.config.distill.temperature for each in graph.students if store in each.train.needs}
                if temperatures != {1} and not codec.any_temperature:
                    raise UserError(f"codec {codec.name} serves distill.temperature 1 alone. Use int8, or that")
                if teacher.train is None:
                    check_teacher(store.config, num_classes, dataset)
            num_bytes = len(dataset.train) * store.epochs * codec.row_bytes if dataset else 0
            needed += max(0, num_bytes - num_bytes_in(store.folder))
        for where, trainings in to_be_trained(graph).items():
            assert (config := trainings[0].config) is not None
            with naming(graph.file, where):
                run = build_for_check(config, None if dataset else num_classes or 1000)
            of_parameter = config.run.keep_checkpoints * _BYTES_OF_A_CHECKPOINT + 2 * 4  # With best.pt and the export.
            num_bytes = sum(each.numel() for each in run.state.student.parameters()) * of_parameter
            needed += sum(max(0, num_bytes - num_bytes_in(training.folder)) for training in trainings)
    free = shutil.disk_usage(check_can_be_made(graph.out, "Change --out")).free
    if needed > free:
        raise UserError(
            f"{graph.out}: the study needs about {human_bytes(needed)} more for the store, checkpoints and exported "
            f"models, and its disk has {human_bytes(free)} left. {ROOM}, or change --out"
        )
    return needed


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
