"""Cores, home folders and sockets are asked of the machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from pipelines.common.machine import expanded, num_cores
from tools.lib.common.arguments import model_argument, path_argument
from tools.lib.common.evaluation import EvalConfig
from trainer.cluster.world import World
from trainer.config.cli import parse_settings
from trainer.config.sections import DataConfig, parse
from trainer.evaluation.trained import load_model
from trainer.feed import rank_threads

AFFINITY = 64


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """num_cores of a process with an affinity of 64 cores, in control groups that are given as files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(AFFINITY)))

    def count(groups: str, **files: str) -> int:
        (tmp_path / "groups").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return num_cores(tmp_path / "cgroup", tmp_path / "groups")

    return count


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"user/job/cpu.max": "200000 100000"}, 2),
        ({"user/job/cpu.max": "150000 100000"}, 2),  # one and a half
        ({"user/job/cpu.max": "20000 100000"}, 1),
        ({"user/job/cpu.max": "max 100000"}, AFFINITY),
        ({"user/cpu.max": "300000 100000", "user/job/cpu.max": "max 100000"}, 3),  # the group above
        ({"user/cpu.max": "300000 100000", "user/job/cpu.max": "800000 100000"}, 3),
        ({"cpu.max": "400000 100000"}, 4),  # a container's own root, whatever it is called outside
        ({"other/cpu.max": "100000 100000"}, AFFINITY),
        ({"user/job/cpu.max": "9900000 100000"}, AFFINITY),
        ({"user/job/cpu.max": "nonsense"}, AFFINITY),
        ({"user/job/cpu.max": "0 0"}, AFFINITY),
        ({}, AFFINITY),
    ],
)
def test_a_quota_of_version_2_limits_the_cores(cores, files, expected):
    assert cores("0::/user/job\n", **files) == expected


@pytest.mark.parametrize("groups", ["", "0::/../..\n", "garbage\n", "4:cpu:/\n"])
def test_groups_that_name_no_folder_here_leave_the_affinity(cores, groups):
    assert cores(groups) == AFFINITY


def test_an_affinity_below_the_quota_counts(cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7})
    assert cores("0::/\n", **{"cpu.max": "800000 100000"}) == 3


def test_every_command_asks_for_cores_in_one_place(monkeypatch):
    """No file but common/machine.py asks the system; the workers of a conversion and a rank's threads follow it."""
    asking = ("cpu_count", "sched_getaffinity")
    files = [path for folder in ("pipelines", "trainer", "tools") for path in (REPOSITORY / folder).rglob("*.py")]
    assert [path.name for path in files if any(word in path.read_text() for word in asking)] == ["machine.py"]
    monkeypatch.setattr("tools.shard_imagenet.num_cores", lambda: 3)
    monkeypatch.setattr("trainer.feed.num_cores", lambda: 9)
    from tools.shard_imagenet import _parse

    for command in (["build", "a", "b"], ["index", "a"], ["verify", "a"]):
        assert _parse(command).workers == 3
    assert rank_threads(DataConfig(), World(0, 2, 2, torch.device("cpu"))) == 4


# --- home folders ---


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder_is_put_in_every_path_of_the_settings(home):
    (home / "mine.yaml").write_text(
        "data: {root: ~/data}\n"
        "teacher: {name: resnet50, others: [{name: resnet18, checkpoint: ~/a.pt, classes: ~/b}]}\n"
    )
    (home / "student.yaml").write_text("checkpoint: ~/s.pt\n")
    config = parse(
        ["--config=~/mine.yaml", "--run.out=~/runs/a", "--teacher.checkpoint", "~/t.pt", "--student=~/student.yaml"]
    )
    assert config.data.root == home / "data" and config.run.out == home / "runs" / "a"
    assert config.student.checkpoint == home / "s.pt" and config.teacher.checkpoint == home / "t.pt"
    assert config.teacher.others[0].checkpoint == home / "a.pt" and config.teacher.others[0].classes == home / "b"


def test_the_home_folder_is_put_in_every_path_of_an_evaluation(home):
    arguments = [
        "--run.json=~/found.json",
        "--data.root=~/data",
        "--data.real_labels=~/real.json",
        "--student.classes=~/c",
    ]
    config = parse_settings(EvalConfig, arguments, prog="x", description="x")
    assert config.run.json == home / "found.json" and config.data.root == home / "data"
    assert config.data.real_labels == home / "real.json" and config.student.classes == home / "c"


