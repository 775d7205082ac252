"""What each setting is to a run, by SECTION.NAME, as the fields of the sections say it (settings.Setting)."""

import functools
from typing import Any

from pipelines.common.settings import Setting, natures
from trainer.config.cli import sections_of
from trainer.config.sections import Config, OtherTeacher, to_dict


def section_types() -> dict[str, Any]:
    """The dataclass of each section of a run's configuration by its name."""
    return sections_of(Config)


@functools.cache
def setting_natures() -> dict[str, Setting]:
    """The nature of every setting, by SECTION.NAME, in the order of the configuration."""
    kinds = section_types().items()
    return {f"{key}.{name}": nature for key, kind in kinds for name, nature in natures(kind).items()}


def settings_of_plan_field(name: str) -> str:
    """The setting that decides a field of TrainPlan.describe(), for messages; several are listed behind the field."""
    settings = [key for key, nature in setting_natures().items() if nature.plan_field == name]
    return f"{name} (from {' and '.join(settings)})" if len(settings) > 1 else (settings or [name])[0]


def flat(config: Config) -> dict[str, Any]:
    """The configuration as plain values by SECTION.NAME."""
    return {f"{section}.{name}": value for section, values in to_dict(config).items() for name, value in values.items()}


def shared_settings(config: Config) -> dict[str, Any]:
    """What the machines of a run must have in common, as plain values by SECTION.NAME."""
    nature_of, nature_of_item = setting_natures(), natures(OtherTeacher)
    found = {key: value for key, value in flat(config).items() if not nature_of[key].per_machine}
    found["teacher.others"] = [
        {name: value for name, value in other.items() if not nature_of_item[name].per_machine}
        for other in found["teacher.others"]
    ]
    return found


def plan_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which images a student sees, in which order, as plain values by SECTION.NAME."""
    of_plan = {key for key, nature in setting_natures().items() if nature.plan_field and not key.startswith("student.")}
    return {key: value for key, value in flat(config).items() if key in of_plan}
