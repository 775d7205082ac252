"""A run that is resumed under other settings: some are reported, some refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import DROPOUT, TINY, train_here
from pipelines.common.errors import UserError
from pipelines.plan.plan import BEFORE
from support.tiny_runs import ONE, assert_equal_states
from tools.lib.shards.build import BuildOptions
from tools.lib.shards.build import build as build_dataset
from trainer.builder import build
from trainer.config.sections import parse
from trainer.loop import train
from trainer.state.checkpoint_settings import check_same_plan


def test_changes_of_these_settings_are_reported(digits, tmp_path):
    arguments = [*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]
    train(build(parse([*arguments, "--run.stop_after_steps", "1"]), ONE))
    changed = {"optim.clip_agc": "0.01", "ema.warmup": "true", "run.batch_norm": "none", "run.tf32": "false"}
    more = [text for key, value in changed.items() for text in (f"--{key}", value)]
    prefix = "changed since the checkpoint: "
    assert [note.removeprefix(prefix) for note in build(parse([*arguments, *more]), ONE).notes] == [
        "optim.clip_agc was 0.0, now it is 0.01",
        "ema.warmup was False, now it is True",
        "run.tf32 was True, now it is False",
        "run.batch_norm was reduce, now it is none",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not {"run.tf32", "run.batch_norm"} & {deviation["key"] for deviation in summary["deviations"]}


def test_a_checkpoint_from_before_a_setting_existed_resumes_with_its_default(digits, tmp_path):
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    for name in BEFORE:
        del content["plan"][name]
    del content["config"]["distill"]["label_smoothing"]
    for name in ("digest", "evaluated", "best", "micro_batch"):
        del content[name]
    torch.save(content, path)
    arguments = [*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]
    assert build(parse(arguments), ONE).notes == []
    smooth = build(parse([*arguments, "--distill.label_smoothing", "0.1"]), ONE)
    assert smooth.notes == ["changed since the checkpoint: distill.label_smoothing was 0.0, now it is 0.1"]
    with pytest.raises(
        UserError, match="belongs to another run: window_shards .*data.window_shards.* was 0, now it is 16"
    ):
        train_here(digits, tmp_path, "--data.shuffle", "window")
    assert train_here(digits, tmp_path, "--run.stop_after_steps", 3)["session"]["start_step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--augment.flip", "0.25"], r"augment.flip was 0.5, now it is 0.25. Use the same settings"),
        (["--run.seed", "1"], "seed was 0, now it is 1"),
        (["--student.kwargs.drop_rate", "0.3"], r"student.kwargs was \{'drop_rate': 0.2.*now it is \{'drop_rate': 0.3"),
        (["--student.seed", "1"], "student.seed was None, now it is 1"),
        (["--student.name", "test_vit"], "student.name was tiny_cnn, now it is test_vit"),
        (["--data.image_size", "64"], "image_size was 32, now it is 64"),
        (["--augment.fill", "[0,0,0]"], r"augment.fill was \[128, 128, 128\], now it is \[0, 0, 0\]. Use the same"),
        (["--augment.cycle_epochs", "2"], "augment.cycle_epochs was 0, now it is 2"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused_and_left_alone(digits, distilled, tmp_path, arguments, message):
    run = shutil.copytree(distilled, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-00000020.pt: belongs to another run: .*" + message):
        train_here(digits, run, *DROPOUT, *arguments)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("jobs_in_this_process")
def test_other_validation_images_are_reported_once(digits, digits_folder, tmp_path, capsys):
    shutil.copytree(digits_folder, tmp_path / "images")
    next((tmp_path / "images" / "val" / "3").iterdir()).unlink()
    build_dataset(tmp_path / "images", tmp_path / "fewer", BuildOptions(samples_per_shard=100))
    note = "the validation images have changed since step 5: accuracies before and after it cannot be compared"
    for root, steps, said in ((digits, 5, False), (tmp_path / "fewer", 6, True), (tmp_path / "fewer", 7, False)):
        train_here(root, tmp_path / "run", "--run.stop_after_steps", steps)
        assert (note in capsys.readouterr().out) is said, steps


def test_changed_settings_of_the_training_take_effect_and_are_reported(digits, tmp_path, capsys):
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    changed = ["--optim.weight_decay", "0.9", "--optim.betas", "[0.5,0.6]", "--schedule.epochs", 3]
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path), *map(str, changed)]), ONE)
    assert {group["weight_decay"] for group in run.state.optimizer.param_groups} == {0.0, 0.9}
    assert {group["betas"] for group in run.state.optimizer.param_groups} == {(0.5, 0.6)}
    assert all(torch.is_tensor(state["exp_avg"]) for state in run.state.optimizer.state.values())
    reported = {note.removeprefix("changed since the checkpoint: ") for note in run.notes}
    assert {"optim.weight_decay was 0.02, now it is 0.9", "schedule.epochs was 4, now it is 3"} <= reported
    train_here(digits, tmp_path, *changed, "--run.stop_after_steps", 3)
    assert "optim.weight_decay was 0.02, now it is 0.9" in capsys.readouterr().out


def test_an_ema_that_is_switched_on_later_starts_where_the_student_stands(digits, tmp_path):
    train_here(digits, tmp_path, "--ema.decay", 0, "--run.stop_after_steps", 2)
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]), ONE)
    assert_equal_states(dict(run.state.ema.module.state_dict()), dict(run.state.student.state_dict()))


def test_a_run_that_has_already_gone_further_is_refused(digits, tmp_path):
    train_here(digits, tmp_path, "--run.stop_after_steps", 11)
    with pytest.raises(UserError, match=r"has done 11 steps, this run ends after 10: raise schedule.epochs"):
        train_here(digits, tmp_path, "--schedule.epochs", 2)


def test_a_plan_with_a_field_less_differs():
    with pytest.raises(UserError, match="old was 1, now it is None"):
        check_same_plan(Path("x.pt"), {"seed": 0, "old": 1}, {"seed": 0})
