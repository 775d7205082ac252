"""tools/benchmark.py gpu: the parts of the first ten minutes run in order, and what is done is not done again."""

import json
import re
import subprocess
import sys
import types

import pytest
import torch

from conftest import REPOSITORY, pytest_ignore_collect
from pipelines.common.errors import UserError
from support.forked_python import executable
from tools import benchmark
from tools.lib.benchmark import gpu as gpus
from tools.lib.benchmark.results import read_result
from tools.lib.common.hardware import machine

PYTHON = sys.executable
TEACHER = (
    "tools/benchmark.py",
    "teacher",
    "--teacher",
    "test_resnet",
    "--images",
    "4",
    "--size",
    "32",
    "--repeats",
    "1",
)


@pytest.fixture(autouse=True)
def programs_are_forks(monkeypatch):
    """The programs that benchmarks start need no seconds to import, because nothing here is about speed."""
    monkeypatch.setattr(sys, "executable", executable())


def test_without_a_gpu_nothing_is_started(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--out", str(tmp_path)])
    assert "PyTorch finds no GPU here, so nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--out", "no/such/folder"])
    assert "--out no/such/folder: no such folder" in capsys.readouterr().err


HERE: gpus.Here = {"machine": machine(), "source": "this one"}


def script(name: str, code: str, limit_s: float = 60) -> gpus.Part:
    return gpus.Part(name, ("-c", code), limit_s, has_result=False)


def summary(folder) -> dict:
    return json.loads((folder / gpus.SUMMARY).read_text())


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(tmp_path, capfd):
    parts = [
        script("fails", "import sys; print('begun', flush=True); sys.exit('out of luck')"),
        script("crashes", "import os; os.kill(os.getpid(), 11)"),
        script("hangs", "import time; print('asleep', flush=True); time.sleep(60)", 1),
        gpus.Part("teacher", TEACHER, 120),
    ]
    with pytest.raises(UserError) as refused:
        gpus.run_parts(tmp_path, parts, HERE)
    assert (
        "3 of 4 parts are not done: fails (exit code 1), crashes (it ended by SIGSEGV), hangs (not done after 1 s)"
        in str(refused.value)
    )
    found = summary(tmp_path)
    assert {name: found[name] for name in HERE} == HERE
    assert [(name, part["outcome"]) for name, part in found["parts"].items()] == [
        *(("fails", gpus.FAILED), ("crashes", gpus.FAILED), ("hangs", gpus.TIMED_OUT), ("teacher", gpus.DONE)),
    ]
    assert found["parts"]["fails"]["end"] == ["begun", "out of luck"]
    assert found["parts"]["hangs"]["end"] == ["asleep"] and found["parts"]["hangs"]["seconds"] >= 1
    assert "asleep" in capfd.readouterr().out
    assert read_result(tmp_path / "benchmark-gpu-teacher.json")["complete"]


def counting(tmp_path, name: str, code: int = 0) -> gpus.Part:
    """A part that leaves a line in a file each time."""
    return script(name, f"import sys; print('x', file=open({str(tmp_path / name)!r}, 'a')); sys.exit({code})")


def times_run(tmp_path, *names: str) -> list[int]:
    return [(tmp_path / name).read_text().count("x") for name in names]


def test_a_later_call_runs_the_parts_that_are_not_done(tmp_path):
    parts = [counting(tmp_path, "a"), counting(tmp_path, "b", code=1), counting(tmp_path, "c")]
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 3 parts are not done: b"):
            gpus.run_parts(tmp_path, parts, HERE)
    assert times_run(tmp_path, "a", "b", "c") == [1, 2, 1]
    parts[1] = counting(tmp_path, "b")
    gpus.run_parts(tmp_path, parts, HERE)
    gpus.run_parts(tmp_path, parts, HERE, again=["a"])
    assert times_run(tmp_path, "a", "b", "c") == [2, 3, 1]
    gpus.run_parts(tmp_path, parts, HERE, again=[gpus.ALL])
    assert times_run(tmp_path, "a", "b", "c") == [3, 4, 2]
    (tmp_path / gpus.SUMMARY).unlink()
    gpus.run_parts(tmp_path, parts, HERE)
    assert times_run(tmp_path, "a", "b", "c") == [4, 5, 3]


@pytest.mark.parametrize("other", [{"source": "another one"}, {"machine": {**HERE["machine"], "gpu": "NVIDIA H200"}}])
def test_on_another_machine_or_with_another_source_nothing_counts_as_done(tmp_path, other):
    parts = [counting(tmp_path, "a"), counting(tmp_path, "b")]
    gpus.run_parts(tmp_path, parts, HERE)
    gpus.run_parts(tmp_path, parts[:1], HERE | other)
    assert times_run(tmp_path, "a", "b") == [2, 1]
    assert list(summary(tmp_path)["parts"]) == ["a"], (
        "what was done elsewhere must not stand beside this machine's name"
    )


