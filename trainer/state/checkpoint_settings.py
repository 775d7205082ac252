"""What a checkpoint says of the run that wrote it, its settings above all, beside what holds for the present one."""

from collections.abc import Iterable
from pathlib import Path

from pipelines import PIXELS_VERSION
from pipelines.common.errors import UserError
from pipelines.common.machine import package_versions
from trainer.config.sections import Config, to_dict
from trainer.models.checkpoint_format import wrong_setting


def changes(saved: dict, current: dict) -> list[str]:
    """What of the training differs from the checkpoint's configuration, in words."""
    keys = [
        (section, name) for section in ("teacher", "distill", "optim", "schedule", "ema") for name in current[section]
    ]
    keys += [
        ("data", "pipeline"),
        ("data", "decode"),
        ("data", "hw_decoder_load"),
        *(("run", name) for name in ("precision", "tf32", "batch_norm")),
        ("run", "micro_batch"),
    ]
    before = with_defaults(saved)
    return [
        f"{section}.{name} was {before[section][name]}, now it is {current[section][name]}"
        for section, name in keys
        if before[section][name] != current[section][name]
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


def software() -> dict[str, str]:
    """What pixels and gradients depend on in their last bits."""
    return {"pipelines": str(PIXELS_VERSION), **package_versions()}


def newer_software(saved: dict[str, str]) -> list[str]:
    """Which versions differ from those that a checkpoint was written with, a sentence each."""
    return [
        f"{name} was {saved[name]}, now it is {present}: pixels or gradients may differ in their last bits"
        for name, present in software().items()
        if saved.get(name, present) != present
    ]


# Fields of a plan that are a setting under another name.
_KEYS = {
    "seed": "run.seed",
    "global_batch": "run.global_batch",
    "image_size": "data.image_size",
    "window_shards": "data.window_shards (0 is data.shuffle global)",
}


def check_same_plan(path: Path, saved: dict, current: dict) -> None:
    """Raise a UserError that names the first field in which two plans differ."""
    for name in [*current, *(name for name in saved if name not in current)]:
        if saved.get(name) != current.get(name):
            key = _KEYS.get(name, name)
            raise UserError(
                f"{path}: belongs to another plan: {key} was {saved.get(name)}, now it is {current.get(name)}. "
                "Use the same settings and data, or start a new run with another --run.out"
            )
