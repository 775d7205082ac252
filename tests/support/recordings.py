"""Small recordings: the digits in steps of 8 images, 40 steps an epoch, and a teacher with very few weights."""

from pathlib import Path

import timm
import torch

import support.tiny_model  # noqa: F401  (registers the teacher)
from conftest import TINY
from tools.record_teacher import main

SMALL = [*TINY, "--augment.mix_group", "8", "--run.global_batch", "8"]


def save_teacher(path: Path, seed: int = 5, scale: float = 300.0) -> list[str]:
    """Write the weights of a teacher that has learned nothing. Returns the settings that name it.

    Args:
      scale: factor of the classifier's weights; by itself it would give all classes nearly the same probability.
    """
    torch.manual_seed(seed)
    model = timm.create_model("tiny_cnn", num_classes=10)
    with torch.no_grad():
        model.get_classifier().weight.mul_(scale)
    torch.save(model.state_dict(), path)
    return ["--teacher.name", "tiny_cnn", "--teacher.checkpoint", str(path)]


def command(store: Path, root: Path, teacher: list[str], *more: object) -> list[str]:
    """The arguments of a recording of four epochs, 160 steps in three blocks."""
    return [str(store), "--epochs", "4", *SMALL, *teacher, "--data.root", str(root), *map(str, more)]


def record(store: Path, root: Path, teacher: list[str], *more: object) -> Path:
    """Record in this process; mistakes end it with SystemExit. Returns the store."""
    main(command(store, root, teacher, *more))
    return store


def files(store: Path) -> dict[str, bytes]:
    """The content of a store's files by their names, without what killed processes have left."""
    return {path.name: path.read_bytes() for path in store.iterdir() if path.suffix != ".partial"}


def pieces(store: Path) -> list[str]:
    """The names of a store's pieces, in the order of their steps."""
    return sorted(path.name for path in store.glob("*.safetensors"))
