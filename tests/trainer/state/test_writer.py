"""Checkpoints are written in the background, in full or not at all."""

import resource
import threading

import numpy as np
import pytest
import torch

from chaos.runs import equal
from conftest import train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.tiny_runs import ONE, arguments_for, assert_same_end, at_step, newest
from trainer.builder import build
from trainer.config.sections import parse
from trainer.state import checkpoint
from trainer.state.checkpoint import read
from trainer.state.writer import Writer


def test_the_training_continues_while_a_checkpoint_is_written(digits, undisturbed, tmp_path, monkeypatch):
    """The file holds the weights of its step, though it is written two steps later."""
    later, saved = threading.Event(), Writer._write
    monkeypatch.setattr(Writer, "_write", lambda *arguments: (later.wait(60), saved(*arguments)))
    at_step(monkeypatch, 5, later.set)
    train_here(digits, tmp_path, "--run.checkpoint_every", 3, "--run.keep_checkpoints", 9, "--run.eval_every", 9)
    assert later.is_set()
    train_here(digits, tmp_path / "short", "--run.stop_after_steps", 3)
    third = checkpoint.path_of(tmp_path / "checkpoints", 3)
    assert equal(read(third)["student"], newest(tmp_path / "short")["student"])


def test_the_last_ones_every_nth_and_the_best_weights_are_kept(digits, tmp_path):
    summary = train_here(digits, tmp_path, "--run.checkpoint_every", 2, "--run.keep_every", 3, "--optim.lr", "1e-2")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    kept = [6, 12, 18, 20]
    assert names == ["best.pt", *(f"step-{step:08d}.pt" for step in kept)]
    evaluations = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "eval"]
    top1 = {(line["step"], name): line[name]["top1"] for line in evaluations for name in ("raw", "ema")}
    best = read(tmp_path / "checkpoints" / "best.pt")
    assert best["top1"] == max(top1.values()) == top1[best["step"], best["weights"]] == best["metrics"]["top1"]
    assert summary["best"] == {name: best[name] for name in ("step", "weights", "top1")}
    run = build(parse(arguments_for(digits, tmp_path)), ONE)
    run.state.student.load_state_dict(best["state_dict"])
    assert run.evaluate()["raw"]["top1"] == best["top1"]


def test_a_full_disk_is_an_error_and_the_run_stays_as_it_was(digits, undisturbed, tmp_path):
    train_here(digits, tmp_path, "--run.stop_after_steps", 3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the system refuses to write more into a file
    try:
        with pytest.raises(UserError, match=r"step-0000000\d.pt: cannot be written .*; older checkpoints are kept"):
            train_here(digits, tmp_path, "--run.checkpoint_every", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    train_here(digits, tmp_path)
    assert_same_end(undisturbed, tmp_path)


def test_every_truncation_and_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path):
    content = {
        "format_version": 1,
        "weight": torch.arange(50.0),
        "step": 3,
        "config": {},
        "nested": [{"a": 1.5}, (1, 2)],
    }
    writer = Writer()
    writer.submit(tmp_path / "x.pt", content)
    writer.wait()
    assert not writer.failure and equal(read(tmp_path / "x.pt"), content)
    whole = (tmp_path / "x.pt").read_bytes()
    generator = np.random.default_rng(0)
    for length in generator.integers(0, len(whole), 50):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(checkpoint.DamagedError, match="x.pt: damaged"):
            read(tmp_path / "x.pt")
    harmless = 0
    for place in generator.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[place] ^= int(generator.integers(1, 256))
        (tmp_path / "x.pt").write_bytes(changed)
        try:
            found = read(tmp_path / "x.pt")
        except UserError:
            continue
        assert equal(found, content)  # padding of the container
        harmless += 1
    assert harmless < 200


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    writer = Writer()
    writer.submit(tmp_path / "x.pt", {"student": {"fc.weight": torch.tensor([1.0, float("nan")])}})
    writer.wait()
    assert "x.pt: not written: 'fc.weight' in 'student' is not finite" in writer.failure and not list(
        tmp_path.iterdir()
    )
