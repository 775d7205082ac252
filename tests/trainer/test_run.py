"""The command: all ways to start it, what a run writes, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from conftest import DROPOUT, EVERY_3, REPOSITORY, TINY, run_trainer, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import locked, read_json_lines
from support.forked_python import executable
from support.tiny_runs import ONE, newest
from trainer.builder import build
from trainer.config.sections import parse
from trainer.loop import train


def test_the_run_folder_says_what_happened(digits, distilled):
    config = yaml.safe_load((distilled / "config.yaml").read_text())
    assert config["student"]["name"] == "tiny_cnn" and config["augment"]["mix_group"] == 32
    lines = read_json_lines(distilled / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(5, 0), (10, 1), (15, 2), (20, 3)]
    for weights in ("raw", "ema"):
        assert evaluations[-1][weights]["images"] == 96
        assert 0 <= evaluations[-1][weights]["top1"] <= evaluations[-1][weights]["top5"] <= 100
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[:5] == [1e-4] * 5 and len(set(rates)) == 4
    summary = json.loads((distilled / "summary.json").read_text())
    assert summary["finished"] and summary["evaluation"] == {k: evaluations[-1][k] for k in ("raw", "ema")}
    names = sorted(path.name for path in (distilled / "checkpoints").iterdir())
    assert names == ["best.pt", "step-00000018.pt", "step-00000020.pt"]


# The losses of every fourth step.
GOLDEN_LOSSES = [3.0521, 2.7561, 2.6492, 2.5637, 2.5222]


def test_the_loss_curve_is_the_one_we_know(digits, teacher, tmp_path):
    """Golden: 20 steps on the CPU in float32. Another curve means that some number of the training has changed."""
    model = ["--student.name", "test_resnet", "--augment.mix_group", 16]  # loses more than tiny_cnn
    train_here(digits, tmp_path, *model, *teacher, *DROPOUT, *EVERY_3)
    losses = [line["loss"] for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[::4] == pytest.approx(GOLDEN_LOSSES, rel=1e-3)


def test_synthetic_data_need_no_dataset(tmp_path):
    summary = train(
        build(
            parse(
                [*TINY, "--run.out", str(tmp_path), "--data.pipeline", "synthetic", "--data.synthetic_samples", "128"]
                + ["--data.synthetic_classes", "5", "--run.stop_after_steps", "2"]
            ),
            ONE,
        )
    )
    assert summary["step"] == 2 and summary["evaluation"] == {}


def test_dali_trains_too(digits, tmp_path):
    summary = train_here(digits, tmp_path, "--data.pipeline", "dali", "--run.stop_after_steps", 5)
    assert summary["evaluation"]["raw"]["images"] == 96


def test_all_ways_to_start_it(digits, tmp_path):
    arguments = [*TINY, "--student.name", "test_resnet", "--data.root", str(digits), "--run.stop_after_steps", "1"]
    script = os.path.relpath(REPOSITORY / "trainer" / "run.py", tmp_path)
    # the script from anywhere, without the package installed, by a fresh interpreter; the module from the repository
    starts = (([sys.executable, script], tmp_path), ([executable(), "-m", "trainer.run"], REPOSITORY))
    for i, (start, folder) in enumerate(starts):
        command = [*start, *arguments, "--run.out", str(tmp_path / str(i))]
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": ""})
        assert newest(tmp_path / str(i))["step"] == 1


def test_a_mistake_is_reported_in_one_line(tmp_path):
    done = run_trainer("--run.out", tmp_path / "run", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --data.root is missing") and done.stderr.count("\n") == 1, done.stderr


def test_a_diverged_run_stops_with_its_checkpoints(digits, tmp_path):
    never = ["--run.eval_every", 9]  # its statistics would be looked at, too
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    message = r"step \d: the (logits of the student|gradient) .*not finite.* Lower optim"
    with pytest.raises(UserError, match=message):
        train_here(digits, tmp_path, "--optim.lr", "1e9", "--schedule.warmup_lr", "1e9", "--run.log_every", 1, *never)
    assert newest(tmp_path)["step"] == 2


def test_two_runs_in_one_folder(digits, tmp_path):
    tmp_path.joinpath("run").mkdir()
    with locked(tmp_path / "run" / ".lock", ""), pytest.raises(UserError, match="run: another run is working in it"):
        train_here(digits, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_ema_too_slow_for_the_run_is_reported(digits, tmp_path, capsys):
    train_here(digits, tmp_path, "--ema.decay", "0.99996", "--run.stop_after_steps", 1)
    assert "ema.decay 0.99996 is slow for 20 steps: at the end the EMA still holds 100%" in capsys.readouterr().out


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_without_a_traceback(digits, tmp_path):
    command = [executable(), str(REPOSITORY / "trainer" / "run.py"), *TINY, *EVERY_3]
    command += ["--data.root", str(digits), "--run.out", str(tmp_path)]
    command += ["--schedule.epochs", "300"]  # on a busy machine 4 end before the signal
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or "train" not in {line["kind"] for line in read_json_lines(metrics)}:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error == "stopping after the present step, or before the first; again ends at once\n"
    assert newest(tmp_path)["step"] > 0
