"""A run that is resumed is the run that was not stopped."""

import json
import shutil
import signal

import pytest
import torch

from chaos.runs import equal
from conftest import train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.tiny_runs import ONE, STATE, arguments_for, assert_same_end, at_step, newest
from trainer.builder import build
from trainer.config.sections import parse
from trainer.run import main
from trainer.state.checkpoint import checkpoints


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_in_two_parts_ends_as_one_in_a_single_part(digits, tmp_path, device, precision):
    small = ["--data.image_size", 16, "--run.device", device]  # In float16 a CPU takes long.
    for out, stops in ((tmp_path / "whole", [7]), (tmp_path / "parts", [3, 7])):
        for stop in stops:
            arguments = ["--run.precision", precision, "--run.stop_after_steps", stop, "--run.log_every", 1]
            arguments += ["--data.pipeline", "torchvision", "--run.compile", "false", "--optim.clip_norm", 1]
            train_here(digits, out, *arguments, *small)
    whole, parts = (list(read_json_lines(tmp_path / out / "metrics.jsonl")) for out in ("whole", "parts"))
    ours, theirs = ([line["loss"] for line in lines if line["kind"] == "train"] for lines in (parts, whole))
    assert len(theirs) == 7 and ours == pytest.approx(
        theirs, rel=0 if device == "cpu" else 0.01
    )  # GPUs round each time.
    saved = newest(tmp_path / "parts")
    assert device == "cuda" or all(equal(saved[name], newest(tmp_path / "whole")[name]) for name in STATE)
    assert saved["optimizer"]["state"][0]["step"] == 7 and bool(saved["scaler"]) == (precision == "fp16")
    if precision == "fp16":  # It resumes without a scaler.
        train_here(digits, tmp_path / "parts", "--run.stop_after_steps", 8, *small)


def test_copies_that_a_person_makes_beside_the_checkpoints_are_never_taken_or_deleted(digits, undisturbed, tmp_path):
    main(arguments_for(digits, tmp_path, "--run.stop_after_steps", "4", "--run.checkpoint_every", "2"))
    folder = tmp_path / "checkpoints"
    content = (folder / "step-00000004.pt").read_bytes()
    names = ["step-00000002-backup.pt", "step-00000009 (copy).pt", "step-best.pt", "step-7.pt", "step-00000099.partial"]
    for name in names:
        (folder / name).write_bytes(content)
    killed = folder / "step-00000003.pt.0a1b2c3d.partial"  # as a process leaves it that was killed while it wrote
    killed.write_bytes(content)
    main(arguments_for(digits, tmp_path, "--run.checkpoint_every", "2", "--run.keep_checkpoints", "1"))
    assert all((folder / name).read_bytes() == content for name in names) and not killed.exists()
    assert_same_end(undisturbed, tmp_path)


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


def test_a_damaged_first_checkpoint_starts_a_run_over_and_later_ones_are_refused(digits, undisturbed, tmp_path, capsys):
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
