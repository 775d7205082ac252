"""What a setting is stands at its field: each is changed in turn, and the trainer treats it as the field says."""

import dataclasses
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from pipelines.common.settings import natures
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import synthetic_index
from trainer.config.cli import to_dict
from trainer.config.natures import setting_natures, shared_settings
from trainer.config.recipe import audit
from trainer.config.sections import Config, OtherTeacher
from trainer.state.checkpoint_settings import changes, check_same_plan

NATURES = setting_natures()
PLAN = TrainPlan(synthetic_index(2048, 10), Config().augment, 0, 1024, 224, (0, 0, 0)).describe()
# What a run writes into its plan beside TrainPlan.describe(), and what of that no setting decides.
OF_STUDENT, OF_DATA = {"student.name", "student.kwargs"}, {"plan_version", "dataset", "fill"}


def with_value(key: str, value: object) -> Config:
    """The default configuration with any value for a setting, also one that it does not take."""
    section, name = key.split(".")
    part = dataclasses.replace(getattr(Config(), section))
    object.__setattr__(part, name, value)
    return dataclasses.replace(Config(), **{section: part})


def test_every_setting_has_a_nature():
    assert list(NATURES) == [f"{section}.{name}" for section, values in to_dict(Config()).items() for name in values]


@pytest.mark.parametrize("key", NATURES)
def test_a_setting_is_what_its_field_says(key):
    nature, other = NATURES[key], with_value(key, [] if key == "teacher.others" else "changed")
    if key == "teacher.others":
        object.__setattr__(other.teacher, "others", [OtherTeacher("resnet18")])
    saved, current = to_dict(Config()), to_dict(other)
    assert bool(audit(other)) == nature.recipe
    assert (shared_settings(other) == shared_settings(Config())) == nature.per_machine
    assert bool(changes(saved, current)) == (nature.on_resume == "reported")
    assert bool(nature.plan_field) == (nature.on_resume == "refused")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(OtherTeacher)])
def test_a_further_teacher_has_the_nature_of_the_first(name):
    assert natures(OtherTeacher)[name].per_machine == NATURES[f"teacher.{name}"].per_machine
    first, second = (dataclasses.replace(OtherTeacher("resnet18"), **{name: value}) for value in VALUES[name])
    shared = [shared_settings(with_value("teacher.others", [teacher])) for teacher in (first, second)]
    assert (shared[0] == shared[1]) == NATURES[f"teacher.{name}"].per_machine


VALUES = {
    "name": ("resnet18", "resnet34"),
    "checkpoint": (None, Path("x.pt")),
    "kwargs": ({}, {"drop_rate": 0.1}),
    "image_size": (0, 64),
    "classes": (None, Path("x.txt")),
}


def test_the_settings_that_are_refused_are_what_a_plan_is_made_of():
    decided = {nature.plan_field for nature in NATURES.values() if nature.plan_field}
    assert decided == {*PLAN, *OF_STUDENT} - OF_DATA


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("seed", "run.seed"),
        ("window_shards", r"window_shards \(from data.shuffle and data.window_shards\)"),
        ("augment.flip", "augment.flip"),
        ("dataset", "dataset"),
    ],
)
def test_the_error_about_another_plan_names_the_settings(field, settings):
    with pytest.raises(UserError, match=f"^x.pt: belongs to another plan: {settings} was 7, now it is"):
        check_same_plan(Path("x.pt"), {**PLAN, field: 7}, PLAN)
