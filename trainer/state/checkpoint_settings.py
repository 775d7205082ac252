"""What a checkpoint says of the run that wrote it, its settings above all, beside what holds for the present one."""

from collections.abc import Iterable
from pathlib import Path

from pipelines.common.errors import UserError
from trainer.config.natures import setting_natures, settings_of_plan_field
from trainer.config.sections import Config, to_dict
from trainer.models.checkpoint_format import wrong_setting


def changes(saved: dict, current: dict) -> list[str]:
    """What of the training differs from the checkpoint's configuration, in words."""
    before = with_defaults(saved)
    found = []
    for key, nature in setting_natures().items():
        section, name = key.split(".")
        if nature.on_resume == "reported" and before[section][name] != current[section][name]:
            found.append(f"{key} was {before[section][name]}, now it is {current[section][name]}")
    return found


def store_changes(saved: dict[str, dict], current: dict[str, dict]) -> list[str]:
    """What the stores of recorded teachers were recorded from, where it differs from the checkpoint's, in words.

    Another store may lie at the same path. Whether a teacher has a store at all is a setting, as in `changes`.

    Args:
      saved, current: TrainState.stores.
    """
    return [
        f"{key}.store was recorded with {name} {saved[key].get(name)}, now it is recorded with {value}"
        for key, facts in current.items()
        for name, value in facts.items()
        if key in saved and saved[key].get(name) != value
    ]


def check_settings(path: Path | str, config: dict, names: Iterable[str]) -> None:
    """Raise a UserError if one of the settings that are to be used from a checkpoint is of another type here.

    Args:
      names: SECTION.NAME of each.
    """
    if setting := wrong_setting(config, names):
        raise UserError(
            f"{path}: written by another version: it holds {setting}, which that setting cannot be here. Use the "
            "version of the program that wrote it, or give a file of another run"
        )


def with_defaults(saved: dict) -> dict:
    """A checkpoint's configuration with every setting: one that is younger than the file had its default then."""
    filled = {section: {**values, **saved.get(section, {})} for section, values in to_dict(Config()).items()}
    return {**saved, **filled}


def check_same_plan(path: Path, saved: dict, current: dict) -> None:
    """Raise a UserError that names the first field in which two plans differ."""
    for name in [*current, *(name for name in saved if name not in current)]:
        if saved.get(name) != current.get(name):
            raise UserError(
                f"{path}: belongs to another run: {settings_of_plan_field(name)} was {saved.get(name)}, now it is "
                f"{current.get(name)}. Use the same settings and data, or start a new run with another --run.out"
            )
