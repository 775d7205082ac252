"""A run on one rank whose input fails saves the updates before, names the checkpoint, and resumes bit by bit."""

import errno
from pathlib import Path

import pytest

from conftest import train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.tiny_runs import assert_same_end, newest
from trainer.builder import Evaluator
from trainer.feed import Feed
from trainer.monitor.quarantine import Quarantine
from trainer.monitor.telemetry import Telemetry
from trainer.state import checkpoint

NO_EVALUATION = ["--run.eval_every", 9]


def fail_at(patch: pytest.MonkeyPatch, update: int) -> None:
    """The second of the two micro-batches of an update has no input."""
    real = Feed.__next__

    def failing(self):
        batch = real(self)
        if batch.position == update * 64 + 32:
            raise UserError("train-00000.tar: cannot be read. Restore it", help_with="checking")
        return batch

    patch.setattr(Feed, "__next__", failing)


def full(*_) -> None:
    """A disk without room."""
    raise OSError(errno.ENOSPC, "No space left on device", "DISK")


def where_it_resumes(updates: str, file: str) -> str:
    return f"Then run the same command again: it resumes after {updates}, from {file}"


def files_of(out: Path) -> list[str]:
    return [path.name for path in (out / "checkpoints").iterdir()]


def test_the_updates_before_one_without_input_are_saved(digits, tmp_path, monkeypatch):
    settings = ["--run.log_every", 2, *NO_EVALUATION, "--run.stop_after_steps", 8]
    again = where_it_resumes("5 updates", "step-00000005.pt")
    with monkeypatch.context() as patch:
        fail_at(patch, 5)  # It is the first update of the second epoch.
        for _ in range(2):  # The second start has nothing new to save.
            with pytest.raises(UserError, match=f"cannot be read. Restore it. {again}$") as error:
                train_here(digits, tmp_path / "run", *settings)
            assert error.value.help_with == "checking" and newest(tmp_path / "run")["step"] == 5
    for out in ("run", "whole"):
        train_here(digits, tmp_path / out, *settings)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    rates = {line["step"]: line["lr"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "lr" in line}
    assert list(rates) == [2, 4, 5, 6, 8] and rates[5] == rates[4] != rates[6]


def test_a_first_update_without_input_leaves_nothing_to_save(digits, tmp_path, monkeypatch):
    fail_at(monkeypatch, 0)
    with pytest.raises(UserError, match="cannot be read. Restore it$"):
        train_here(digits, tmp_path)
    assert files_of(tmp_path) == []


def fail_in_evaluations(patch: pytest.MonkeyPatch) -> None:
    def failing(*_, **__):
        raise UserError("val-00000.tar: cannot be read")

    patch.setattr(Evaluator, "__call__", failing)


def find_too_many_damaged(patch: pytest.MonkeyPatch) -> None:
    """From the second log line on, which is after three updates; the first one is before the first update."""
    calls, real = [], Quarantine.record_new

    def failing(self):
        calls.append(self)
        if len(calls) > 1:
            raise UserError("too many images are damaged")
        return real(self)

    patch.setattr(Quarantine, "record_new", failing)


@pytest.mark.parametrize(
    ("fail", "message", "updates"),
    [
        (fail_in_evaluations, "val-00000.tar: cannot be read", 5),
        (find_too_many_damaged, "too many images are damaged", 3),
    ],
)
def test_an_error_between_two_updates_is_preceded_by_a_checkpoint(
    digits, tmp_path, monkeypatch, fail, message, updates
):
    settings = ["--run.log_every", 3, "--run.stop_after_steps", 7]
    again = where_it_resumes(f"{updates} updates", f"step-{updates:08d}.pt")
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(UserError, match=f"^{message}. {again}$"):
            train_here(digits, tmp_path / "run", *settings)
    for out in ("run", "whole"):
        train_here(digits, tmp_path / out, *settings)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [5]


@pytest.mark.parametrize("place", ["checkpoint", "log"])
def test_a_save_that_fails_does_not_hide_the_error_of_the_input(digits, tmp_path, monkeypatch, place):
    write, sync = checkpoint.write, Telemetry.sync
    if place == "checkpoint":
        monkeypatch.setattr(checkpoint, "write", lambda p, c: full() if c["step"] == 2 else write(p, c))
    else:
        monkeypatch.setattr(Telemetry, "sync", lambda self: full() if self._step == 2 else sync(self))
    train_here(digits, tmp_path, "--run.stop_after_steps", 1)
    fail_at(monkeypatch, 2)
    with pytest.raises(UserError) as error:
        train_here(digits, tmp_path, *NO_EVALUATION)
    message = str(error.value)
    assert message.startswith(
        "train-00000.tar: cannot be read. Restore it. The updates since the newest checkpoint are"
    )
    assert "No space left on device" in message and "Make room there" in message
    assert message.endswith(where_it_resumes("1 update", "step-00000001.pt"))
    assert files_of(tmp_path) == ["step-00000001.pt"]


def test_weights_that_are_not_finite_are_not_saved_and_do_not_hide_the_error_of_the_input(
    digits, tmp_path, monkeypatch
):
    fail_at(monkeypatch, 3)
    wild = ["--optim.lr", 1e9, "--schedule.warmup_lr", 1e9, "--run.log_every", 100]
    with pytest.raises(UserError, match=r"cannot be read.* are not saved: step \d: .*not finite.* Lower optim"):
        train_here(digits, tmp_path, *wild, *NO_EVALUATION)
    assert files_of(tmp_path) == []
