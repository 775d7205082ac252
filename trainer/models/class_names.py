"""Names of classes: files that list them, and where a dataset's lie among a model's outputs."""

import collections
from pathlib import Path

from pipelines.common.errors import UserError, reason_of
from pipelines.shards.manifest import class_order_doubt, read_manifest


def class_order(names: list[str], listed: list[str], source: Path | str) -> list[int]:
    """Where each of the dataset's classes lies in a model's list.

    Args:
      names: the dataset's, in the order of the labels.
      listed: the model's, in the order of its outputs; `source` is the file that they come from.
    Returns:
      for each of `names` its index in `listed`.
    Raises:
      UserError: a name is not in the list, or twice; the first one in the dataset's order is named.
    """
    if names == listed:  # Every class has its output, even where two have one name.
        return list(range(len(names)))
    counts = collections.Counter(listed)
    for name in names:
        if counts[name] != 1:
            raise UserError(
                f"{source}: class '{name}' of the dataset is {counts[name]} times among the model's {len(listed)}, not "
                "once. Name all outputs in a file (option classes) as the dataset's manifest.json does, or use a model "
                "of these classes"
            )
    outputs = {name: output for output, name in enumerate(listed)}
    return [outputs[name] for name in names]


def order_doubt(root: Path | None) -> str:
    """One sentence where the order of a dataset's classes was not stated and may be doubted; "" where it is certain."""
    return class_order_doubt(read_manifest(root)) if root is not None else ""


def check_order_stated(doubt: str, source: Path | str) -> None:
    """Raise a UserError if outputs without names meet a dataset whose order of classes is in doubt.

    Args:
      doubt: as `order_doubt`.
      source: the weights, for the message.
    """
    if doubt:
        raise UserError(
            f"{source}: its outputs have no names, and {doubt}. Name the outputs in a file (option classes), or build "
            "the dataset with --class-order text or numeric"
        )


def read_classes(path: Path) -> list[str]:
    """The names in a text file, one on a line; empty lines at the end do not count.

    Raises:
      UserError: the file cannot be read, or has an empty line between names.
    """
    try:
        # Editors on Windows begin a file with a byte order mark, which utf-8-sig removes.
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}). It should name one class on a line") from error
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty. It should name one class on a line")
    return names
