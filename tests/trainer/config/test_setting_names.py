"""Advice about settings: as arguments in backquotes until a command says how they are typed."""

import pickle

import pytest

from trainer.config.setting_names import SettingError, prefix_of, spelling_settings


def fail():
    raise SettingError("w.pth: has no name", lambda spelled: f"Give it with {spelled('name') or 'another file'}")


@pytest.mark.parametrize(
    ("section", "lacking", "advice"),
    [
        ("student", (), "Give it with --student.name"),
        ("teacher.others[1]", (), "Give it with teacher.others[1].name"),
        ("student", ("name",), "Give it with another file"),
    ],
)
def test_a_command_spells_the_settings_of_the_advice(section, lacking, advice):
    with pytest.raises(SettingError) as error, spelling_settings(prefix_of(section), lacking=lacking):
        fail()
    assert str(error.value) == f"w.pth: has no name. {advice}"


def test_without_a_command_the_settings_are_arguments():
    with pytest.raises(SettingError, match="^w.pth: has no name. Give it with `name`$"):
        fail()


def test_the_message_of_an_error_reaches_another_process():
    with pytest.raises(SettingError) as error:
        fail()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