def test_the_last_part_has_the_time_that_the_others_leave(tmp_path, monkeypatch):
    sleeping = [script(name, "import time; time.sleep(1)", 0.1) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"1 of 2 parts are not done: a \(not done after 0.1 s\)"):
        gpus.run_parts(tmp_path, sleeping, HERE)
    monkeypatch.setattr(gpus, "ALL_PARTS_S", 0)
    with pytest.raises(UserError, match=r"a \(not done after 0.1 s\), b \(not done after 0.1 s\)"):
        gpus.run_parts(tmp_path, sleeping, HERE, again=[gpus.ALL])


def test_a_part_with_other_options_or_an_incomplete_result_is_not_done(tmp_path):
    part = gpus.Part("teacher", TEACHER, 120)
    record = {"outcome": gpus.DONE, "arguments": " ".join(part.arguments)}
    result = {"complete": True, "machine": HERE["machine"]}
    path = part.result(tmp_path)
    assert not gpus.is_done(part, record, tmp_path, HERE)
    path.write_text(json.dumps(result))
    assert gpus.is_done(part, record, tmp_path, HERE)
    assert not gpus.is_done(part, {**record, "arguments": "-c pass"}, tmp_path, HERE)
    assert not gpus.is_done(part, {**record, "outcome": gpus.CUT_OFF}, tmp_path, HERE)
    assert not gpus.is_done(part, None, tmp_path, HERE)
    for change in ({"complete": False}, {"machine": {**HERE["machine"], "torch": "1.0"}}):
        path.write_text(json.dumps(result | change))
        assert not gpus.is_done(part, record, tmp_path, HERE)


def test_a_call_that_is_killed_leaves_a_summary_of_what_was_done(tmp_path):
    """The second part ends the process that started it, as a machine's time limit does."""
    kill = script("b", "import os; os.kill(os.getppid(), 9)")
    code = (
        "from pathlib import Path; from tools.lib.benchmark import gpu;"
        f"gpu.run_parts(Path({str(tmp_path)!r}), {[script('a', 'print(1)'), kill]!r}, {HERE!r})"
    ).replace("Part(", "gpu.Part(")
    ended = subprocess.run([PYTHON, "-c", code], cwd=REPOSITORY)
    assert ended.returncode == -9
    assert {name: part["outcome"] for name, part in summary(tmp_path)["parts"].items()} == {
        "a": gpus.DONE,
        "b": gpus.CUT_OFF,
    }


def test_the_source_is_every_file_that_decides_what_the_parts_do(tmp_path, monkeypatch):
    for folder in ("pipelines", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pipelines" / "a.py").write_text("1")
    monkeypatch.setattr(gpus, "REPOSITORY", tmp_path)
    digests = [gpus.source_digest()]
    (tmp_path / "pipelines" / "a.py").write_text("2")
    digests.append(gpus.source_digest())
    (tmp_path / "pipelines" / "a.py").rename(tmp_path / "tests" / "a.py")
    digests.append(gpus.source_digest())
    (tmp_path / "setup.cfg").write_text("[metadata]")
    digests.append(gpus.source_digest())
    assert len(set(digests)) == 4
    (tmp_path / "notes.md").write_text("nothing that is run")
    assert gpus.source_digest() == digests[-1]


@pytest.mark.parametrize(("selected", "opened"), [("gpu", False), ("not long", True)])
def test_tests_for_a_gpu_open_no_other_files(selected, opened):
    """A machine with a GPU may lack what others import, and time to import it."""
    config = types.SimpleNamespace(option=types.SimpleNamespace(markexpr=selected))
    paths = [REPOSITORY / "tests" / name for name in ("pipelines/plan/test_rng.py", "pipelines/ops/test_torch_ops.py")]
    assert [not pytest_ignore_collect(path, config) for path in paths] == [opened, True]


def test_the_first_ten_minutes_are_less_than_ten_and_the_docs_say_how_they_are_divided():
    """With 20 s for what this command itself does."""
    assert sum(part.limit_s + gpus.GRACE_S for part in gpus.PARTS) <= gpus.ALL_PARTS_S <= 580
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    table = re.findall(r"^\| `([\w-]+)` \| .* \| (\d+) s( and what the others have left)? \|$", text, re.MULTILINE)
    assert [(name, limit) for name, limit, _ in table] == [(part.name, str(part.limit_s)) for part in gpus.PARTS]
    assert [bool(more) for _, _, more in table] == [part is gpus.PARTS[-1] for part in gpus.PARTS]


@pytest.mark.parametrize("part", [part for part in gpus.PARTS if part.has_result], ids=lambda part: part.name)
def test_every_part_of_the_first_ten_minutes_is_a_command_that_is_understood(part, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "first_device", lambda: torch.device("cuda", 0))
    options = benchmark._parse([*part.arguments[1:], "--json", str(part.result(tmp_path))])
    assert options.json.name == f"benchmark-gpu-{part.name}.json"
    assert getattr(options, "compile", "no") == ("yes" if part.name == "train-compiled" else "no")
