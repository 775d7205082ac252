"""tools/slurm/train.sbatch starts the ranks, and queues a job again that was signalled."""

import json
import os
import shutil
import subprocess

import pytest

from conftest import REPOSITORY, TINY
from support.forked_python import executable
from support.processes import free_port

# srun starts SLURM_NTASKS tasks of its command, hands SIGUSR1 to all of their processes as slurmstepd does, and ends
# with the highest exit code.
SRUN = """#!/usr/bin/env python3
import itertools, json, os, signal, subprocess, sys, time

options = list(itertools.takewhile(lambda argument: argument.startswith("--"), sys.argv[1:]))
command = sys.argv[1 + len(options):]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["srun", *options]) + "\\n")
tasks = [
    subprocess.Popen(command, start_new_session=True, env={**os.environ, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
    for rank in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
while "SIGNAL" in os.environ and not all(os.path.exists(f"ready-{rank}") for rank in range(len(tasks))):
    time.sleep(0.1)
if "SIGNAL" in os.environ:
    for task in tasks:
        os.killpg(task.pid, signal.SIGUSR1)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


SCONTROL = """#!/usr/bin/env python3
import json, os, sys

with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nsecond")
if sys.argv[1:3] == ["show", "job"]:
    print("JobId=1 JobName=usi\\n   JobState=" + os.environ.get("STATE", "RUNNING") + " Reason=None")
"""


# Stands for the trainer: joins, and ends with 75 when a file says so.
RANK = """
import os, signal, sys, time
signalled = []
signal.signal(signal.SIGUSR1, lambda *_: signalled.append(1))
from pipelines.common.errors import exit_on_user_error
from trainer.cluster.world import join_world
with exit_on_user_error(), join_world("cpu") as world:
    open(f"rank-{world.rank}", "w").write(f"{world.size} {world.local_size} {os.environ['LOCAL_RANK']} {sys.argv[2:]}")
    open(f"ready-{world.rank}", "w").close()
    while sys.argv[1] == "75" and not signalled:
        time.sleep(0.05)
    world.barrier()
    time.sleep(world.rank)  # they do not end at once
sys.exit(int(sys.argv[1]))
"""


# The trainer itself, and word of its first step.
TRAINER = """
import os, sys, threading, time
from pathlib import Path
from trainer.run import main
log = Path(sys.argv[sys.argv.index("--run.out") + 1]) / "metrics.jsonl"
def report():
    while not log.exists() or '"train"' not in log.read_text():
        time.sleep(0.05)
    Path(f"ready-{os.environ['RANK']}").touch()
threading.Thread(target=report, daemon=True).start()
main(sys.argv[1:])
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs train.sbatch as SLURM would, with a stand-in for the trainer. Returns the process and what was called."""

    def run(program: str, *arguments, **environment) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        files = {"srun": SRUN, "scontrol": SCONTROL, "rank.py": RANK, "real.py": TRAINER}
        for name, content in files.items():
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(REPOSITORY / "tools" / "slurm" / "train.sbatch"), "--run.out", "a b", *map(str, arguments)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY),
                "CALLS": str(calls),
                "TRAIN_PROGRAM": f"{executable()} {program}",
                "SLURM_JOB_ID": str(140000 + free_port() % 20000),
                "SLURM_JOB_NODELIST": "some[1-2]",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_CPUS_PER_TASK": "3",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def test_a_slurm_job_that_was_signalled_asks_once_to_be_queued_again(slurm, tmp_path):
    done, calls = slurm("rank.py 75", SIGNAL="1")
    assert done.returncode == 0, done.stderr
    assert "stopped by a signal (exit code 75); job 1" in done.stdout
    requeues = [call for call in calls if call[:2] == ["scontrol", "requeue"]]
    assert len(requeues) == 1 and requeues[0][2].startswith("1")
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"2 2 {rank} ['--run.out', 'a b']"
    (srun,) = [call for call in calls if call[0] == "srun"]
    assert {"--kill-on-bad-exit=0", "--cpu-bind=none", "--cpus-per-task=3"} <= set(srun)


@pytest.mark.long
def test_the_trainer_goes_on_when_slurm_starts_its_job_again(slurm, tmp_path, digits):
    arguments = [*TINY, "--data.root", digits, "--schedule.epochs", 20, "--run.eval_every", 20, "--run.log_every", 1]
    done, calls = slurm("real.py", *arguments, SIGNAL="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "SIGUSR1: stopped after step" in done.stdout
    assert len([call for call in calls if call[:2] == ["scontrol", "requeue"]]) == 1
    done, calls = slurm("real.py", *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout and "finished after step 100 of 100" in done.stdout
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]


@pytest.mark.parametrize("code", [138, 143])
def test_a_signal_that_came_before_python_could_catch_it_queues_the_job_again(slurm, code):
    done, calls = slurm(f"rank.py {code}", SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1")
    assert done.returncode == 0 and f"stopped by a signal (exit code {code})" in done.stdout
    assert len([call for call in calls if call[:2] == ["scontrol", "requeue"]]) == 1


@pytest.mark.parametrize("code", [75, 143])
def test_a_job_that_scancel_ends_is_not_queued_again(slurm, code):
    program = f"rank.py {code}"
    environment = {"SIGNAL": "1"} if code == 75 else {}
    done, calls = slurm(program, STATE="COMPLETING", SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1", **environment)
    assert done.returncode == code
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]


@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_that_finished_or_failed_is_not_queued_again(slurm, code):
    done, calls = slurm(f"rank.py {code}", SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1")
    assert done.returncode == code
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]
    assert ("is not put back into the queue" in done.stderr) == bool(code)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_slurm_script_passes_shellcheck():
    done = subprocess.run(["shellcheck", str(REPOSITORY / "tools" / "slurm" / "train.sbatch")], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
