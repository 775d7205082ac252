"""What is written down about a run: metrics.jsonl over restarts, the progress line, plain lines."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import TINY
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.forked_python import executable
from support.sessions import ONE, session, steps
from trainer.cluster.world import World
from trainer.monitor.telemetry import Telemetry

SYNTHETIC = [
    *TINY,
    *("--data.pipeline", "synthetic", "--data.synthetic_samples", "64", "--data.synthetic_classes", "10"),
    *("--run.stop_after_steps", "1"),
]


# A training whose error is in a file, because nothing else shows it.
EXPLAINED = """
import sys, traceback
from trainer.run import main
try:
    main(sys.argv[2:])
except BaseException as error:
    with open(sys.argv[1], "w") as file:
        traceback.print_exception(error, file=file)
    raise
"""


class Kept(list):
    """A sink that keeps what it gets."""

    closed = False

    def __call__(self, record: dict) -> None:
        self.append(record)

    def close(self) -> None:
        self.closed = True


def kinds(folder: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_json_lines(folder / "metrics.jsonl")]


def test_a_restart_drops_what_will_be_written_again_and_no_session(tmp_path):
    session(tmp_path, 0, 4)
    session(tmp_path, 3, 4)
    session(tmp_path, 1, 2)
    assert kinds(tmp_path) == [("session", 0), ("train", 1), ("session", 3), ("session", 1), ("train", 2), ("eval", 2)]


def test_a_run_that_goes_back_within_a_session_says_so_and_drops_what_will_be_written_again(tmp_path):
    telemetry = Telemetry(tmp_path, ONE, step=0, total_steps=10, steps_per_epoch=2)
    with telemetry.live():
        steps(telemetry, 0, 3)
        telemetry.rewind(1)
        steps(telemetry, 1, 2)
    session(tmp_path, 0, 1)  # the rollback is not forgotten by a later session
    first = [("session", 0), ("rollback", 1), ("session", 0), ("train", 1)]
    assert kinds(tmp_path) == first
    (rollback,) = (line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "rollback")
    assert rollback["from_step"] == 3


def test_every_line_has_the_time_and_a_session_says_where_it_runs(tmp_path):
    before = time.time()
    session(tmp_path, 0, 2)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert all(before - 1 <= line["time"] <= time.time() + 1 for line in lines)
    assert lines[0].keys() == {
        "kind",
        "step",
        "total_steps",
        "steps_per_epoch",
        "ranks",
        "host",
        "device",
        "validation",
        "time",
    }
    assert (lines[0]["ranks"], lines[0]["device"], lines[0]["total_steps"]) == (1, "cpu", 10)


def test_a_line_cut_off_by_a_crash_is_gone_after_the_restart(tmp_path):
    session(tmp_path, 0, 1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert kinds(tmp_path) == [("session", 0), ("train", 1)]
    session(tmp_path, 1, 2)
    assert kinds(tmp_path) == [("session", 0), ("train", 1), ("session", 1), ("train", 2), ("eval", 2)]


def test_lines_that_are_none_are_kept_beside_the_log_and_counted(tmp_path, capsys):
    session(tmp_path, 0, 1)
    strange = [b'{"kind": "mine"}', b"\xff\xfe", b'{"kind": "train", "st']
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(strange))
    session(tmp_path, 1, 2)
    assert (tmp_path / "metrics.jsonl.unusable").read_bytes().split(b"\n") == [*strange, b""]
    assert "metrics.jsonl: what cannot be used is moved to metrics.jsonl.unusable, lines: 3" in capsys.readouterr().out
    session(tmp_path, 2, 3)
    assert "cannot be used" not in capsys.readouterr().out and len(kinds(tmp_path)) == 7


def test_an_error_that_appears_first_when_the_log_is_closed_is_raised(tmp_path):
    telemetry = Telemetry(tmp_path, ONE, step=0, total_steps=10, steps_per_epoch=2)
    with pytest.raises(OSError, match="No space left") as error, telemetry.live(), open("/dev/full", "w") as full:
        telemetry._file.write("what some file systems write no sooner")
        os.dup2(full.fileno(), telemetry._file.fileno())
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    session(tmp_path, 0, 2, world=World(1, 2, 2, torch.device("cpu")), sinks=[sink := Kept()])
    assert not list(tmp_path.iterdir()) and not sink and not capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError("no answer"), UserError("wandb login")])
def test_sinks_get_every_line_and_are_closed_even_if_one_fails(tmp_path, capsys, error):
    """Such a one is left out from then on; a mistake that the user can fix ends the run."""

    class Failing(Kept):
        def __call__(self, record: dict) -> None:
            super().__call__(record)
            if record["step"] == 2:
                raise error

    sinks = [Kept(), Failing()]
    with pytest.raises(UserError) if isinstance(error, UserError) else contextlib.nullcontext():
        session(tmp_path, 0, 3, sinks=sinks)
    assert sinks[0] == read_json_lines(tmp_path / "metrics.jsonl") and all(sink.closed for sink in sinks)
    assert [record["step"] for record in sinks[1]].count(2) == 1 and sinks[1][-1]["step"] == 2
    line = "run.loggers: Failing gets no more numbers (OSError: no answer)"
    assert (line in capsys.readouterr().out) == isinstance(error, OSError)


def test_where_there_is_no_terminal_there_are_plain_lines(tmp_path, capsys):
    session(tmp_path, 0, 2)
    first, second, evaluation = capsys.readouterr().out.splitlines()
    assert first == "epoch 0  step 1/10  loss 2.5000  1,234 images/s  25% waiting for input  -:-- left"
    assert second.startswith("epoch 0  step 2/10") and second.endswith(" 0:00:01 left")
    assert evaluation == "epoch 0 done, 96 images: raw: top-1 50.00 % top-5 90.00 %"


def test_on_a_terminal_one_line_says_it_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    session(tmp_path, 4, 7)
    shown = capsys.readouterr().out.split("\r")[-1]
    assert "epoch 3  step 7/10  loss 2.5000  1,234 images/s  25% waiting" in shown


def gone_reader(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk(tmp_path):
    return open("/dev/full", "w")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("stream", [gone_reader, full_disk])
def test_a_run_continues_when_nobody_reads_its_output_any_more(tmp_path, monkeypatch, stream, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with stream(tmp_path) as screen, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        session(tmp_path, 0, 40)
        screen.flush()  # as Python does at the end of a process
    assert [step for kind, step in kinds(tmp_path) if kind == "train"] == list(range(1, 41))


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--optim.lr", "-1"], 1)])
def test_a_full_disk_under_output_and_messages_changes_no_exit_code(tmp_path, arguments, code):
    command = [executable(), "-c", EXPLAINED, tmp_path / "why.txt", *SYNTHETIC, "--run.out", tmp_path / "run"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, *arguments], stdout=full, stderr=full, timeout=300)
    assert ended.returncode == code, (tmp_path / "why.txt").read_text()
    assert (tmp_path / "run" / "summary.json").is_file() == (code == 0)
