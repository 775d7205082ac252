"""Stopped at any moment, in any way, on any number of ranks: the run that goes on is the run that was not stopped."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chaos import runs
from chaos.runs import equal
from conftest import REPOSITORY, TINY, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.index import read_index
from support.forked_python import executable
from tools import doctor
from trainer.builder import build
from trainer.cluster.memory import is_out_of_memory
from trainer.cluster.preemption import REQUEUE
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.micro_batch import largest_micro_batch
from trainer.run import main
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints, read
from trainer.state.writer import Writer
from trainer.update.step import TrainStep, gray_batch

CONFIG = REPOSITORY / "configs" / "usi.yaml"
ONE = World(0, 1, 1, torch.device("cpu"))
STATE = ("step", "evaluated", "best", "student", "ema", "optimizer", "scaler")


def arguments_for(digits: Path, out: Path, *arguments) -> list[str]:
    return [*TINY, "--data.root", str(digits), "--run.out", str(out), *map(str, arguments)]


def newest(out: Path) -> dict:
    return read(checkpoints(out / "checkpoints")[-1])


def assert_same_end(a: Path, b: Path) -> None:
    a, b = newest(a), newest(b)
    assert [part for part in STATE if not equal(a[part], b[part])] == []


def at_step(monkeypatch, number: int, action) -> None:
    """Call `action` while update `number` is made."""
    call = TrainStep.__call__

    def acting(self, batches, n):
        if n == number:
            action()
        return call(self, batches, n)

    monkeypatch.setattr(TrainStep, "__call__", acting)


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_here(digits, out)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_in_two_parts_ends_as_one_in_a_single_part(digits, tmp_path, device, precision):
    for out, stops in ((tmp_path / "whole", [7]), (tmp_path / "parts", [3, 7])):
        for stop in stops:
            arguments = ["--run.precision", precision, "--run.stop_after_steps", stop, "--run.log_every", 1]
            arguments += ["--data.pipeline", "torchvision", "--run.compile", "false", "--optim.clip_norm", 1]
            train_here(digits, out, *arguments, "--run.device", device)
    whole, parts = (list(read_json_lines(tmp_path / out / "metrics.jsonl")) for out in ("whole", "parts"))
    ours, theirs = ([line["loss"] for line in lines if line["kind"] == "train"] for lines in (parts, whole))
    assert len(theirs) == 7 and ours == pytest.approx(theirs, rel=0 if device == "cpu" else 0.01)  # GPUs round anew
    saved = newest(tmp_path / "parts")
    assert device == "cuda" or all(equal(saved[name], newest(tmp_path / "whole")[name]) for name in STATE)
    assert saved["optimizer"]["state"][0]["step"] == 7 and bool(saved["scaler"]) == (precision == "fp16")


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_run_after_the_step_with_a_checkpoint(
    digits, undisturbed, tmp_path, monkeypatch, capsys, number
):
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as end:
            main(arguments_for(digits, tmp_path))
    assert end.value.code == (130 if number == signal.SIGINT else REQUEUE)
    told = f"{number.name}: stopped after step 7 of 20. Run the same command again to resume there"
    assert told in capsys.readouterr().out
    assert newest(tmp_path)["step"] == 7
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["session"]["stopped_by"] == number.name and not summary["finished"]
    main(arguments_for(digits, tmp_path))  # ends without raising SystemExit
    assert_same_end(undisturbed, tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGINT, 130)])
def test_a_signal_while_the_program_is_loaded_ends_it_quietly(tmp_path, number, code):
    command = [sys.executable, str(REPOSITORY / "trainer" / "run.py"), *TINY, "--run.out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    handled = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", handled.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == code


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(digits, undisturbed, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        at_step(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGHUP))
        main(arguments_for(digits, tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_end(undisturbed, tmp_path)


def test_copies_that_a_person_makes_beside_the_checkpoints_are_never_taken_or_deleted(digits, undisturbed, tmp_path):
    main(arguments_for(digits, tmp_path, "--run.stop_after_steps", "4", "--run.checkpoint_every", "2"))
    folder = tmp_path / "checkpoints"
    content = (folder / "step-00000004.pt").read_bytes()
    names = ["step-00000002-backup.pt", "step-00000009 (copy).pt", "step-best.pt", "step-7.pt", "mine.partial"]
    for name in names:
        (folder / name).write_bytes(content)
    main(arguments_for(digits, tmp_path, "--run.checkpoint_every", "2", "--run.keep_checkpoints", "1"))
    assert all((folder / name).read_bytes() == content for name in names)
    assert_same_end(undisturbed, tmp_path)


def test_a_second_ctrl_c_ends_a_run_at_once(digits, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 6, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == 130 and "interrupted. Run the same command again" in capsys.readouterr().err
    assert not checkpoints(tmp_path / "checkpoints")


def test_a_signal_before_the_first_step_leaves_nothing_to_do_but_to_start_again(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.builder.build_models", lambda *_: signal.raise_signal(signal.SIGTERM) or sys.exit("built")
    )
    with pytest.raises(SystemExit, match="built"):  # it is only noted here
        main(arguments_for(digits, tmp_path))
    monkeypatch.setattr("trainer.run.join_world", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == REQUEUE and not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [5, 20])
def test_an_evaluation_that_a_signal_stopped_is_made_up_for(digits, undisturbed, tmp_path, monkeypatch, step):
    """Also the last one: the run is not finished without it."""
    with monkeypatch.context() as patch:
        at_step(patch, step - 1, lambda: patch.setattr("trainer.evaluation.predict._columns", signalling))
        with pytest.raises(SystemExit) as end:
            main(arguments_for(digits, tmp_path, "--run.eval_batch", 8))
    assert end.value.code == REQUEUE
    assert newest(tmp_path)["step"] == step and newest(tmp_path)["evaluated"] == step - 5
    assert not json.loads((tmp_path / "summary.json").read_text())["finished"]
    assert train_here(digits, tmp_path)["finished"]
    assert_same_end(undisturbed, tmp_path)
    evaluations = [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "eval"]
    assert evaluations == [5, 10, 15, 20]


def signalling(*_):
    signal.raise_signal(signal.SIGTERM)
    return torch.zeros(4, dtype=torch.float64)


# --- other numbers of ranks ---


@pytest.fixture(scope="module")
def elastic(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    command = [executable(), str(REPOSITORY / "tests" / "support" / "elastic_runs.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_samples_and_pixels_of_each_step_are_the_same_when_the_ranks_change(elastic):
    """2 ranks all along, and 4, then 1 from the tenth step on."""
    steady, changing = (
        sorted(map(json.loads, (elastic / f"{name}.positions.jsonl").read_text().splitlines()))
        for name in ("steady", "changing")
    )
    assert [position for position, *_ in steady] == list(range(0, 20 * 64, 16))
    assert steady[len(steady) // 2 :] == changing
    a, b = newest(elastic / "steady")["student"], newest(elastic / "changing")["student"]
    assert all(torch.allclose(a[name].double(), b[name].double(), rtol=1e-3, atol=1e-3) for name in a)


def test_torchrun_restarts_a_run_that_lost_a_rank(elastic, tmp_path):
    """It then is the run of two ranks that lost none."""
    arguments = [*runs.SETTINGS, "--data.root", str(elastic / "dataset")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", str(REPOSITORY / "trainer" / "run.py"), *arguments, "--run.out", str(tmp_path)]
    forked = {**os.environ, "PYTHON_EXEC": executable()}  # by which torchrun starts the ranks
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=forked)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and any(line["step"] >= 7 for line in read_json_lines(metrics))):
        assert process.poll() is None
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "run.py"], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(r"resuming after step (6|9|12)\b", output)
    assert_same_end(elastic / "steady", tmp_path)


def test_the_gradients_are_the_same_on_1_2_and_4_ranks(elastic):
    """AdamW's first moment after one update is a tenth of the gradient."""
    firsts = [checkpoint.path_of(elastic / name / "checkpoints", 1) for name in ("alone", "steady", "four")]
    one, *others = (read(path)["optimizer"]["state"] for path in firsts)
    for other in others:
        for index, state in one.items():
            gradient, found = 10 * state["exp_avg"], 10 * other[index]["exp_avg"]
            assert torch.allclose(gradient, found, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-7)


