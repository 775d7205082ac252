"""Runs on the stand-in that are built in the test's own process."""

from pathlib import Path

import timm
import torch

import support.tiny_model  # noqa: F401  (registers the student of most runs here)
from pipelines.batch import Batch
from trainer.builder import Run, build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans

GPU = World(0, 1, 1, torch.device("cuda", 0))
SMALL = {
    "student.name": "tiny_cnn",
    "teacher.name": "null",
    "data.pipeline": "synthetic",
    "data.synthetic_samples": 256,
    "data.synthetic_classes": 10,
    "data.image_size": 32,
    "augment.mix_group": 16,
    "run.global_batch": 32,
    "run.precision": "bf16",
    "run.compile": "false",
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 1,
    "schedule.cooldown_epochs": 0,
}


def arguments(out: Path, settings: dict) -> list[str]:
    """The command line of a small run, two micro-batches an update, with these settings."""
    return [text for key, value in ({**SMALL, "run.out": out} | settings).items() for text in (f"--{key}", str(value))]


def built(out: Path, settings: dict) -> Run:
    """A run of one rank."""
    return build(parse(arguments(out, settings)), GPU)


def updates(run: Run, first: int, stop: int) -> list[list[Batch]]:
    """The micro-batches of the updates [first, stop), ready on the device."""
    batches = list(run.pipelines.of["train"].batches(rank_plans(run.plan, first, stop, GPU, run.state.micro_batch)))
    each = run.step.num_micro_batches
    return [batches[i : i + each] for i in range(0, len(batches), each)]


def teacher_file(folder: Path) -> Path:
    """Random weights of a teacher for ten classes."""
    path = folder / "teacher.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("tiny_cnn", num_classes=10).state_dict(), path)
    return path
