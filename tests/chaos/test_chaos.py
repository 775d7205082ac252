"""The short version of `make chaos`: a few faults of each kind."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

from chaos.attempts import Attempt, isolated
from chaos.command import FAULTS, _parse, tallied, to_markdown
from chaos.runs import compare
from conftest import REPOSITORY, TINY
from support.forked_python import executable
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.loop import train


def test_a_broken_run_ends_bit_equal_to_one_left_in_peace(tmp_path):
    report = tmp_path / "chaos.md"
    command = [executable(), str(REPOSITORY / "tests" / "chaos"), "runs", "--count", "1"]
    done = subprocess.run([*command, "--markdown", str(report)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    assert "bit-equal to those of an uninterrupted run. 1 of 1 held." in text
    # On a machine that has become faster the run ends before the signal.
    assert "| SIGKILL to one rank | 1 | 1 |" in text or "| the run had already finished | 1 | 1 |" in text


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("runs", "studies")])
def test_commands_hold_against_a_few_faults_of_each_kind(name):
    """The attempts are forks of a process that has done nothing else: torch cannot train in a fork of every process."""
    command = [executable(), str(REPOSITORY / "tests" / "chaos"), name, "--count", "15", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 of 15 attempts held" in done.stdout


def test_the_comparison_sees_what_differs(digits, tmp_path):
    one = World(0, 1, 1, torch.device("cpu"))
    settings = [*TINY, "--data.root", str(digits), "--run.stop_after_steps", "5", "--run.log_every", "1"]
    train(build(parse([*settings, "--run.out", str(tmp_path / "a")]), one))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert compare(tmp_path / "a", tmp_path / "b") == []
    log = tmp_path / "b" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines, *(line for line in lines if '"step": 3' in line)]))  # counted twice
    (tmp_path / "b" / "quarantine.jsonl").write_text('{"key": "x"}\n')
    assert compare(tmp_path / "a", tmp_path / "b") == [
        "the train lines of metrics.jsonl differs",
        "quarantine.jsonl differs",
    ]
    train(build(parse([*settings, "--run.out", str(tmp_path / "c"), "--optim.eps", "1.001e-8"]), one))
    names = compare(tmp_path / "a", tmp_path / "c")
    assert names[:3] == ["student differs", "ema differs", "optimizer differs"]


def test_faults_that_do_not_exist_are_refused_by_name(capsys):
    assert (_parse([]).faults, _parse(["tars", "runs"]).faults) == ([], ["tars", "runs"])
    with pytest.raises(SystemExit):
        _parse(["tars", "tar"])
    assert "there is no 'tar', only runs, studies, " in capsys.readouterr().err


def test_the_report_counts_what_was_tried_and_names_what_fell():
    attempts = [Attempt("SIGKILL to one rank"), Attempt("SIGKILL to one rank", "student differs")]
    report = to_markdown({"runs": tallied(attempts)}, seed=0)
    assert "1 of 2 attempts held" in report and "| SIGKILL to one rank | 2 | 1 |" in report
    assert "- SIGKILL to one rank: student differs" in report


def _fails():
    raise ValueError("a reason")


def _ends_in_silence():
    sys.exit(3)


def _wants_too_much():
    bytearray(8 << 30)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (lambda: print("done"), ""),
        (lambda: sys.exit("tool: error: x: what is wrong"), ""),
        (_fails, "traceback: ValueError: a reason"),
        (_ends_in_silence, "exit 3 without a reason: "),
        (lambda: time.sleep(60), "hangs"),
        (_wants_too_much, "traceback: MemoryError"),
    ],
)
def test_an_attempt_is_judged_by_how_it_ends(command, complaint):
    assert isolated(command, seconds=2, mib=1024).complaint() == complaint
