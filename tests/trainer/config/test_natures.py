"""What a setting is stands at its field: each is changed in turn, and the trainer treats it as the field says."""

from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import synthetic_index
from trainer.config.natures import setting_natures, shared_settings
from trainer.config.recipe import audit
from trainer.config.sections import Config, OtherTeacher, to_dict
from trainer.state.checkpoint_settings import changes, check_same_plan

NATURES = setting_natures()
PLAN = TrainPlan(synthetic_index(2048, 10), Config().augment, 0, 1024, 224, (0, 0, 0)).describe()
# What a run writes into its plan beside TrainPlan.describe(), and what of that no setting decides.
OF_STUDENT, OF_DATA = {"student.name", "student.kwargs", "student.seed"}, {"plan_version", "dataset"}


def with_value(key: str, value: object) -> Config:
    """The default configuration with any value for a setting, also one that it does not take."""
    config = Config()
    section, name = key.split(".")
    object.__setattr__(getattr(config, section), name, value)
    return config


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


def test_machines_may_have_the_weights_of_a_further_teacher_elsewhere_and_no_other_teacher():
    here, there, other = (
        shared_settings(with_value("teacher.others", [OtherTeacher(name, Path(weights))]))
        for name, weights in (("resnet18", "a.pt"), ("resnet18", "b.pt"), ("resnet34", "a.pt"))
    )
    assert here == there != other


def test_the_settings_that_are_refused_are_what_a_plan_is_made_of():
    decided = {nature.plan_field for nature in NATURES.values() if nature.plan_field}
    assert decided == {*PLAN, *OF_STUDENT} - OF_DATA


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("seed", "run.seed"),
        ("window_shards", r"window_shards \(from data.shuffle and data.window_shards\)"),
        ("augment.flip", "augment.flip"),
        ("fill", "augment.fill"),
        ("augment.cycle_epochs", "augment.cycle_epochs"),
        ("dataset", "dataset"),
    ],
)
def test_the_error_about_another_plan_names_the_settings(field, settings):
    with pytest.raises(UserError, match=f"^x.pt: belongs to another run: {settings} was 7, now it is"):
        check_same_plan(Path("x.pt"), {**PLAN, field: 7}, PLAN)
