"""Names of classes: files that list them, and where a dataset's lie among a model's outputs."""

import collections
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.shards.manifest import class_order_doubt, read_manifest
from trainer.config.setting_names import SettingError, Spelling


def class_order(names: list[str], listed: list[str], source: Path | str) -> list[int]:
    """Where each of the dataset's classes lies in a model's list.

    Args:
      names: the dataset's, in the order of the labels.
      listed: the model's, in the order of its outputs; `source` is the file that they come from.
    Returns:
      for each of `names` its index in `listed`.
    Raises:
      SettingError: a name is not in the list, or twice; the first one in the dataset's order is named.
    """
    if names == listed:  # Every class has its output, even where two have one name.
        return list(range(len(names)))
    counts = collections.Counter(listed)
    for name in names:
        if counts[name] > 1:
            first = listed.index(name)
            raise UserError(
                f"{source}: class '{name}' is named {counts[name]} times, for the outputs {first} and "
                f"{listed.index(name, first + 1)} (the first is 0). Every output needs a name of its own"
            )
        if not counts[name]:
            raise SettingError(
                f"{source}: class '{name}' of the dataset is not among the model's {len(listed)}", _advice_to_name_all
            )
    outputs = {name: output for output, name in enumerate(listed)}
    return [outputs[name] for name in names]


def _advice_to_name_all(spelled: Spelling) -> str:
    if classes := spelled("classes"):
        named = f"Name its outputs as the dataset's manifest.json does in a file for {classes}"
        return f"{named}, or use a model that knows them all"
    return "Use a model that knows them all"


def order_doubt(root: Path | None) -> str:
    """One sentence where the order of a dataset's classes was not stated and may be doubted; "" where it is certain."""
    return class_order_doubt(read_manifest(root)) if root is not None else ""


def check_order_stated(doubt: str, source: Path | str) -> None:
    """Raise a SettingError if outputs without names meet a dataset whose order of classes is in doubt.

    Args:
      doubt: as `order_doubt`.
      source: the weights, for the message.
    """

    def advice(spelled: Spelling) -> str:
        classes = spelled("classes")
        name = f"name the outputs with {classes} FILE, or " if classes else ""
        return f"To settle it, {name}build the dataset with --class-order text or numeric"

    if doubt:
        raise SettingError(f"{source}: its outputs have no names, and {doubt}", advice)


def listed_outputs(file: Path | None, own: list[str] | None, source: Path | str) -> tuple[list[str] | None, Path | str]:
    """The names of a model's outputs, and where they were found.

    Args:
      file: names them, as the setting `classes`; own: those that the weights' file `source` holds itself.
    Returns:
      None as names where nothing names them.
    Raises:
      SettingError: both name them, in different orders.
    """
    if file is None:
        return own, source
    listed = read_classes(file)
    if own and own != listed and sorted(own) == sorted(listed):
        raise SettingError(
            f"{file}: names the classes in another order than {source}, which names its own",
            lambda spelled: f"Leave {spelled('classes')} out",
        )
    return listed, file


def read_classes(path: Path) -> list[str]:
    """The names in a text file, one on a line; empty lines at the end do not count.

    Raises:
      UserError: the file cannot be read, holds nothing, or has an empty line between names.
    """
    try:
        # Editors on Windows begin a file with a byte order mark, which utf-8-sig removes.
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
