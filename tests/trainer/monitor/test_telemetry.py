"""What is written down about a run: metrics.jsonl over restarts, the progress line, TensorBoard and W&B."""

import builtins
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from chaos.attempts import isolated
from conftest import TINY, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.monitor.clock import InputWait, Pace
from trainer.monitor.sinks import WANDB_ID, scalars
from trainer.monitor.telemetry import Telemetry
from trainer.run import main as trainer_main

ONE = World(0, 1, 1, torch.device("cpu"))
TRAIN = {"epoch": 0, "loss": 2.5, "lr": 1e-3, "images_per_s": 1234.5, "input_wait": 0.25}
EVAL = {"raw": {"top1": 50.0, "top5": 90.0, "loss": 1.5, "images": 96}}


SYNTHETIC = [
    *TINY,
    *("--data.pipeline", "synthetic", "--data.synthetic_samples", "64", "--data.synthetic_classes", "10"),
    *("--run.stop_after_steps", "1"),
]


class Kept(list):
    """A sink that keeps what it gets."""

    closed = False

    def __call__(self, record: dict) -> None:
        self.append(record)

    def close(self) -> None:
        self.closed = True


def session(folder: Path, start: int, stop: int, *, world: World = ONE, sinks=()) -> None:
    """A session with a train line after each step and an evaluation after every second one."""
    telemetry = Telemetry(folder, world, step=start, total_steps=10, steps_per_epoch=2, sinks=sinks)
    with telemetry.live():
        steps(telemetry, start, stop)


def steps(telemetry: Telemetry, start: int, stop: int) -> None:
    for step in range(start + 1, stop + 1):
        telemetry.advance(step)
        telemetry.train({"step": step, **TRAIN})
        if step % 2 == 0:
            telemetry.evaluation(step, step // 2 - 1, EVAL)


def told(folder: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_json_lines(folder / "metrics.jsonl")]


# --- metrics.jsonl ---


def test_a_restart_drops_what_will_be_written_again_and_no_session(tmp_path):
    session(tmp_path, 0, 4)
    session(tmp_path, 3, 4)
    session(tmp_path, 1, 2)
    assert told(tmp_path) == [("session", 0), ("train", 1), ("session", 3), ("session", 1), ("train", 2), ("eval", 2)]


def test_a_run_that_goes_back_within_a_session_says_so_and_drops_what_will_be_written_again(tmp_path):
    telemetry = Telemetry(tmp_path, ONE, step=0, total_steps=10, steps_per_epoch=2)
    with telemetry.live():
        steps(telemetry, 0, 3)
        telemetry.rewind(1)
        steps(telemetry, 1, 2)
    session(tmp_path, 0, 1)  # the rollback is not forgotten by a later session
    first = [("session", 0), ("rollback", 1), ("session", 0), ("train", 1)]
    assert told(tmp_path) == first
    (rollback,) = (line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "rollback")
    assert rollback["from_step"] == 3


def test_every_line_has_the_time_and_a_session_tells_where_it_runs(tmp_path):
    before = time.time()
    session(tmp_path, 0, 2)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert all(before - 1 <= line["time"] <= time.time() + 1 for line in lines)
    assert lines[0].keys() == {"kind", "step", "total_steps", "steps_per_epoch", "ranks", "host", "device", "time"}
    assert (lines[0]["ranks"], lines[0]["device"], lines[0]["total_steps"]) == (1, "cpu", 10)


def test_a_line_cut_off_by_a_crash_is_gone_after_the_restart(tmp_path):
    session(tmp_path, 0, 1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert told(tmp_path) == [("session", 0), ("train", 1)]
    session(tmp_path, 1, 2)
    assert told(tmp_path) == [("session", 0), ("train", 1), ("session", 1), ("train", 2), ("eval", 2)]


def test_lines_that_are_none_are_kept_beside_the_log_and_counted(tmp_path, capsys):
    session(tmp_path, 0, 1)
    strange = [b'{"kind": "mine"}', b"\xff\xfe", b'{"kind": "train", "st']
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(strange))
    session(tmp_path, 1, 2)
    assert (tmp_path / "metrics.jsonl.unusable").read_bytes().split(b"\n") == [*strange, b""]
    assert "metrics.jsonl: 3 lines cannot be used, and moved to metrics.jsonl.unusable" in capsys.readouterr().out
    session(tmp_path, 2, 3)
    assert "cannot be used" not in capsys.readouterr().out and len(told(tmp_path)) == 7


def test_an_error_that_appears_first_when_the_log_is_closed_is_told(tmp_path):
    telemetry = Telemetry(tmp_path, ONE, step=0, total_steps=10, steps_per_epoch=2)
    with pytest.raises(OSError, match="No space left") as error, telemetry.live(), open("/dev/full", "w") as full:
        telemetry._file.write("what some file systems write no sooner")
        os.dup2(full.fileno(), telemetry._file.fileno())
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    session(tmp_path, 0, 2, world=World(1, 2, 2, torch.device("cpu")), sinks=[sink := Kept()])
    assert not list(tmp_path.iterdir()) and not sink and not capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError("no answer"), UserError("wandb login")])
