"""TensorBoard and Weights & Biases get what metrics.jsonl gets."""

import json
import sys

import pytest

from conftest import TINY, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.sessions import ONE, session, steps
from trainer.config.sections import parse
from trainer.monitor.sinks import WANDB_ID, scalars
from trainer.monitor.telemetry import Telemetry


def test_scalars_are_the_numbers_of_train_and_eval_lines():
    times = {"step": 3, "time": 1.0}
    assert dict(scalars({"kind": "train", **times, "epoch": 0, "loss": 2.5})) == {
        "train/epoch": 0,
        "train/loss": 2.5,
    }
    assert dict(scalars({"kind": "eval", **times, "raw": {"top1": 50.0}})) == {"eval/raw/top1": 50.0}
    assert not dict(scalars({"kind": "session", **times, "ranks": 8}))


def test_tensorboard_shows_the_curves_of_metrics_jsonl_after_a_restart_too(digits, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--run.loggers", "[tensorboard]", "--run.log_every", 1, "--run.checkpoint_every", 3]
    train_here(digits, tmp_path, *arguments, "--run.stop_after_steps", 5)
    (tmp_path / "checkpoints" / "step-00000005.pt").unlink()
    train_here(digits, tmp_path, *arguments, "--run.stop_after_steps", 6)  # from step 3
    shown = events.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    expected = {}
    for line in lines:
        for name, value in scalars(line):
            expected.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert "eval/ema/top1" in expected and len(expected["train/loss"]) == 6
    assert {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]} == expected
    assert [line["step"] for line in lines if line["kind"] == "session"] == [0, 3]


def test_tensorboard_drops_what_a_run_that_went_back_had_written(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from trainer.monitor.sinks import open_sinks

    sinks = open_sinks(parse([*TINY, "--run.out", str(tmp_path), "--run.loggers", "[tensorboard]"]))
    assert not list(tmp_path.iterdir())
    telemetry = Telemetry(tmp_path, ONE, step=0, total_steps=10, steps_per_epoch=2, sinks=sinks)
    with telemetry.live():
        steps(telemetry, 0, 3)
        telemetry.rewind(1)
        steps(telemetry, 1, 2)
    shown = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2]


def test_wandb_continues_one_run_over_all_sessions(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from trainer.monitor.sinks import open_sinks

    opened, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(init(**options)) or opened[-1])
    config = parse([*TINY, "--run.out", str(tmp_path / "mine"), "--run.loggers", "[wandb]"])
    (tmp_path / "mine").mkdir()
    for start, stop in ((0, 4), (2, 4)):
        session(tmp_path / "mine", start, stop, sinks=open_sinks(config))
    wandb.teardown()  # its process has written everything then
    identity = (tmp_path / "mine" / WANDB_ID).read_text()
    assert [run.id for run in opened] == [identity] * 2 and opened[0].name == "mine"
    files = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    for file in files:
        assert all(name in file.read_bytes() for name in (b"train/loss", b"train/input_wait", b"eval/raw/top1"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_reported_before_anything_is_written(digits, tmp_path, monkeypatch, name):
    for module in (name, f"torch.utils.{name}"):
        monkeypatch.setitem(sys.modules, module, None)  # Python then raises an ImportError.
    with pytest.raises(UserError, match=f"run.loggers: {name} cannot be imported .* pip install {name}; or leave it"):
        train_here(digits, tmp_path / "run", "--run.loggers", f"[{name}]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ("[tensorbord]", r"run.loggers: Expected one of .*wandb.*tensorbord"),
        ("[wandb,wandb]", "name each once"),
    ],
)
def test_loggers_that_do_not_exist_are_refused(loggers, message):
    with pytest.raises(UserError, match=message):
        parse([*TINY, "--run.loggers", loggers])


def test_loggers_are_read_back_from_a_runs_own_configuration(digits, tmp_path):
    train_here(digits, tmp_path, "--run.loggers", "[tensorboard]", "--run.stop_after_steps", 1)
    assert parse(["--config", str(tmp_path / "config.yaml")]).run.loggers == ["tensorboard"]
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 1
