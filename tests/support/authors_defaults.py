"""The table in docs/recipe.md of the authors' command line: what they have, and what stands for it here."""

import ast
import dataclasses
import re

import yaml

from support.processes import REPOSITORY

ABSENT = "does not exist"


@dataclasses.dataclass(frozen=True)
class Default:
    """A row of the table.

    Attributes:
      name: the authors' option, without the dashes in front.
      value: its default; ... where there is none.
      ours: our settings, "section.key" -> value.
      settings: the cell's text.
      same: "yes" or "no".
      why: the reason why it is the same or not.
    """

    name: str
    value: object
    ours: dict[str, object]
    settings: str
    same: str
    why: str


def table() -> list[Default]:
    """All rows, in order."""
    text = (REPOSITORY / "docs" / "recipe.md").read_text()
    section = text.partition("## Every default of the authors' command line")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (\w+) \| ?(.*?) ?\|$", section, re.MULTILINE)
    return [
        Default(
            name=name,
            value=... if value == "required" else ast.literal_eval(value.strip("`")),
            ours={key: yaml.safe_load(said) for key, said in re.findall(r"`([a-z]+\.\w+): ([^`]+)`", settings)},
            settings=settings,
            same=same,
            why=why,
        )
        for name, value, settings, same, why in rows
    ]
