"""The files in configs/recipes: each is accepted, says only what differs from the recipe, and can be trained with."""

from pathlib import Path

import pytest
import torch
import yaml

from conftest import REPOSITORY, train_here
from support.documented import commands
from trainer.config.recipe import audit
from trainer.config.sections import parse

RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))


def keys(path: Path) -> set[str]:
    """The settings that a file names."""
    return {f"{section}.{name}" for section, values in yaml.safe_load(path.read_text()).items() for name in values}


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"fine_tune", "labels_only", "short"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_exactly_the_settings_in_which_it_differs_from_usi(path):
    assert {row["key"] for row in audit(parse(["--config", str(path)]))} == keys(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_its_cost_and_its_result(path):
    """test_documented_commands.py parses the command."""
    comment = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    name = str(path.relative_to(REPOSITORY))
    assert [shown for shown in commands() if shown.where.startswith(name) and f"--config {name} " in shown.text]
    assert any(line.startswith("# Cost: ") for line in comment) and any("ccuracy: " in line for line in comment)


def test_a_student_learns_from_labels_alone_by_the_recipe_for_that(digits, tmp_path):
    summary = train_here(digits, tmp_path / "run", *recipe("labels_only"), "--run.stop_after_steps", 3)
    assert summary["step"] == 3 and "teacher.name" in {row["key"] for row in summary["deviations"]}


def test_fine_tuning_starts_from_the_weights_that_are_given(digits, tiny_run, tmp_path):
    """With a learning rate of 0 they are what the run ends with."""
    best = tiny_run / "checkpoints" / "best.pt"
    start = ["--student.checkpoint", best, "--optim.lr", 0, "--schedule.warmup_lr", 0, "--schedule.min_lr", 0]
    train_here(digits, tmp_path / "run", *recipe("fine_tune"), *start, "--run.stop_after_steps", 2)
    before = torch.load(best, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "run" / "checkpoints" / "step-00000002.pt", weights_only=True)["student"]
    weights = [name for name, value in before.items() if value.is_floating_point() and "running" not in name]
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)


def recipe(name: str) -> list:
    """A recipe for a dataset and a model that are tiny, which `train_here` names first: the file must not undo that."""
    sizes = ["--run.global_batch", 64, "--augment.mix_group", 32, "--ema.decay", 0.9]
    return ["--config", REPOSITORY / "configs" / "recipes" / f"{name}.yaml", *sizes]