def test_four_ranks_resume_bit_equal(elastic):
    """With more than two, the order in which gradients are summed depends on DDP's buckets."""
    assert_same_end(elastic / "four", elastic / "four-resumed")


def test_ranks_with_statistics_of_their_own_resume_bit_equal(elastic):
    runs = [elastic / name for name in ("own-statistics", "own-statistics-resumed")]
    assert_same_end(*runs)
    a, b = (newest(run)["rank_statistics"] for run in runs)
    assert len(a) == 2 and equal(a, b) and not equal(a[0], a[1])


# --- checkpoints ---


def test_the_training_goes_on_while_a_checkpoint_is_written(digits, undisturbed, tmp_path, monkeypatch):
    """The file holds the weights of its step, though it is written two steps later."""
    later, saved = threading.Event(), Writer._write
    monkeypatch.setattr(Writer, "_write", lambda *arguments: (later.wait(60), saved(*arguments)))
    at_step(monkeypatch, 5, later.set)
    train_here(digits, tmp_path, "--run.checkpoint_every", 3, "--run.keep_checkpoints", 9, "--run.eval_every", 9)
    assert later.is_set()
    train_here(digits, tmp_path / "short", "--run.stop_after_steps", 3)
    third = checkpoint.path_of(tmp_path / "checkpoints", 3)
    assert equal(read(third)["student"], newest(tmp_path / "short")["student"])


