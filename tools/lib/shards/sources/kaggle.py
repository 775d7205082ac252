"""Kaggle's copy of ImageNet: class folders for training, a list of the classes of the validation images."""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError, clipped, named
from tools.lib.shards.sources.contents import (
    below,
    beside_source,
    by_unique,
    class_folders,
    contents_of,
    list_class,
    unused_in,
)
from tools.lib.shards.sources.source import (
    MISPLACED,
    SPLITS,
    Entry,
    Source,
    SourceOptions,
    Unused,
    read_file,
    sample_key,
)

KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_SOLUTION = "LOC_val_solution.csv"
_KAGGLE_MAPPING = "LOC_synset_mapping.txt"
# These files lie beside the images in Kaggle's download. They are for localization or the test.
_BESIDE_ILSVRC = ("LOC_*.csv", "imagenet-object-localization-challenge.zip", "imagenet_object_localization*.tar.gz")
# Each has a folder, the names that are read in it, and those that usually lie there for other purposes.
_KAGGLE_FOLDERS = (
    ("ILSVRC", ("Data",), ("Annotations", "ImageSets")),
    ("ILSVRC/Data", ("CLS-LOC",), ()),
    (str(KAGGLE_DATA), SPLITS, ("test",)),
)


def open_kaggle(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Kaggle's download of imagenet-object-localization-challenge."""
    solution, classes = root / KAGGLE_SOLUTION, class_folders(root / KAGGLE_DATA / "train", options.class_order)
    numbers = {wnid: label for label, wnid in enumerate(classes)}
    splits = {"train": lambda: _list_kaggle_train(root, options, classes)}
    if (root / KAGGLE_DATA / "val").is_dir():
        if not solution.is_file():
            raise UserError(
                f"{solution}: not found, and it holds the classes of the images in {root / KAGGLE_DATA / 'val'}. Put "
                "it there, or move that folder away"
            )
        splits["val"] = lambda: _list_kaggle_val(root, solution, numbers)
    names = _kaggle_names(root / _KAGGLE_MAPPING, classes)
    read, order = functools.partial(read_file, root), options.class_order or "unstated"
    return Source("kaggle", root, classes, names, splits, read, class_order=order)


def _kaggle_names(path: Path, classes: list[str]) -> list[str]:
    """Words for the classes from a line 'WNID words' each; [] where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({clipped(error)}). Restore it, or move it away") from error
    words = dict(line.split(" ", 1) for line in lines if " " in line)
    return [words.get(wnid, wnid) for wnid in classes] if words else []


def _list_kaggle_train(root: Path, options: SourceOptions, classes: list[str]) -> Iterator[Entry | Unused]:
    yield from beside_source(root, options, ("ILSVRC", KAGGLE_SOLUTION, _KAGGLE_MAPPING), _BESIDE_ILSVRC)
    for folder, used, others in (*_KAGGLE_FOLDERS, (str(KAGGLE_DATA / "train"), classes, ())):
        yield from unused_in(
            contents_of(root / folder), folder, used, "not part of Kaggle's layout: move it away", others
        )
    for label, wnid in enumerate(classes):
        yield from list_class(root, KAGGLE_DATA / "train" / wnid, wnid, label)


def _list_kaggle_val(root: Path, solution: Path, numbers: dict[str, int]) -> Iterator[Entry | Unused]:
    folder, labels = KAGGLE_DATA / "val", _read_solution(solution)
    inside = contents_of(root / folder)
    yield from unused_in(inside, str(folder), set(inside.files), "a folder among the validation images: move it away")
    files, alike = by_unique(inside.files, lambda name: Path(name).stem)
    for name, first in alike:
        yield Unused(MISPLACED, below(str(folder), name), f"would be the same image as {first}: rename one")
    if different := sorted({*files} ^ {*labels}):
        where = f"in {folder}" if different[0] in labels else "among its lines"
        raise UserError(f"{solution}: {different[0]} is not {where} ({len(different)} such). Restore both")
    if strangers := [f"{image} (class {wnid})" for image, wnid in sorted(labels.items()) if wnid not in numbers]:
        raise UserError(f"{solution}: classes without a training folder: {named(strangers)}. Restore those folders")
    for image, wnid in sorted(labels.items()):
        location = str(folder / files[image])
        yield Entry(sample_key(wnid, image), numbers[wnid], location, location)


def _read_solution(path: Path) -> dict[str, str]:
    """Kaggle's answers: image -> wnid of its class.

    Raises:
      UserError: it cannot be read, a line has no class, or an image has two.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            answers = [(row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: not Kaggle's list with ImageId and PredictionString in every line ({clipped(repr(error))}). "
            "Download it again"
        ) from error
    labels = dict(answers)
    if twice := [image for image, wnid in answers if labels[image] != wnid]:
        raise UserError(f"{path}: two classes for {clipped(named(twice, 3))}. Download it again")
    return labels
