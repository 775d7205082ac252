"""tools/slurm/train.sbatch, and conversions in job arrays, under SLURM itself: `make slurm`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, TINY
from pipelines.shards.manifest import read_manifest
from slurm.cluster import Cluster, wait_until
from support.tiny_runs import assert_same_end
from trainer.state.checkpoint import checkpoints, checkpoints_folder

pytestmark = pytest.mark.slurm

SCRIPT = REPOSITORY / "tools" / "slurm" / "train.sbatch"
PYTHON = sys.executable
# Longer than two time limits: SLURM looks for jobs whose time is up only every 30 seconds.
EPOCHS = 350
REQUEUED = "goes back into the queue"


def train(cluster: Cluster, digits: Path, out: Path, *options: str) -> tuple[int, Path]:
    """Submit a training with two ranks on the CPU. Returns the job and its log."""
    cluster.environment["TRAIN_PROGRAM"] = f"{PYTHON} {REPOSITORY / 'trainer' / 'run.py'}"
    cluster.environment["OMP_NUM_THREADS"] = "1"
    log = out.with_suffix(".log")
    sizes = ("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
    settings = [*TINY, "--student.name", "test_resnet", "--schedule.epochs", EPOCHS, "--run.eval_every", EPOCHS]
    settings += ["--run.checkpoint_every", 1000, "--run.log_every", 1, "--data.root", digits, "--run.out", out]
    return cluster.submit(*sizes, f"--output={log}", f"--chdir={REPOSITORY}", *options, SCRIPT, *settings), log


def steps_logged(out: Path) -> int:
    """Count the updates that a run has logged."""
    log = out / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def test_a_run_that_is_requeued_by_its_time_limit_and_by_scancel_ends_with_the_bits_of_one_that_is_not(
    cluster, digits, tmp_path
):
    interrupted, undisturbed = tmp_path / "interrupted", tmp_path / "undisturbed"
    # SIGUSR1 comes 50 seconds after the start, or up to 30 seconds later: time enough to start and make updates.
    job, log = train(cluster, digits, interrupted, "--time=2", "--signal=USR1@70")
    wait_until(lambda: log.exists() and log.read_text().count(REQUEUED) >= 2, 600, "two requeues")
    steps = steps_logged(interrupted)
    wait_until(lambda: steps_logged(interrupted) > steps, 300, "the third start")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    requeues = log.read_text().count(REQUEUED)
    cluster.call("scancel", "--signal=TERM", job)
    wait_until(lambda: log.read_text().count(REQUEUED) > requeues, 120, "a requeue after SIGTERM")
    assert cluster.await_end(job, 1200) == ["COMPLETED"], log.read_text()
    text = log.read_text()
    assert "SIGUSR1: stopped after step" in text and text.count("SIGTERM: stopped after step") == 1
    assert "resuming after step" in text and "finished after step" in text
    job, log = train(cluster, digits, undisturbed, "--time=60")
    assert cluster.await_end(job, 1200) == ["COMPLETED"], log.read_text()
    assert REQUEUED not in log.read_text()
    assert_same_end(interrupted, undisturbed)
    assert len(checkpoints(checkpoints_folder(interrupted))) > 0


def test_a_job_that_scancel_ends_does_not_come_back(cluster, digits, tmp_path):
    job, log = train(cluster, digits, tmp_path / "run")
    wait_until(lambda: steps_logged(tmp_path / "run") > 0, 300, "the first update")
    cluster.call("scancel", job)
    assert cluster.await_end(job, 120) == ["CANCELLED"]
    assert REQUEUED not in log.read_text()


def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    job, log = train(cluster, tmp_path / "no dataset", tmp_path / "run")
    assert cluster.await_end(job, 120) == ["FAILED"]
    assert "is not put back into the queue" in log.read_text() and REQUEUED not in log.read_text()


SHARD = f"{PYTHON} {REPOSITORY / 'tools' / 'shard_imagenet.py'}"


def test_the_tasks_of_a_job_array_convert_a_part_each_and_a_dependent_job_merges(cluster, digits_folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = subprocess.run([*SHARD.split(), "build", str(digits_folder), str(whole), "--samples-per-shard", "50"])
    assert done.returncode == 0
    command = f"{SHARD} build {digits_folder} {out} --samples-per-shard 50"
    array = cluster.submit("--array=1-3", f"--output={tmp_path}/part-%a.log", "--wrap", command)
    merge = cluster.submit(
        f"--dependency=afterok:{array}", f"--output={tmp_path}/merge.log", "--wrap", f"{SHARD} merge {out}"
    )
    assert cluster.await_end(merge, 300) == ["COMPLETED"], (tmp_path / "merge.log").read_text()
    assert cluster.states(array) == ["COMPLETED"] * 3
    assert read_manifest(out)["splits"] == read_manifest(whole)["splits"]
    notes = [(tmp_path / f"part-{part}.log").read_text() for part in (1, 2, 3)]
    assert [f"part {part}/3" in note for part, note in zip((1, 2, 3), notes, strict=True)] == [True] * 3


def test_one_process_in_an_allocation_of_eight_tasks_works_alone_and_says_so(cluster, digits_folder, tmp_path):
    out, log = tmp_path / "out", tmp_path / "out.log"
    job = cluster.submit(
        "--ntasks=8", f"--output={log}", "--wrap", f"{SHARD} build {digits_folder} {out} --samples-per-shard 100"
    )
    assert cluster.await_end(job, 120) == ["COMPLETED"], log.read_text()
    assert "SLURM_NTASKS=8" in log.read_text() and "this process works alone" in log.read_text()
    assert sum(split["samples"] for split in read_manifest(out)["splits"].values()) == 416
    run = tmp_path / "run"
    settings = [*TINY, "--student.name", "test_resnet", "--data.root", out, "--run.out", run, "--schedule.epochs", 2]
    command = " ".join(map(str, [PYTHON, REPOSITORY / "trainer" / "run.py", *settings]))
    log = tmp_path / "run.log"
    job = cluster.submit("--ntasks=8", f"--output={log}", "--wrap", command)
    assert cluster.await_end(job, 200) == ["COMPLETED"], log.read_text()
    assert "this process works alone" in log.read_text()
    assert json.loads((run / "summary.json").read_text())["finished"]