def test_the_home_folder_is_put_in_the_paths_of_all_tools(home):
    for file in sorted((REPOSITORY / "tools").glob("*.py")):
        assert "type=Path" not in file.read_text(), file
    assert path_argument("~/a/b") == home / "a" / "b" and path_argument("a/~/b") == Path("a/~/b")
    assert model_argument("~/run") == str(home / "run")
    assert model_argument("resnet50.a1_in1k") == "resnet50.a1_in1k" and model_argument("hf_hub:a/b") == "hf_hub:a/b"
    (home / "run").mkdir()
    with pytest.raises(UserError, match=f"^{home}/run: neither a run's folder"):
        load_model("~/run")


@pytest.mark.parametrize("path", ["~nobodyhere/data", "~nobodyhere"])
def test_a_home_folder_that_is_not_known_is_one_line(path, capsys):
    for flag in (f"--data.root={path}", f"--config={path}", f"--run.out={path}"):
        with pytest.raises(UserError) as error:
            parse([flag])
        assert path in str(error.value) and "Write" in str(error.value) and len(str(error.value)) < 300
    from tools.shard_imagenet import main

    with pytest.raises(SystemExit):
        main(["info", path])
    assert "Write" in capsys.readouterr().err.splitlines()[-1]


def test_a_name_that_begins_with_a_tilde_is_written_as_the_message_advises(home):
    (home / "~nobodyhere").touch()
    with pytest.raises(
        UserError, match="the home folder of ~nobodyhere is not known here. Write the path in full, from /"
    ):
        expanded("~nobodyhere")
    assert expanded(f"{home}/~nobodyhere").is_file()


# --- sockets ---

# It needs a worker's process, and imports little.
WORKER = """
import tempfile
from tools.lib.common.process_pool import forkserver_context
context = forkserver_context("pipelines.common.machine")
worker = context.Process(target=exec, args=("import pipelines.common.machine as m; print(m.__file__, flush=True)",))
worker.start()
worker.join()
print(tempfile.gettempdir())
"""
MODULE = REPOSITORY / "pipelines" / "common" / "machine.py"


def run_worker(script: str = WORKER, cwd: Path = REPOSITORY, **environment) -> subprocess.CompletedProcess:
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("length", [75, 76, 240])
def test_workers_start_whatever_the_length_of_tmpdir(tmp_path_factory, length):
    """Other temporary files stay there, and nothing is left behind."""
    folder = tmp_path_factory.mktemp("t")
    folder = folder / ("x" * max(1, length - len(str(folder)) - 1))
    folder.mkdir()
    done = run_worker(TMPDIR=folder)
    assert done.stdout == f"{MODULE}\n{folder}\n", done.stderr
    assert not list(folder.iterdir())


def test_workers_start_where_tmpdir_is_missing_or_a_file(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        done = run_worker(TMPDIR=folder)
        assert done.stdout.startswith(f"{MODULE}\n"), done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot leave the present folder out")
def test_workers_import_this_copy_of_the_program_from_any_folder(tmp_path):
    """Another copy may be installed, or lie in the present folder."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("raise SystemExit('the wrong copy')")
    done = run_worker(f"import sys; sys.path[0] = {str(REPOSITORY)!r}\n{WORKER}", cwd=tmp_path)
    assert done.stdout.startswith(f"{MODULE}\n"), done.stderr


# --- threads ---


@pytest.mark.parametrize(
    ("package", "variables", "expected"),
    [
        ("pipelines", {}, "10000"),
        ("trainer", {}, "10000"),
        ("tools", {}, "10000"),
        ("pipelines", {"GOMP_SPINCOUNT": "5"}, "5"),
        ("pipelines", {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_waiting_threads_of_openmp_soon_sleep_unless_you_have_chosen(package, variables, expected):
    environment = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = f"import os, sys, {package}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, env={**environment, **variables}
    )
    assert done.stdout == f"{expected} False\n", done.stderr


SCRIPTS = [
    path
    for path in [*REPOSITORY.glob("trainer/*.py"), *REPOSITORY.glob("tools/*.py")]
    if "\nif not __package__" in path.read_text()
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_pipelines_before_anything_that_imports_torch(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            names.append((node.lineno, name.partition(".")[0]))
    installed = [name for _, name in sorted(names)]
    with_torch = [installed.index(name) for name in ("torch", "torchvision", "timm", "trainer") if name in installed]
    assert installed.index("pipelines") < min(with_torch, default=len(installed))
