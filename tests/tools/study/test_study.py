"""python tools/study.py: what it refuses before anything runs, what it prints, and a whole study."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from pipelines.common.files import locked
from support.tiny_runs import assert_same_end
from tools import study
from tools.lib.study import checks, dry_run
from tools.lib.study.graph import read_graph
from tools.lib.study.stage import Stage

DEMO_CONFIG = str(REPOSITORY / "configs" / "demo.yaml")
SHORT = {"schedule.epochs": 2, "schedule.warmup_epochs": 1, "schedule.cooldown_epochs": 0, "run.device": "cpu"}


def write_study(folder: Path, digits: Path, **changed) -> Path:
    content = {
        "dataset": str(digits),
        "recipe": {"config": DEMO_CONFIG, "overrides": SHORT},
        "teacher": {"name": "test_resnet", "train": {}},
        "students": ["test_byobnet", {"name": "test_vit", "seeds": [0, 1]}],
        "evaluate": {"weights": ["ema"]},
        **changed,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        study.main([str(each) for each in arguments])
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"students": ["test_bit"]}, "study.yaml: students[0]: unknown model 'test_bit'; did you mean test_vit"),
        ({"teacher": {"name": "nobody"}}, "study.yaml: teacher: unknown model 'nobody'"),
        (
            {"teacher": {"name": "test_resnet"}},
            "study.yaml: teacher: timm's weights of 'test_resnet': its weights have 1000 classes, the dataset has 10. ",
        ),
        (
            {"teacher": {"name": "test_resnet"}, "source": "digits", "dataset": None},
            "study.yaml: teacher: timm's weights of 'test_resnet': its weights have 1000 classes, the dataset has 10. ",
        ),
        (
            {"students": ["test_vit", {"name": "test_byobnet", "overrides": {"run.micro_batch": 3}}]},
            "study.yaml: students[1]: run.micro_batch is 3; give an even number",
        ),
        (
            {
                "teacher": {"name": "test_resnet", "train": {"run.global_batch": 48}},
                "source": "digits",
                "dataset": None,
            },
            "study.yaml: teacher.train: run.global_batch is 48; it must be a multiple of augment.mix_group, 32",
        ),
        ({"teacher": {"name": "test_resnet", "train": {"run.global_batch": 3200}}}, "teacher.train: "),
        (
            {"students": [{"name": "test_vit", "kwargs": {"img_size": 64, "dynamic_img_size": False}}]},
            "cannot take images of 32 px",
        ),
        ({"teacher": {"name": "test_resnet", "codec": "int7"}}, "int7"),
        (
            {
                **{
                    "dataset": None,
                    "source": str(REPOSITORY / "docs"),
                },  # As long as there are no shards, of 1,000 classes.
                "teacher": {"name": "test_resnet", "train": {}, "codec": "top8"},
                "recipe": {"config": DEMO_CONFIG, "overrides": {**SHORT, "distill.temperature": 2}},
            },
            "study.yaml: teacher: codec top8 serves distill.temperature 1 alone. Use int8, or that",
        ),
        ({"teacher": {"name": "test_resnet", "checkpoint": "/no.pth"}}, "study.yaml: teacher: /no.pth: "),
        (
            {"students": [{"name": "test_vit", "overrides": {"student.checkpoint": "/no.pth"}}]},
            "students[0]: /no.pth: ",
        ),
        ({"dataset": "nowhere"}, "nowhere is not a finished dataset"),
        ({"dataset": None, "source": "nowhere"}, "study.yaml: source is nowhere: not found"),
    ],
    ids=range(14),
)
def test_a_mistake_ends_the_command_with_one_line_before_anything_runs(tmp_path, out, digits, capsys, changed, message):
    line = error_of(capsys, write_study(tmp_path, digits, **changed), "--out", out)
    assert message in line and line.count("\n") == 1 and not out.exists()


def test_too_little_room_on_the_disk_is_noticed_before_anything_runs(tmp_path, out, digits, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    line = error_of(capsys, write_study(tmp_path, digits), "--out", out)
    # A store of 2 epochs of 320 images, and 10 values of 4 bytes for each of about 1.2 million parameters.
    assert "the study needs about 47" in line and "its disk has 1 kB left. Make room there" in line and not out.exists()


def test_what_a_stopped_study_has_written_is_not_asked_for_again(tmp_path, out, digits, monkeypatch):
    graph = read_graph(write_study(tmp_path, digits), out)
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    *others, last = [graph.common["store"], graph.common["teacher"], *(each.train for each in graph.students)]

    def write(stage: Stage, num_bytes: int) -> None:
        stage.product.mkdir(parents=True, exist_ok=True)
        (stage.product / "part").write_bytes(bytes(num_bytes))

    for stage in others:
        write(stage, 20_000_000)  # More than a stage needs, which is no room for another one.
    with pytest.raises(UserError, match="the study needs about 12 MB more for"):
        checks.check_study(graph)
    write(last, 10_000_000)
    with pytest.raises(UserError, match="the study needs about 2.03 MB more for"):
        checks.check_study(graph)
    write(last, 20_000_000)
    checks.check_study(graph)


def test_only_one_study_runs_in_a_folder(tmp_path, out, digits, capsys):
    out.mkdir()
    with locked(out / ".lock", "test"):
        assert f"{out}: another study is running there. Wait for it" in error_of(
            capsys, write_study(tmp_path, digits), "--out", out
        )


def test_a_dry_run_lists_stages_and_writes_nothing(tmp_path, out, digits, capsys):
    unflipped = {"name": "test_efficientnet", "overrides": {"augment.flip": 0}}
    file = write_study(tmp_path, digits, students=["test_byobnet", {"name": "test_vit", "seeds": [0, 1]}, unflipped])
    study.main([str(file), "--out", str(out), "--dry-run", "--seconds", "0"])
    shown = capsys.readouterr().out
    assert "\ntrain test_vit-s1: to do; needs store\n" in shown and "teacher: to do\n" in shown
    assert "\ntrain test_efficientnet-s0: to do; needs teacher\n" in shown
    assert "\ntest_efficientnet-s0: from the live teacher, because no recording fits the settings\n" in shown
    assert "\nto be done: 14 of 14 stages, and the report\n" in shown and not out.exists()
    assert re.search(r"^it needs about [\d.]+ MB more on the disk$", shown, re.MULTILINE)
    study.main([str(write_study(tmp_path, digits, together=3)), "--out", str(out), "--dry-run", "--seconds", "0"])
    others = "together with train test_byobnet-s0, train test_vit-s0"
    assert f"\ntrain test_vit-s1: to do; needs store; {others}\n" in capsys.readouterr().out


def test_one_line_says_which_stages_a_changed_setting_does_again(tmp_path, out, digits, capsys):
    stages = read_graph(write_study(tmp_path, digits), out).stages
    for stage in stages:
        stage.note()
    faster = {"config": DEMO_CONFIG, "overrides": {**SHORT, "optim.lr": 0.001}}
    study.main([str(write_study(tmp_path, digits, recipe=faster)), "--out", str(out), "--dry-run", "--seconds", "0"])
    line = "optim.lr 0.002 -> 0.001: does 11 of 11 stages again: teacher, store, train test_byobnet-s0, evaluate ema "
    assert capsys.readouterr().out.count(f"\n{line}test_byobnet-s0 and 7 more\n") == 1


def test_a_dry_run_shows_how_long_a_stage_has_taken_with_another_seed_and_measures_others(
    tmp_path, out, digits, capsys, monkeypatch
):
    file = write_study(tmp_path, digits)
    student = read_graph(file, out).students[1]
    for one in (student.train, student.evaluations["ema"]):
        one.product.mkdir(parents=True)
        one.note(done=True, seconds=12.0)
    (student.train.product / "summary.json").write_text('{"finished": true}')
    monkeypatch.setattr(dry_run, "estimate", lambda stage, seconds: f"{seconds:g} min of {stage.name}")
    study.main([str(file), "--out", str(out), "--dry-run", "--seconds", "2"])
    shown = capsys.readouterr().out
    assert "\ntrain test_vit-s1: to do; took 12 s with another seed; needs store\n" in shown
    assert "\ntrain test_byobnet-s0: to do; takes 2 min of train test_byobnet-s0; needs store\n" in shown
    assert "\nevaluate ema test_vit-s1: to do; took 12 s with another seed; needs train test_vit-s1\n" in shown
    assert "evaluate ema test_vit-s0: done in 12 s\n" in shown and "test_byobnet-s0: to do; needs" in shown


def test_a_report_alone_runs_nothing_and_shows_the_state_of_all_stages(tmp_path, out, digits, capsys):
    file = write_study(tmp_path, digits)
    assert f"{out}: has nothing of this study. Name its folder" in error_of(capsys, file, "--out", out, "--report")
    assert not out.exists()
    read_graph(file, out).common["teacher"].note(failure="exit code 1: no room")
    with pytest.raises(SystemExit) as ended:
        study.main([str(file), "--out", str(out), "--report"])
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and f"report: {out / 'index.html'}\n" in shown and not (out / "train").exists()
    assert re.search(r"^ *test_vit-s1 +to do +to do +to do *$", shown, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--slurm", "gpus"], []])
def test_wrong_options_are_refused(tmp_path, arguments):
    out = ["--out", str(tmp_path / "out")] if arguments else []
    with pytest.raises(SystemExit) as ended:
        study.main([str(tmp_path / "study.yaml"), *out, *arguments])
    assert ended.value.code == 2


@pytest.mark.long
def test_a_study_that_lost_a_student_at_first_ends_as_one_that_did_not(tmp_path, digits, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    broken = {"name": "test_vit", "seeds": [0, 1], "overrides": {"optim.lr": 2e9, "schedule.warmup_epochs": 0}}
    file = write_study(tmp_path, digits, students=["test_byobnet", broken])
    with pytest.raises(SystemExit) as ended:
        study.main([str(file), "--out", str(one)])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "train test_vit-s0: failed, exit code 1: error: " in shown and "export test_byobnet-s0: done in" in shown
    assert "report: " in shown and "test_vit" in (one / "index.html").read_text()
    file = write_study(tmp_path, digits)
    for out in (one, two):
        study.main([str(file), "--out", str(out)])
    finished = {
        out: {run.parent.parent.name: run.parent for run in out.glob("train/*/run/summary.json")} for out in (one, two)
    }
    for name, run in finished[two].items():
        assert_same_end(finished[one][name], run)
    assert len(finished[two]) == 3