def test_moments_stay_with_their_weights_in_another_memory_format(digits, tmp_path):
    """The same update from the same checkpoint: the fused one reads weights and moments in the order of the memory."""
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    updated = []
    for channels_last in ("true", "false"):
        run = build(parse(arguments_for(digits, tmp_path, "--run.channels_last", channels_last)), ONE)
        for parameter in run.state.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.state.optimizer.step()
        updated.append(torch.cat([parameter.detach().flatten() for parameter in run.state.student.parameters()]))
    assert torch.allclose(*updated, rtol=0, atol=1e-7)


def test_the_last_ones_each_mth_and_the_best_weights_are_kept(digits, tmp_path):
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
    assert run.evaluate()["raw"]["top1"] == best["top1"]  # of these very weights


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


def test_no_space_for_the_log_is_told_in_one_line(digits, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("trainer.monitor.telemetry.Telemetry._write", full)
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == 1
    assert "error: metrics.jsonl: cannot be written (No space left on device). Make room" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_summary_writes_it_and_ends_well(digits, undisturbed, tmp_path, monkeypatch):
    """There is one of an earlier session, which a signal had stopped."""
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            main(arguments_for(digits, tmp_path))
    stopped = (tmp_path / "summary.json").read_bytes()
    train_here(digits, tmp_path)
    (tmp_path / "summary.json").write_bytes(stopped)
    main(arguments_for(digits, tmp_path))  # does not ask to be started again
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and "stopped_by" not in summary["session"]
    assert summary["evaluation"] == json.loads((undisturbed / "summary.json").read_text())["evaluation"]


def test_a_checkpoint_that_another_run_has_written_meanwhile_is_left_alone(digits, undisturbed, tmp_path, monkeypatch):
    train_here(digits, tmp_path, "--run.stop_after_steps", 3)
    later = checkpoints(undisturbed / "checkpoints")[-1]

    def build_and_be_late(*arguments):
        run = build(*arguments)
        shutil.copy(later, tmp_path / "checkpoints")
        return run

    monkeypatch.setattr("trainer.builder.build", build_and_be_late)
    with pytest.raises(UserError, match="step-00000020.pt: another run has written it meanwhile. Start again"):
        train_here(digits, tmp_path)
    assert (tmp_path / "checkpoints" / later.name).read_bytes() == later.read_bytes()


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


def test_a_damaged_first_checkpoint_begins_a_run_anew_and_later_ones_are_refused(digits, undisturbed, tmp_path, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    for path in checkpoints(run / "checkpoints"):
        path.write_bytes(b"")
    train_here(digits, run)
    assert "it was the first: the run starts from scratch" in capsys.readouterr().out
    assert_same_end(undisturbed, run)
    assert [path.name for path in (run / "checkpoints").glob("*.damaged")] == ["step-00000020.damaged"]
    with pytest.raises(UserError, match="step-00000020.pt: damaged .* no other checkpoint is intact. Restore one, or"):
        for path in checkpoints(run / "checkpoints"):
            path.write_bytes(b"")
        train_here(digits, run, "--run.checkpoint_every", 10)


# --- losses that are not finite ---


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
        return dataclasses.replace(metrics, bad=torch.tensor([False, True] + [False] * 62))

    monkeypatch.setattr(TrainStep, "__call__", spoiling)


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_sample(digits, tmp_path, monkeypatch):
    spoil(monkeypatch, 7, times=1)
    index = read_index(digits, "train")
    with pytest.raises(UserError, match=r"step 8: .* is not finite for 1 of 64 images: train.*: sample ") as error:
        train_here(digits, tmp_path, "--run.checkpoint_every", 3)
    from trainer.feed import train_plan

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
    settings = ["--student.name", "test_vit", "--optim.lr", "1e-3", "--run.checkpoint_every", 3]
    train_here(digits, tmp_path / "whole", *settings)
    train_here(digits, tmp_path / "run", *settings, "--run.stop_after_steps", 6)
    spoil(monkeypatch, 7, times=1)
    train_here(digits, tmp_path / "run", *settings, "--run.micro_batch", 64, "--run.on_nonfinite", "rollback")
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "run")
    assert b["micro_batch"] == 64
    assert all(torch.allclose(a["student"][name], b["student"][name], atol=1e-4) for name in a["student"])


def test_a_gradient_that_is_not_finite_is_named_and_gone_back_from(digits, undisturbed, tmp_path, monkeypatch, capsys):
    """The loss of that step is finite; a checkpoint and an evaluation follow it at once."""
    bad_gradients, calls = TrainStep._bad_gradients, []

    def spoiled(self):
        calls.append(None)
        if len(calls) == 10:
            next(self._student.parameters()).grad.fill_(float("inf"))
        return bad_gradients(self)

    monkeypatch.setattr(TrainStep, "_bad_gradients", spoiled)
    train_here(digits, tmp_path, "--run.checkpoint_every", 5, "--run.on_nonfinite", "rollback")
    assert "step 10: the gradient is not finite, though the loss is" in capsys.readouterr().out
    assert_same_end(undisturbed, tmp_path)


def test_a_loss_that_is_not_finite_again_ends_the_run(digits, tmp_path, monkeypatch):
    spoil(monkeypatch, 7, times=2)
    with pytest.raises(UserError, match="step 8: "):
        train_here(digits, tmp_path, "--run.checkpoint_every", 3, "--run.on_nonfinite", "rollback")
    with monkeypatch.context() as patch:
        spoil(patch, 1, times=1)
        with pytest.raises(UserError, match="there is no checkpoint to go back to"):
            train_here(digits, tmp_path / "other", "--run.on_nonfinite", "rollback")


# --- micro-batches ---


@pytest.mark.parametrize(("limit", "ranks", "expected"), [(1000, 1, 1024), (600, 1, 512), (300, 2, 256), (128, 8, 128)])
def test_the_largest_micro_batch_that_fits_is_found(limit, ranks, expected):
    config = parse(["--run.micro_batch", "auto"])
    world = World(0, ranks, ranks, torch.device("cpu"))
    world_sum = World.all_reduce_sum
    tried = []

    def fits(micro_batch: int) -> bool:
        tried.append(micro_batch)
        return micro_batch <= max(limit, 1024 if limit == 1000 else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            World, "all_reduce_sum", lambda self, values: values if self.size > 1 else world_sum(self, values)
        )
        assert largest_micro_batch(config, world, fits) == expected
        assert tried == sorted(tried, reverse=True) and all(1024 // ranks % size == 0 for size in tried)
        with pytest.raises(UserError, match="not even one group of 128 images fits"):
            largest_micro_batch(config, world, lambda _: False)


def test_auto_is_one_group_on_a_cpu_and_is_kept_by_a_run_that_goes_on(digits, tmp_path, capsys):
    train_here(digits, tmp_path, "--run.micro_batch", 64, "--run.stop_after_steps", 2)
    train_here(digits, tmp_path, "--run.micro_batch", "auto", "--run.stop_after_steps", 3)
    assert "run.micro_batch auto: 64, as before" in capsys.readouterr().out
    train_here(digits, tmp_path / "new", "--run.micro_batch", "auto", "--run.stop_after_steps", 1)
    assert "run.micro_batch auto: 32, one group, on a CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        UserError("DALI failed on positions [0, 64), not because of an image: cudaErrorMemoryAllocation (2)"),
        UserError(
            "DALI failed on positions [0, 64), not because of an image: Can't allocate 12345678 bytes on device 0."
        ),
        RuntimeError("Error in MIXED operator `nvidia.dali.fn.decoders.image_slice`: CUDA allocation failed"),
    ],
)
def test_memory_that_is_too_small_is_told_from_other_errors(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("where", ["trainer.update.step.TrainStep.__call__", "trainer.update.step.TrainStep.warm_up"])
@pytest.mark.parametrize("command", [main, lambda arguments: doctor.main([str(CONFIG), *arguments])])
def test_a_gpu_without_memory_left_is_one_line(digits, tmp_path, monkeypatch, capsys, where, command):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(where, full)
    monkeypatch.setattr("trainer.builder.choose_compiler", lambda *_: (lambda function: function, ""))  # it rehearses
    with pytest.raises(SystemExit):
        command(arguments_for(digits, tmp_path))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: CUDA out of memory. Tried") and "Lower run.micro_batch, or run.eval_batch" in said


@pytest.mark.gpu
@pytest.mark.parametrize("pipeline", ["torchvision", "dali"])
def test_auto_is_found_by_trying_on_a_gpu(digits, tmp_path, capsys, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    arguments = ["--run.micro_batch", "auto", "--data.pipeline", pipeline, "--run.stop_after_steps", 2]
    train_here(digits, tmp_path, *arguments, "--run.device", "cuda")
    assert "run.micro_batch auto: 64, the largest that fits of a rank's 64 images" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_rehearsal_takes_the_memory_of_an_update(digits, tmp_path):
    """Many weights and small images: the gradients of the micro-batches before count as much as what is kept."""
    arguments = ["--student.name", "vit_tiny_patch16_224", "--data.pipeline", "synthetic", "--run.compile", "false"]
    world = World(0, 1, 1, torch.device("cuda", 0))
    run = build(parse(arguments_for(digits, tmp_path, *arguments)), world)
    peaks = []

    def measured(action) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        action()
        peaks.append(torch.cuda.max_memory_allocated())

    measured(lambda: run.step.warm_up(gray_batch(16, 32, 16, world.device)))
    for number in range(2):
        plans = rank_plans(run.plan, number, number + 1, world, 16)
        measured(lambda number=number, plans=plans: run.step(run.pipelines.of["train"].batches(plans), number))
    assert 0.95 < peaks[0] / peaks[2] < 1.5, peaks


def test_a_rehearsal_leaves_no_trace(digits, tmp_path):
    run = build(parse(arguments_for(digits, tmp_path, "--student.kwargs.drop_rate", "0.5")), ONE)
    before = checkpoint.content_of(run.state)
    run.step.warm_up(gray_batch(32, 32, 32, ONE.device))
    assert equal(before, checkpoint.content_of(run.state))
    assert all(parameter.grad is None for parameter in run.state.student.parameters())
