"""The short version of `make chaos`: runs broken at random moments end as one left in peace."""

import shutil
import subprocess
import sys

import torch
from conftest import REPOSITORY, TINY

from tools.chaos import compare, to_markdown
from trainer.config import parse
from trainer.distributed import World
from trainer.run import train


def test_broken_runs_end_bit_equal_to_one_left_in_peace(tmp_path):
    report = tmp_path / "chaos.md"
    command = [sys.executable, str(REPOSITORY / "tools" / "chaos.py"), "--runs", "2"]
    done = subprocess.run([*command, "--markdown", str(report)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    assert "2 of 2 ended with weights, average, optimizer, log, summary and quarantine bit-equal" in text
    assert "| SIGKILL to one rank |" in text or "| SIGTERM or SIGUSR1 to one rank |" in text


def test_the_comparison_sees_what_differs(digits, tmp_path):
    one = World(0, 1, 1, torch.device("cpu"))
    settings = [*TINY, "--data.root", str(digits), "--run.stop_after_steps", "5", "--run.log_every", "1"]
    train(parse([*settings, "--run.out", str(tmp_path / "a")]), one)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert compare(tmp_path / "a", tmp_path / "b") == []
    log = tmp_path / "b" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines, *(line for line in lines if '"step": 3' in line)]))  # counted twice
    (tmp_path / "b" / "quarantine.jsonl").write_text('{"key": "x"}\n')
    names = [line.rpartition(": ")[2] for line in compare(tmp_path / "a", tmp_path / "b")]
    assert names == ["the train lines of metrics.jsonl differs", "quarantine.jsonl differs"]
    train(parse([*settings, "--run.out", str(tmp_path / "c"), "--optim.eps", "1.001e-8"]), one)
    names = [line.rpartition(": ")[2] for line in compare(tmp_path / "a", tmp_path / "c")]
    assert names[:3] == ["student differs", "ema differs", "optimizer differs"]


def test_the_report_counts_what_was_broken_and_names_what_went_wrong():
    import collections

    from tools.chaos import Tally

    tally = Tally(collections.Counter({"SIGKILL to one rank": 3}), ["run-1: student differs", "run-1: ema differs"])
    report = to_markdown(tally, runs=3, seed=0, elapsed_s=60)
    assert "2 of 3 ended" in report and "| SIGKILL to one rank | 3 |" in report and "- run-1: ema differs" in report
