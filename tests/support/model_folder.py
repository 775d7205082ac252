"""Folders with a model as timm writes them for Hugging Face's hub."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from trainer.models.files.model_folders import _any_hub_file

NAME = "test_vit"


CLASSES = list("abcdefg")


def write_folder(folder: Path, model: torch.nn.Module, **changed) -> Path:
    """A folder as timm's save_for_hf writes it."""
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    own = timm.get_pretrained_cfg(NAME).to_dict()
    own = {key: own[key] for key in ("mean", "std", "input_size", "interpolation", "crop_pct", "fixed_input_size")}
    said = {"architecture": NAME, "num_classes": 7, "model_args": {"depth": 2}, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps({**said, "label_names": CLASSES, **changed}))
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(4)
    made = timm.create_model(NAME, num_classes=7, depth=2).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return write_folder(tmp_path / "there", model)


@pytest.fixture
def hub(model, tmp_path, monkeypatch) -> str:
    """A repository in the hub's cache, without a network: as `hf download` leaves it."""
    repository = tmp_path / "hub" / "models--someone--small"
    write_folder(repository / "snapshots" / ("a" * 40), model)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _any_hub_file.cache_clear()
    return "someone/small"
