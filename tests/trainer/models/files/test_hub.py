"""Weights on Hugging Face's hub where it cannot be reached: one line at once, and what is on this machine serves."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from pipelines.common.errors import UserError
from trainer.models.factory import create_model
from trainer.models.files.hub import offline_if_unreachable
from trainer.models.files.model_folders import named_folder


@pytest.fixture
def unreachable(monkeypatch, tmp_path) -> Iterator[str]:
    """The address of a hub that refuses every connection; to wait before another try is a failure."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Nothing listens.
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits before it tries again"))
        yield address


def test_timms_weights_are_not_asked_for_again_and_again(unreachable):
    message = (
        rf"model 'test_resnet': its weights cannot be downloaded \(ConnectionError: {unreachable} cannot be reached"
    )
    with pytest.raises(UserError, match=message):
        create_model("test_resnet", 1000, 160, {}, pretrained=True)
    assert not constants.HF_HUB_OFFLINE


def test_a_repository_is_not_asked_for_again_and_again(unreachable):
    message = (
        f"hf-hub:someone/model: config.json cannot be had from Hugging Face's hub .{unreachable} cannot be reached"
    )
    with pytest.raises(UserError, match=message):
        named_folder("hf-hub:someone/model")


def test_a_file_that_is_on_this_machine_is_taken_from_it(unreachable, tmp_path):
    folder = tmp_path / "models--someone--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1" * 40)
    (folder / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("1" * 40) / "config.json").write_text("{}")
    with offline_if_unreachable():
        assert Path(hf_hub_download("someone/model", "config.json")).read_text() == "{}"
