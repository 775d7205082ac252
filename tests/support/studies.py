"""A study of digits whose graph tests read, with what a test changes of it."""

import copy
from pathlib import Path

import yaml

from conftest import REPOSITORY
from tools.lib.study.graph import Graph, read_graph

DEMO = {
    "source": "digits",
    "recipe": {"config": str(REPOSITORY / "configs" / "demo.yaml"), "overrides": {"schedule.epochs": 6}},
    "teacher": {"name": "test_resnet", "train": {"schedule.epochs": 7}},
    "students": ["test_byobnet", {"name": "test_vit", "seeds": [0, 1], "title": "ViT"}],
    "evaluate": {"weights": ["ema", "raw"], "suites": {"small": {"data.image_size": 24}}},
    "speed": {"backends": ["eager"], "repeats": 3},
}


def graph_of(folder: Path, content: dict = DEMO) -> Graph:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    return read_graph(file, folder / "out")


def changed(*path_and_value) -> dict:
    """DEMO with one value changed, at a path of keys, or one more entry in a list."""
    content = copy.deepcopy(DEMO)
    *path, last, value = path_and_value
    inner = content
    for key in path:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
    if isinstance(inner, list) and last == len(inner):
        inner.append(value)
    else:
        inner[last] = value
    return content
