"""A run may resume on another number of ranks: every step sees the same samples and pixels."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from chaos import runs
from chaos.runs import equal
from conftest import REPOSITORY
from pipelines.common.files import read_json_lines
from support.forked_python import executable
from support.tiny_runs import assert_same_end, newest
from trainer.state import checkpoint
from trainer.state.checkpoint import read


@pytest.fixture(scope="module", params=["few", pytest.param("many", marks=pytest.mark.long)])
def elastic(request, tmp_path_factory) -> Path:
    """Runs whose number of ranks changes: to 3, 5 and 1 after step 10, or to 4, 7, 3, 16 and 1."""
    folder = tmp_path_factory.mktemp("elastic")
    command = [executable(), str(REPOSITORY / "tests" / "support" / "elastic_runs.py"), str(folder), request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows_of_steps(notes: Path) -> dict[int, list[str]]:
    """The hashes of all rows of each step, on all ranks, sorted."""
    found: dict[int, list[str]] = {}
    for step, digests in map(json.loads, notes.read_text().splitlines()):
        found.setdefault(step, []).extend(digests)
    return {step: sorted(digests) for step, digests in found.items()}


def test_the_samples_and_mixed_pixels_of_each_step_are_the_same_when_the_ranks_change(elastic):
    """2 ranks all along, and others from the tenth step on."""
    steady, changing = (rows_of_steps(elastic / f"{name}.rows.jsonl") for name in ("steady", "changing"))
    assert sorted(steady) == list(range(20)) and all(len(rows) == 64 for rows in steady.values())
    assert sorted(changing) == list(range(10, max(changing) + 1)) and len(changing) >= 5
    assert changing == {step: steady[step] for step in changing}


def test_torchrun_restarts_a_run_that_lost_a_rank(elastic, tmp_path):
    """It then is the run of two ranks that lost none."""
    arguments = [*runs.SETTINGS, "--data.root", str(elastic / "dataset")]
    command = [executable(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", str(REPOSITORY / "trainer" / "run.py"), *arguments, "--run.out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and any(line["step"] >= 7 for line in read_json_lines(metrics))):
        assert process.poll() is None
        time.sleep(0.01)
    started_by_torchrun = ["pgrep", "-f", "--", f"-u [^ ]*run.py .*{tmp_path}"]
    ranks = subprocess.run(started_by_torchrun, capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert re.search(r"resuming after step (6|9|12)\b", output)
    assert_same_end(elastic / "steady", tmp_path)


def test_the_gradients_are_the_same_on_every_number_of_ranks(elastic):
    """AdamW's first moment after one update is a tenth of the gradient. The model has no BatchNorm."""
    firsts = [checkpoint.path_of(run / "checkpoints", 1) for run in sorted(elastic.glob("ranks-?"))]
    assert len(firsts) >= 3
    one, *others = (read(path)["optimizer"]["state"] for path in firsts)
    for other in others:
        for index, state in one.items():
            gradient, found = 10 * state["exp_avg"], 10 * other[index]["exp_avg"]
            assert torch.allclose(gradient, found, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-7)


def test_four_ranks_resume_bit_equal(elastic):
    """With more than two, the order in which gradients are summed depends on DDP's buckets.

    DDP divides the gradients into buckets again after the first update of a session, the second one of the run here.
    """
    assert_same_end(elastic / "four", elastic / "four-resumed")


def test_ranks_with_statistics_of_their_own_resume_bit_equal(elastic):
    runs = [elastic / name for name in ("own-statistics", "own-statistics-resumed")]
    assert_same_end(*runs)
    a, b = (newest(run)["rank_statistics"] for run in runs)
    assert len(a) == 2 and equal(a, b) and not equal(a[0], a[1])
