"""Labels as ImageNet-ReaL has them: several for an image, or none."""

import json
import pkgutil
from pathlib import Path

from timm.data import ImageNetInfo

from pipelines.common.errors import UserError
from pipelines.shards.index import ShardIndex

# This name stands for the copy of ReaL's labels that timm ships.
_TIMM_REAL = "imagenet"


def read_real_labels(path: Path, index: ShardIndex, names: list[str]) -> list[list[int]]:
    """Read the labels of each sample from a JSON file.

    ReaL's list goes by the number of ImageNet's validation images, and its labels by ImageNet's 1,000 classes. An
    object goes by the samples' keys, CLASS/STEM or STEM, and names classes as the dataset does, or by their label.

    Args:
      names: the dataset's classes.
    Raises:
      UserError: the file cannot be read, is of other classes, or says nothing of a sample.
    """
    is_timms = str(path) == _TIMM_REAL
    try:
        content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") if is_timms else path.read_bytes()
        by_key = json.loads(content or b"")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data.real_labels is {path}: cannot be read ({error}). Name another file") from error
    if isinstance(by_key, list):
        if names != ImageNetInfo().label_names():
            raise UserError(
                f"{path}: a list goes by ImageNet's 1,000 classes, and the dataset has others. Give an object "
                "{key: [classes]}"
            )
        by_key = {f"ILSVRC2012_val_{number:08d}": given for number, given in enumerate(by_key, 1)}
    label_of: dict[object, int] = {label: label for label in range(len(names))}
    label_of |= {name: label for label, name in enumerate(names)}
    labels = []
    for key in (key.decode() for key in index.samples["key"].tolist()):
        given = by_key.get(key, by_key.get(key.rpartition("/")[2])) if isinstance(by_key, dict) else None
        if not isinstance(given, list):
            raise UserError(f"{path}: has no list of labels for sample {key}. Give one, with a list for each sample")
        if unknown := [each for each in given if not isinstance(each, (str, int)) or each not in label_of]:
            raise UserError(f"{path}: sample {key} has the label {unknown[0]!r}, which is no class of the dataset")
        labels.append([label_of[each] for each in given])
    if not any(labels):
        raise UserError(f"{path}: no sample has a label in it. Leave it out, or give another")
    return labels