def test_sinks_get_every_line_and_are_closed_even_if_one_fails(tmp_path, capsys, error):
    """Such a one is left out from then on; a mistake that the user can mend ends the run."""

    class Failing(Kept):
        def __call__(self, record: dict) -> None:
            super().__call__(record)
            if record["step"] == 2:
                raise error

    sinks = [Kept(), Failing()]
    with pytest.raises(UserError) if isinstance(error, UserError) else contextlib.nullcontext():
        session(tmp_path, 0, 3, sinks=sinks)
    assert sinks[0] == read_json_lines(tmp_path / "metrics.jsonl") and all(sink.closed for sink in sinks)
    assert [record["step"] for record in sinks[1]].count(2) == 1 and sinks[1][-1]["step"] == 2
    told = "run.loggers: Failing gets no more numbers (OSError: no answer)"
    assert (told in capsys.readouterr().out) == isinstance(error, OSError)


# --- the progress line ---


def test_time_left_is_that_of_this_sessions_pace_after_a_restart_too():
    now = iter([100.0, 102.0, 110.0, 200.0, 203.0])
    pace = Pace(1000, clock=lambda: next(now))
    assert pace.left() == "-:--"
    pace.advance(501)  # the first update waits for the first images
    assert pace.left() == "-:--"
    pace.advance(502)
    assert pace.left() == "16:36"  # 498 steps of 2 s
    pace.advance(506)
    assert pace.left() == "16:28"  # 494 steps of 2 s
    pace.restart()
    pace.advance(301)
    pace.advance(302)
    assert pace.left() == "34:54"  # 698 steps of 3 s


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3_661, "1:01:01"), (180_000, "2 d 2 h")])
def test_time_left_reads_well_at_every_length(seconds, text):
    now = iter([0.0, seconds])
    pace = Pace(3, clock=lambda: next(now))
    pace.advance(1)
    pace.advance(2)
    assert pace.left() == text


def test_where_there_is_no_terminal_there_are_plain_lines(tmp_path, capsys):
    session(tmp_path, 0, 2)
    first, second, evaluation = capsys.readouterr().out.splitlines()
    assert first == ("epoch 0 step 1/10  loss 2.5000  lr 1.00e-03  1,234 images/s  waiting for input 25%  -:-- left")
    assert second.startswith("epoch 0 step 2/10") and second.endswith(" 0:00 left")
    assert evaluation == "epoch 0 done, 96 images: raw: top-1 50.00 % top-5 90.00 %"


def test_on_a_terminal_one_line_tells_it_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    session(tmp_path, 4, 7)
    shown = capsys.readouterr().out.split("\r")[-1]
    assert "epoch 3  7/10  loss 2.500  1,234 images/s  25% waiting  0:00 left" in shown


def gone_reader(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk(tmp_path):
    return open("/dev/full", "w")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("stream", [gone_reader, full_disk])
def test_a_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path, monkeypatch, stream, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with stream(tmp_path) as screen, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        session(tmp_path, 0, 40)
        screen.flush()  # as Python does at the end of a process
    assert [step for kind, step in told(tmp_path) if kind == "train"] == list(range(1, 41))


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--optim.lr", "-1"], 1)])
def test_a_full_disk_under_output_and_messages_changes_no_exit_code(tmp_path, arguments, code):
    def command():
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)
        try:
            trainer_main([*SYNTHETIC, "--run.out", str(tmp_path / "run"), *arguments])
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)

    assert isolated(command, seconds=60).code == code
    assert (tmp_path / "run" / "summary.json").is_file() == (code == 0)


# --- TensorBoard and W&B ---


def test_scalars_are_the_numbers_of_train_and_eval_lines():
    times = {"step": 3, "time": 1.0}
    assert dict(scalars({"kind": "train", **times, "epoch": 0, "loss": 2.5, "agreement": None})) == {
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


def test_wandb_goes_on_with_one_run_over_all_sessions(tmp_path, monkeypatch):
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
def test_a_logger_that_is_not_installed_is_told_before_anything_is_written(tmp_path, monkeypatch, name):
    def no_package(module, *arguments, **more):
        if module.split(".")[0] == name or module == f"torch.utils.{name}":
            raise ImportError(f"No module named '{name}'")
        return imported(module, *arguments, **more)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_package)
    with pytest.raises(UserError, match=f"run.loggers: {name} cannot be imported .* pip install {name}; or leave it"):
        train_here(tmp_path / "none", tmp_path / "run", "--run.loggers", f"[{name}]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ("[tensorbord]", r"run.loggers is \['tensorbord'\], not tensorboard or wandb"),
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


def test_waiting_for_input_is_the_time_in_next_and_nothing_else(monkeypatch):
    """Where host and device are one. Each look at the clock is told what to see."""
    times = iter([10.0, 10.25, 20.0, 20.5, 30.0, 30.0])
    monkeypatch.setattr(
        "trainer.monitor.telemetry._HostMark.record", lambda mark: setattr(mark, "_time_s", next(times))
    )
    batches = InputWait(iter("abc"), torch.device("cpu"))
    assert [next(batches), next(batches)] == ["a", "b"]
    assert batches.take_s() == pytest.approx(0.75) and batches.take_s() == 0
    assert next(batches) == "c" and batches.take_s() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [False, True])
def test_a_busy_gpu_does_not_wait_for_input_while_the_host_does(busy):
    """The host waits for 50 ms each time; the device waits with it only if it has nothing to do."""

    def slow_items():
        for item in range(5):
            time.sleep(0.05)
            yield item

    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    batches = InputWait(slow_items(), device)
    if busy:
        torch.cuda._sleep(4_000_000_000)  # cycles: more than a second
    for _ in batches:
        pass
    torch.cuda.synchronize()
    waited_s = batches.take_s()
    assert waited_s < 0.05 if busy else waited_s > 0.2
