"""What differs from the published recipe: every setting that the USI scheme fixes, beside the one in use."""

from collections.abc import Iterable

from docstring_parser import parse as parse_docstring

from trainer.config.natures import section_types, setting_natures
from trainer.config.paper import paper_arguments
from trainer.config.sections import Config, to_dict

# Where the recipe's own file leaves the authors' code on purpose: key -> what the authors' code does, and why not here.
_ON_PURPOSE = {
    "run.batch_norm": (
        "broadcast",
        "the authors' code keeps the statistics of rank 0's images (broadcast); the mean over all ranks has the same "
        "expectation and less variance, and does not depend on their number",
    )
}


def audit(config: Config) -> list[dict]:
    """The settings that differ from USI, in the order of the configuration.

    Returns:
      for each {"key": "section.name", "usi": its value in the recipe, "here": the one in use, "meaning": what the
      setting is}; [] for the recipe itself, which is what all defaults are (docs/recipe.md).
    """
    usi, here, natures = to_dict(Config()), to_dict(config), setting_natures()
    rows = []
    for section, values in here.items():
        for name, value in values.items():
            key, alike = f"{section}.{name}", [usi[section][name]]
            if natures[key].recipe and value not in alike + _authors(key, config):
                rows.append({"key": key, "usi": alike[0], "here": value, "meaning": _meaning(section, name)})
    return rows


def are_audit_rows(rows: Iterable[object]) -> bool:
    """Return whether every row has the keys that `audit` writes."""
    return all(isinstance(row, dict) and {"key", "usi", "here", "meaning"} <= row.keys() for row in rows)


def audit_table(config: Config) -> str:
    """The settings that differ from USI, and those that this project chose otherwise, as lines for people."""
    deviations, usi, here = audit(config), to_dict(Config()), to_dict(config)
    lines = [f"{len(deviations)} settings differ from the USI recipe:"]
    lines += [f"  {d['key']}: USI {d['usi']}, here {d['here']}\n      {d['meaning']}" for d in deviations]
    if not deviations:
        lines = ["every setting is the one of the USI recipe"]
    for key, (_, why) in _ON_PURPOSE.items():
        section, name = key.split(".")
        if here[section][name] == usi[section][name]:
            lines.append(f"on purpose, {key} is {here[section][name]}:\n      {why}")
    return "\n".join(lines)


def _authors(key: str, config: Config) -> list:
    """Return the value that the authors' code has, if it is not the one of the recipe here; otherwise an empty list."""
    if key == "student.kwargs":  # the paper's model, where the installed timm has another one under its name
        return [paper_arguments(config.student.name)]
    return [_ON_PURPOSE[key][0]] if key in _ON_PURPOSE else []


def _meaning(section: str, name: str) -> str:
    """What the configuration's own documentation says of a setting."""
    described = {
        param.arg_name: param.description for param in parse_docstring(section_types()[section].__doc__).params
    }
    return " ".join((described[name] or "").split())
