"""tools/study.py --slurm under SLURM itself: `make slurm`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from slurm.cluster import Cluster, wait_until
from support.tiny_runs import assert_same_end

pytestmark = pytest.mark.slurm

EPOCHS = 40


def run_study(cluster: Cluster, folder: Path, out: Path, digits: Path, broken: bool, *options: str) -> str:
    """Call tools/study.py with two good students, and perhaps one that fails. Returns what it prints."""
    students = ["test_byobnet", "test_vit"]
    if broken:  # The study's checks cannot know that its loss will not be finite.
        diverging = {"optim.lr": 2e9, "schedule.warmup_epochs": 0}
        students.append({"name": "test_efficientnet", "overrides": diverging})
    overrides = {"schedule.epochs": EPOCHS, "schedule.cooldown_epochs": 0, "run.eval_every": EPOCHS}
    overrides |= {"run.device": "cpu", "run.checkpoint_every": 5, "run.log_every": 1}
    study = {
        "dataset": str(digits),
        "recipe": {"config": str(REPOSITORY / "configs" / "demo.yaml"), "overrides": overrides},
        "teacher": {"name": "test_resnet", "train": {"schedule.epochs": 6}},
        "students": students,
        "evaluate": {"weights": ["ema"]},
        "speed": {"backends": ["eager"], "repeats": 1},
    }
    file = folder / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(study))
    command = [sys.executable, str(REPOSITORY / "tools" / "study.py"), str(file), "--out", str(out), *options]
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps_logged(run: Path) -> int:
    """Count the updates that a run has logged."""
    log = run / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def test_a_job_that_is_preempted_and_a_student_that_fails_do_not_keep_the_study_from_its_end(cluster, digits, tmp_path):
    out = tmp_path / "cluster"
    parameters = ("--slurm", "timeout_min=60", "cpus_per_task=1")
    jobs = dict(
        (names, int(number))
        for number, names in re.findall(
            r"^job (\d+): (.+)$", run_study(cluster, tmp_path, out, digits, True, *parameters), re.MULTILINE
        )
    )
    assert len(jobs) == 2 + 3 * 3 + 1  # teacher, store, three students, and the last one for speed and the report
    victim = jobs["train test_vit-s0"]
    wait_until(lambda: any((out / "train").glob("test_vit-s0-*/run/metrics.jsonl")), 900, "the student has not begun")
    run = next((out / "train").glob("test_vit-s0-*/run"))
    wait_until(lambda: steps_logged(run) > 5, 600, "the student has made no updates")
    cluster.call("scontrol", "requeue", victim)
    assert cluster.await_end(jobs["speed and report"], 3000) == ["COMPLETED"]
    assert cluster.states(victim) == ["COMPLETED"]
    assert cluster.states(jobs["train test_efficientnet-s0"]) == ["FAILED"]
    assert json.loads((run / "summary.json").read_text())["session"]["start_step"] > 0  # It was resumed.
    assert len(list(out.glob("export/test_*/model/config.json"))) == 2
    assert list(out.glob("speed/*/comparison.json"))
    report = (out / "index.html").read_text()
    assert "test_efficientnet" in report and "not finite" in report
    here = tmp_path / "here"
    run_study(cluster, tmp_path, here, digits, False)
    assert_same_end(run, next((here / "train").glob("test_vit-s0-*/run")))
