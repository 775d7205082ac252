"""A run that a signal stops ends after the step with a checkpoint, and resumes as if it had not been stopped."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, TINY, train_here
from pipelines.common.files import read_json_lines
from support.tiny_runs import ONE, arguments_for, assert_same_end, at_step, newest
from trainer.cluster.preemption import REQUEUE, STOPPING, Preemption
from trainer.run import main
from trainer.state.checkpoint import checkpoints


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_a_run_after_the_step_with_a_checkpoint(
    digits, undisturbed, tmp_path, monkeypatch, capsys, number
):
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as end:
            main(arguments_for(digits, tmp_path))
    assert end.value.code == (130 if number == signal.SIGINT else REQUEUE)
    line = f"{number.name}: stopped after step 7 of 20. Run the same command again to resume there"
    assert line in capsys.readouterr().out
    assert newest(tmp_path)["step"] == 7
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["session"]["stopped_by"] == number.name and not summary["finished"]
    main(arguments_for(digits, tmp_path))  # ends without raising SystemExit
    assert_same_end(undisturbed, tmp_path)


def test_a_signal_while_the_program_is_loaded_ends_it_quietly(tmp_path):
    command = [sys.executable, str(REPOSITORY / "trainer" / "run.py"), *TINY, "--run.out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    handled = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", handled.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=300) == ("", "") and process.returncode == REQUEUE


@pytest.mark.parametrize("number", STOPPING)
def test_each_of_these_signals_is_noted_unless_the_process_was_started_to_ignore_it(number):
    preemption = Preemption(ONE)
    with preemption.catching_signals():
        signal.raise_signal(number)
    assert preemption.agree(False) == (number, False)
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
    try:
        ignoring = Preemption(ONE)
        with ignoring.catching_signals():
            signal.raise_signal(number)
        assert ignoring.agree(False) == (0, False)
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_a_run_at_once(digits, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 6, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == 130 and "interrupted. Run the same command again" in capsys.readouterr().err
    assert not checkpoints(tmp_path / "checkpoints")


def test_a_signal_while_a_run_is_built_stops_it_before_the_first_step(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.builder.build_teachers", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        main(arguments_for(digits, tmp_path))
    assert end.value.code == REQUEUE and not checkpoints(tmp_path / "checkpoints")


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
