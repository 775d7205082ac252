"""A full disk: whatever file a run cannot write, it says so in a line, and the same command brings it to its end."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from conftest import train_here
from pipelines.common.errors import exit_on_user_error
from pipelines.common.files import read_json_lines
from trainer.state.checkpoint import read

SHORT = ["--schedule.epochs", 1, "--schedule.warmup_epochs", 0, "--run.checkpoint_every", 2, "--run.log_every", 1]


def final(out: Path) -> dict[str, torch.Tensor]:
    return read(out / "checkpoints" / "step-00000005.pt")["student"]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(out / "metrics.jsonl") if line["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_here(digits, out, *SHORT)
    return out


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "samples.png", "step-00000002.pt", "best.pt", "step-00000005.pt", "summary.json"],
)
def test_a_run_whose_disk_is_full_names_the_file_and_ends_after_the_same_command(
    undisturbed, digits, tmp_path, monkeypatch, capsys, name
):
    """The system has no room when the file is to take its place."""
    rename = os.rename

    def full(source, target, *more, **others):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        return rename(source, target, *more, **others)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        with pytest.raises(SystemExit), exit_on_user_error():
            train_here(digits, out, *SHORT)
    assert re.match(rf"error: .*{name}.*No space left.* Make room.*\n$", capsys.readouterr().err)
    assert not list(out.rglob("*.partial"))
    summary = train_here(digits, out, *SHORT)
    assert summary["finished"] and (out / "summary.json").is_file() and (out / "report" / "index.html").is_file()
    expected, found = final(undisturbed), final(out)
    assert all(torch.equal(expected[key], found[key]) for key in expected) and losses(out) == losses(undisturbed)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_device_without_room_is_named_by_its_file(digits, tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        train_here(digits, tmp_path, *SHORT)
    assert error.value.filename == str(tmp_path / name)


def test_a_page_that_found_no_room_is_made_at_the_next_start(undisturbed, digits, capsys):
    page = undisturbed / "report" / "index.html"
    page.unlink()
    page.symlink_to("/dev/full")
    (undisturbed / "summary.json").unlink()
    assert train_here(digits, undisturbed, *SHORT)["finished"]
    assert "no report was drawn" in capsys.readouterr().out
    page.unlink()
    train_here(digits, undisturbed, *SHORT)
    assert "nothing to do" in capsys.readouterr().out and "<html" in page.read_text()
