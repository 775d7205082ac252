"""What differs from the published recipe: every setting that the USI scheme fixes, beside the one in use."""

import dataclasses

from docstring_parser import parse as parse_docstring

from trainer.config import Config, to_dict

# Settings outside these concern where and how fast a run goes on, not what it computes.
_FIXED = (
    *("augment", "teacher.name", "teacher.kwargs", "student.kwargs", "distill", "optim", "schedule", "ema"),
    *("data.image_size", "data.eval_image_size", "data.eval_crop_pct", "data.shuffle"),
    *("run.global_batch", "run.micro_batch", "run.precision"),
)


def audit(config: Config) -> list[dict]:
    """The settings that differ from USI, in the order of the configuration.

    Returns:
      for each {"key": "section.name", "usi": its value in the recipe, "here": the one in use, "meaning": what the
      setting is}; [] for the recipe itself, which is what all defaults are (docs/recipe.md).
    """
    usi, here = to_dict(Config()), to_dict(config)
    return [
        {"key": f"{section}.{name}", "usi": usi[section][name], "here": value, "meaning": _meaning(section, name)}
        for section, values in here.items()
        for name, value in values.items()
        if (section in _FIXED or f"{section}.{name}" in _FIXED) and value != usi[section][name]
    ]


def audit_table(deviations: list[dict]) -> str:
    """The list as lines for people."""
    if not deviations:
        return "every setting is the one of the USI recipe"
    rows = [f"  {d['key']}: USI {d['usi']}, here {d['here']}\n      {d['meaning']}" for d in deviations]
    return "\n".join([f"{len(deviations)} settings differ from the USI recipe:", *rows])


def _meaning(section: str, name: str) -> str:
    """What the configuration's own documentation says of a setting."""
    (field,) = (field for field in dataclasses.fields(Config) if field.name == section)
    described = {param.arg_name: param.description for param in parse_docstring(field.default_factory.__doc__).params}
    return " ".join(described[name].split())
