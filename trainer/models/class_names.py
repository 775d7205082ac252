"""Names of classes: files that list them, and where a dataset's lie among a model's outputs."""

import collections
import re
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.shards.manifest import class_order_doubt, read_manifest


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
    if names == listed:  # so every class has its place, even where two have one name
        return list(range(len(names)))
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


def order_doubt(root: Path | None) -> str:
    """One sentence where the order of a dataset's classes was not stated and may be doubted; "" where it is certain."""
    return class_order_doubt(read_manifest(root)) if root is not None else ""


def check_order_stated(doubt: str, source: Path | str, option: str) -> None:
    """Raise a UserError if outputs without names meet a dataset whose order of classes is in doubt.

    Args:
      doubt: as `order_doubt`.
      source: the weights, for the message.
      option: the setting that names their outputs, as it is typed; "" where there is none.
    """
    if doubt:
        name = f"name the outputs with {option} FILE, or " if option else ""
        raise UserError(
            f"{source}: its outputs have no names, and {doubt}. To settle it, {name}build the dataset with "
            "--class-order text or numeric"
        )


def listed_outputs(
    file: Path | None, own: list[str] | None, source: Path | str, key: str
) -> tuple[list[str] | None, Path | str]:
    """The names of a model's outputs, and where they were found.

    Args:
      file: names them, as the setting `key`.classes; own: those that the weights' file `source` holds itself.
    Returns:
      None as names where nothing names them.
    Raises:
      UserError: both name them, in different orders.
    """
    if file is None:
        return own, source
    listed = read_classes(file)
    if own and own != listed and sorted(own) == sorted(listed):
        raise UserError(
            f"{file}: names the classes in another order than {source}, which names its own. Leave {key}.classes out"
        )
    return listed, file


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
