"""Names of classes: files that list them, and where a dataset's lie among a model's outputs."""

import collections
import re
from pathlib import Path

from pipelines.errors import UserError


def class_order(names: list[str], listed: list[str], source: Path | str, key: str) -> list[int]:
    """Where each of the dataset's classes lies in a model's list.

    Args:
      names: the dataset's, in the order of the labels.
      listed: the model's, in the order of its outputs; `source` is the file that they come from.
      key: of the model in the configuration, for errors: student, teacher, teacher.others[1].
    Returns:
      for each of `names` its place in `listed`.
    Raises:
      UserError: a name is not in the list, or twice; the first one in the dataset's order is named.
    """
    counts, owner = collections.Counter(listed), re.split(r"\W", key)[0]
    for name in names:
        if counts[name] > 1:
            first = listed.index(name)
            raise UserError(
                f"{source}: class '{name}' is named {counts[name]} times, for the outputs {first} and "
                f"{listed.index(name, first + 1)} (the first is 0). Every output needs a name of its own"
            )
        if not counts[name]:
            raise UserError(
                f"{source}: class '{name}' of the dataset is not among the {owner}'s {len(listed)}. Name its outputs "
                f"as the dataset's manifest.json does in a file for {key}.classes, or use a {owner} that knows them all"
            )
    places = {name: place for place, name in enumerate(listed)}
    return [places[name] for name in names]


def read_classes(path: Path) -> list[str]:
    """The names in a text file, one on a line; empty lines at the end do not count.

    Raises:
      UserError: the file cannot be read, holds nothing, or has an empty line between names.
    """
    try:
        # utf-8-sig: editors on Windows begin a file with a byte order mark
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). It should name one class on a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error}). It should name one class on a line") from error
    if names == [""]:
        raise UserError(f"{path}: is empty. It should name one class on a line")
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty. Every output needs a name")
    return names
