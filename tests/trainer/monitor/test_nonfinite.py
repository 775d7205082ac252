"""A loss or gradient that is not finite is named with its step and samples, and the run can go back."""

import pytest
import torch

from conftest import train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.index import read_index
from support.tiny_runs import arguments_for, assert_same_end, newest
from trainer.builder import train_plan
from trainer.config.sections import parse
from trainer.update.step import TrainStep


def spoil(monkeypatch, number: int, times: int) -> None:
    """Update `number` ends with weights that are not a number, the first `times` times."""
    call, left = TrainStep.__call__, [times]

    def spoiling(self, batches, n):
        metrics = call(self, batches, n)
        if n != number or not left[0]:
            return metrics
        left[0] -= 1
        with torch.no_grad():
            next(self._student.parameters()).fill_(float("nan"))
        return metrics._replace(bad=torch.tensor([False, True] + [False] * 62))

    monkeypatch.setattr(TrainStep, "__call__", spoiling)


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_sample(digits, tmp_path, monkeypatch):
    spoil(monkeypatch, 7, times=1)
    index = read_index(digits, "train")
    with pytest.raises(UserError, match=r"step 8: .* are not finite for 1 of 64 images: train.*: sample ") as error:
        train_here(digits, tmp_path, "--run.checkpoint_every", 3)
    plan = train_plan(parse(arguments_for(digits, tmp_path)), index, (128, 128, 128))
    assert index.name(int(plan.rows(7 * 64, 8 * 64).sample[1])) in str(error.value)
    assert newest(tmp_path)["step"] == 6


def test_a_run_goes_back_once_and_ends_as_if_nothing_had_been(digits, undisturbed, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 7, times=1)
    train_here(digits, tmp_path, "--run.checkpoint_every", 3, "--run.on_nonfinite", "rollback")
    assert "going back to step 6" in capsys.readouterr().out
    assert_same_end(undisturbed, tmp_path)
    steps = [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert len(steps) == len(set(steps))


def test_going_back_keeps_the_micro_batch_of_the_session(digits, tmp_path, monkeypatch):
    """Not that of the checkpoint; without batch normalisation both give the same weights."""
    settings = ["--student.name", "test_vit", "--student.kwargs.depth", 1, "--optim.lr", "1e-3"]
    settings += ["--run.checkpoint_every", 3, "--schedule.epochs", 2]
    train_here(digits, tmp_path / "whole", *settings)
    train_here(digits, tmp_path / "run", *settings, "--run.stop_after_steps", 6)
    spoil(monkeypatch, 7, times=1)
    train_here(digits, tmp_path / "run", *settings, "--run.micro_batch", 64, "--run.on_nonfinite", "rollback")
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "run")
    assert b["micro_batch"] == 64
    assert all(torch.allclose(a["student"][name], b["student"][name], atol=1e-4) for name in a["student"])


def test_a_gradient_that_is_not_finite_is_named_and_gone_back_from(digits, undisturbed, tmp_path, monkeypatch, capsys):
    """The loss of that step is finite; a checkpoint and an evaluation follow it at once."""
    is_gradient_finite, calls = TrainStep._is_gradient_finite, []

    def spoiled(self):
        calls.append(None)
        if len(calls) == 10:
            next(self._student.parameters()).grad.fill_(float("inf"))
        return is_gradient_finite(self)

    monkeypatch.setattr(TrainStep, "_is_gradient_finite", spoiled)
    train_here(digits, tmp_path, "--run.checkpoint_every", 5, "--run.on_nonfinite", "rollback")
    assert "step 10: the gradient or the loss is not finite" in capsys.readouterr().out
    assert_same_end(undisturbed, tmp_path)


def test_a_loss_that_is_not_finite_again_ends_the_run(digits, tmp_path, monkeypatch):
    spoil(monkeypatch, 7, times=2)
    with pytest.raises(UserError, match="step 8: "):
        train_here(digits, tmp_path, "--run.checkpoint_every", 3, "--run.on_nonfinite", "rollback")
    with monkeypatch.context() as patch:
        spoil(patch, 1, times=1)
        with pytest.raises(UserError, match="there is no checkpoint to go back to"):
            train_here(digits, tmp_path / "other", "--run.on_nonfinite", "rollback")
