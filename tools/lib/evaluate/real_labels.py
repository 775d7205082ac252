"""Labels as ImageNet-ReaL has them: several for an image, or none."""

import json
import pkgutil
import re
from pathlib import Path

from timm.data import ImageNetInfo

from pipelines.common.errors import UserError
from pipelines.shards.index import ShardIndex

# This name stands for the copy of ReaL's labels that timm ships.
_TIMM_REAL = "imagenet"
Labels = list[str | int]


def read_real_labels(path: Path, index: ShardIndex, names: list[str]) -> list[list[int]]:
    """Read the labels of each sample from a JSON file.

    ReaL's list goes by the number of ImageNet's validation images, and its labels by ImageNet's 1,000 classes. An
    object goes by the samples' keys, CLASS/STEM or STEM, and names classes as the dataset does, or by their label.

    Args:
      names: the dataset's classes.
    Raises:
      UserError: the file cannot be read, is of other classes, or says nothing of a sample.
    """
    by_key, is_list = _read(path)
    if is_list and names != ImageNetInfo().label_names():
        raise UserError(
            f"{path}: a list goes by ImageNet's 1,000 classes, and the dataset has others. Give an object "
            "{key: [classes]}"
        )
    label_of: dict[str | int, int] = {name: label for label, name in enumerate(names)}
    label_of |= {label: label for label in range(len(names))}
    labels = []
    for key in (key.decode() for key in index.samples["key"].tolist()):
        given = _labels_of(key, by_key, path)
        if unknown := [label for label in given if label not in label_of]:
            raise UserError(f"{path}: sample {key} has the label {unknown[0]!r}, which is no class of the dataset")
        labels.append([label_of[label] for label in given])
    if not any(labels):
        raise UserError(f"{path}: no sample has a label in it. Leave it out, or give another")
    return labels


def _read(path: Path) -> tuple[dict[str, Labels], bool]:
    """The labels by key, and whether the file holds a list; the keys of a list are its numbers, 00000001 and on."""
    try:
        is_timms = str(path) == _TIMM_REAL
        content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") if is_timms else path.read_bytes()
    except OSError as error:
        raise UserError(f"data.real_labels is {path}: cannot be read ({error.strerror}). Name another file") from error
    try:
        found = json.loads(content or b"")
        by_key = found if isinstance(found, dict) else {f"{i + 1:08d}": each for i, each in enumerate(found)}
        by_key = {key: [each if isinstance(each, str) else int(each) for each in by_key[key]] for key in by_key}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a JSON list of lists of labels, nor an object with a list for each key ({error}). Give one"
        ) from error
    return by_key, isinstance(found, list)


def _labels_of(key: str, by_key: dict[str, Labels], path: Path) -> Labels:
    """An image's labels by its key, CLASS/STEM, by its stem, or by the number that ends ILSVRC2012_val_00000001."""
    stem = key.rpartition("/")[2]
    number = re.search(r"_val_(\d{8})$", stem)
    for each in (key, stem, number[1] if number else ""):
        if each in by_key:
            return by_key[each]
    raise UserError(f"{path}: says nothing of sample {key}. A list goes by the number in ILSVRC2012_val_00000001")
