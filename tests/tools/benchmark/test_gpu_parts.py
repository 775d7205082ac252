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
from tools import benchmark
from tools.lib.benchmark import gpu as gpus

MACHINE = {"gpu": "one"}


@pytest.fixture(autouse=True)
def machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "_machine", lambda: MACHINE)


def script(path, code: str, limit_s: float = 60) -> tuple[str, float]:
    """A part that runs this code, which it finds in a file."""
    path.write_text(code)
    return str(path), limit_s


def outcomes(folder) -> dict:
    return json.loads((folder / gpus.SUMMARY).read_text())["parts"]


def test_without_a_gpu_nothing_is_started(capsys, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--out", str(tmp_path)])
    assert "PyTorch finds no GPU here, so nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--out", "no/such/folder"])
    assert "--out no/such/folder: no such folder" in capsys.readouterr().err


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(tmp_path):
    parts = {
        "fails": script(tmp_path / "a.py", "import sys; print('begun', flush=True); sys.exit('out of luck')"),
        "hangs": script(tmp_path / "b.py", "import subprocess; subprocess.run(['sleep', '60'])", 1),
        "works": script(tmp_path / "c.py", "print('the last')"),
    }
    with pytest.raises(
        UserError, match=r"2 of 3 parts are not done: fails \(exit code 1\), hangs \(not done after 1 s\)"
    ):
        gpus.gpu(tmp_path, parts=parts)
    found = outcomes(tmp_path)
    assert found == {"fails": "exit code 1", "hangs": "not done after 1 s", "works": gpus.DONE}
    assert (tmp_path / gpus.LOG).read_text() == "begun\nout of luck\nthe last\n"


def test_a_later_call_runs_the_parts_that_are_not_done_here(tmp_path, monkeypatch):
    def times_run() -> list[int]:
        return [(tmp_path / gpus.LOG).read_text().count(name) for name in "ab"]

    parts = {"a": script(tmp_path / "a.py", "print('a')"), "b": script(tmp_path / "b.py", "print('b'); exit(1)")}
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 2 parts are not done: b"):
            gpus.gpu(tmp_path, parts=parts)
    assert times_run() == [1, 2]
    script(tmp_path / "b.py", "print('b')")
    gpus.gpu(tmp_path, again=["a"], parts=parts)
    assert times_run() == [2, 3]
    monkeypatch.setattr(gpus, "source_hash", lambda: "another")
    gpus.gpu(tmp_path, parts=parts)
    assert times_run() == [3, 4]
    monkeypatch.setitem(MACHINE, "gpu", "another")
    gpus.gpu(tmp_path, parts={"a": parts["a"]})
    assert times_run() == [4, 4]
    assert [*outcomes(tmp_path)] == ["a"], "what was done elsewhere must not stand beside this machine's name"


def test_a_call_that_is_killed_leaves_a_summary_of_what_was_done(tmp_path):
    """The second part ends the process that started it, as a machine's time limit does."""
    done, kill = script(tmp_path / "a.py", ""), script(tmp_path / "b.py", "import os; os.kill(os.getppid(), 9)")
    code = (
        "from pathlib import Path; from tools.lib.benchmark import gpu; gpu._machine = lambda: {};"
        f"gpu.gpu(Path({str(tmp_path)!r}), parts={dict(a=done, b=kill)!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == -9
    assert outcomes(tmp_path) == {"a": gpus.DONE, "b": "cut off"}


@pytest.mark.parametrize(("selected", "opened"), [("gpu", False), ("not long", True)])
def test_tests_for_a_gpu_open_no_other_files(selected, opened):
    """A machine with a GPU may lack what others import, and time to import it."""
    config = types.SimpleNamespace(option=types.SimpleNamespace(markexpr=selected))
    paths = [REPOSITORY / "tests" / name for name in ("pipelines/plan/test_rng.py", "pipelines/ops/test_torch_ops.py")]
    assert [not pytest_ignore_collect(path, config) for path in paths] == [opened, True]


def test_the_first_ten_minutes_are_less_than_ten_and_the_docs_say_how_they_are_divided():
    assert sum(limit_s for _, limit_s in gpus.PARTS.values()) <= 580
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    table = re.findall(r"^\| `([\w-]+)` \| .* \| (\d+) s \|$", text, re.MULTILINE)
    assert table == [(name, str(limit_s)) for name, (_, limit_s) in gpus.PARTS.items()]


@pytest.mark.parametrize("name", [*gpus.PARTS][1:])
def test_every_part_of_the_first_ten_minutes_is_a_command_that_is_understood(name, monkeypatch):
    monkeypatch.setattr(benchmark, "first_device", lambda: torch.device("cuda", 0))
    options = benchmark._parse([*gpus.PARTS[name][0].split()[1:], "--json", "here"])
    assert options.compile == ("yes" if name == "train-compiled" else "no") and options.size == 224
