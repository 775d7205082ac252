"""Runs with teachers whose weights are in files."""

import json
from pathlib import Path

import pytest
import timm
import torch

from conftest import TINY
from pipelines.common.files import read_json_lines
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.loop import train

ONE = World(0, 1, 1, torch.device("cpu"))


VIT = {"depth": 1}  # The model is vit_tiny_patch16_224, which takes one size of image.


def arguments(digits: Path, out: Path, *more) -> list[str]:
    return [*TINY, "--data.root", str(digits), "--run.out", str(out), *map(str, more)]


def train_here(digits: Path, out: Path, *more) -> list[dict]:
    """The train lines of a run in this process."""
    train(build(parse(arguments(digits, out, "--run.log_every", 1, *more)), ONE))
    return [line for line in read_json_lines(out / "metrics.jsonl") if line["kind"] == "train"]


def first_teacher(files, name="test_resnet") -> list[str]:
    return ["--teacher.name", name, "--teacher.checkpoint", str(files[name])]


def other(files, name, **more) -> str:
    return json.dumps([{"name": name, "checkpoint": str(files[name]), **more}])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Weights of three models of ten classes, none of which has learned anything."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(5)
    models = {
        "test_resnet": timm.create_model("test_resnet", num_classes=10),
        "resnet18": timm.create_model("resnet18", num_classes=10),
        "vit_tiny_patch16_224": timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=48, **VIT),
    }
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in models}
