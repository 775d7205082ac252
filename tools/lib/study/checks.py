"""What is checked before a study runs anything: each mistake is one line."""

import os
import shutil
from pathlib import Path

import torch

from pipelines.common.errors import ROOM, UserError
from pipelines.common.machine import expanded
from pipelines.shards.manifest import read_manifest
from tools.lib.common.units import human_bytes
from tools.lib.study.graph import Graph, StudentStages
from tools.lib.study.settings import Study
from trainer.models.checks import check_student
from trainer.models.factory import known_name
from trainer.models.files.model_folders import SOURCES, source_name
from trainer.models.student import build_student
from trainer.targets.codec import open_codec

_UNKNOWN_CLASSES = 1000  # The checks build models of this many classes where there is no dataset yet.
_BYTES_A_PARAMETER = 4 * (2 * 4 + 2)  # Two checkpoints with weights, EMA and two moments; best.pt; the exported model.


def check_study(study: Study, graph: Graph, out: Path) -> None:
    """Raise a UserError about what would fail later: a dataset, a model, an image size, space on the disk."""
    classes, samples = check_images(study, graph)
    names = [each.name for each in (study.teacher, *study.students) if each is not None]
    for name in names:
        if not source_name(name).startswith(SOURCES):
            known_name(name)
    needed = 0
    if study.teacher is not None:
        row_bytes = open_codec(study.teacher.codec, classes).row_bytes
        needed += 0 if graph.common["store"].is_done else samples * graph.epochs * row_bytes
    parameters: dict[str, int] = {}
    for each in graph.students:
        if not each.train.is_done:
            key = f"{each.student.name} {each.student.kwargs} {each.student.overrides}"
            parameters[key] = parameters.get(key) or num_parameters(each, classes)
            needed += parameters[key] * _BYTES_A_PARAMETER
    check_space(out, needed)


def check_images(study: Study, graph: Graph) -> tuple[int, int]:
    """The numbers of classes and training images, as far as they are known; a UserError if there are no images."""
    if study.source not in (None, "digits") and not expanded(str(study.source)).exists():
        raise UserError(f"source is {study.source}: not found. Name a folder of images, or the word digits")
    if study.source is not None and not graph.common["shards"].is_done:
        return _UNKNOWN_CLASSES, 0
    manifest = read_manifest(graph.dataset)
    for split in ("train", "val"):
        if split not in manifest["splits"]:
            raise UserError(f"{graph.dataset}: has no split '{split}', which a study needs")
    return len(manifest["classes"]), manifest["splits"]["train"]["samples"]


def num_parameters(each: StudentStages, classes: int) -> int:
    """The number of a student's parameters, after checking that it takes its images."""
    with torch.random.fork_rng(devices=[]):
        model = build_student(each.config.student, classes, each.config.data.train_sizes[-1])
        check_student(model, each.config)
    return sum(parameter.numel() for parameter in model.parameters())


def check_space(out: Path, needed: int) -> None:
    """Raise a UserError if the folder cannot be written, or its disk has less room than the study needs."""
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{out}: cannot be made, {existing} is not a folder that can be written. Change --out")
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{out}: the study needs about {human_bytes(needed)} for the store, checkpoints and exported models, and "
            f"its disk has {human_bytes(free)} left. {ROOM}, or change --out"
        )
