"""Sources that are folders of images: train/CLASS/* and val/CLASS/*, and Kaggle's copy of ImageNet."""

import csv
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError, clipped, named
from pipelines.shards.manifest import sorted_classes
from tools.lib.shards.entries import (
    MISPLACED,
    SPLITS,
    VAL_NAMES,
    Entry,
    Source,
    SourceOptions,
    Unused,
    beside,
    beside_source,
    by_unique,
    composed,
    contents_of,
    file_reader,
    is_image,
    is_utf8,
    misplaced,
    printable,
    sample_key,
    unused_in,
)

KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_SOLUTION = "LOC_val_solution.csv"
_KAGGLE_MAPPING = "LOC_synset_mapping.txt"
# These lie beside the images in Kaggle's download and are for localization or the test.
_BESIDE_ILSVRC = (
    *("LOC_sample_submission.csv", "LOC_train_solution.csv"),
    *("imagenet-object-localization-challenge.zip", "imagenet_object_localization*.tar.gz"),
)
# folder, what is read of it, what else usually lies there
_KAGGLE_FOLDERS = (
    ("ILSVRC", ("Data",), ("Annotations", "ImageSets")),
    ("ILSVRC/Data", ("CLS-LOC",), ()),
    (str(KAGGLE_DATA), SPLITS, ("test",)),
)


ANNOTATIONS = "val_annotations.txt"  # the labels of Tiny ImageNet's validation images
_MAYBE_VAL = ("test", "testing", "eval", "dev", "holdout")
_ARCHIVES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_INSIDE_CLASS = (
    "a folder inside a class. If it is part of the class, move its images up with mv -n, which replaces nothing; if it "
    "is a class itself, move it up"
)


# --- train/CLASS/* and val/CLASS/* ---


def open_folder(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """An image folder."""
    train = root / "train"
    if not train.is_dir():
        raise UserError(
            f"{train}: not found. Expected {root}/train/CLASS/*.jpg and, for validation, {root}/val/CLASS/*"
        )
    classes = class_folders(train, options.class_order)
    if not classes:
        there = contents_of(train).files
        raise UserError(
            f"{train}: has no class folders. {_flat_advice(train) if there else f'Expected {train}/CLASS/*.jpg'}"
        )
    inside = contents_of(root)
    if "val" in inside.files:
        raise UserError(
            f"{root / 'val'}: a file, and the validation images belong in a folder of that name. Move it away"
        )
    for name in inside.folders:
        if name != "val" and name.lower() in VAL_NAMES:
            help_ = "There are two, so move one away" if "val" in inside.folders else "Rename it"
            raise UserError(f"{root / name}: the validation images belong in {root / 'val'}. {help_}")

    def list_split(split: str) -> Iterator[Entry | Unused]:
        if split == "train":
            for each in beside_source(root, options, tuple(name for name in SPLITS if name in inside.folders), ()):
                is_val = each.source in _MAYBE_VAL and "val" not in inside.folders
                yield dataclasses.replace(each, reason="rename it to val, or move it away") if is_val else each
        yield from _list_split(root, split, classes)

    splits = {split: lambda split=split: list_split(split) for split in SPLITS if (root / split).is_dir()}
    order = options.class_order or "unstated"
    return Source("folder", root, classes, [], splits, file_reader(root), class_order=order)


def class_folders(folder: Path, order: str = "") -> list[str]:
    """The classes in the given order, one of pipelines.shards.index.CLASS_ORDERS; "" is text.

    Raises:
      UserError: two of them would have samples of the same names, or look alike; all such are named.
    """
    names = sorted_classes(contents_of(folder).folders, order or "text")
    if broken := [printable(name) for name in names if not is_utf8(name)]:
        raise UserError(f"{folder}: folders whose names are not UTF-8: {named(broken)}. Rename them")
    _, alike = by_unique(names, lambda name: sample_key(composed(name), ""))
    if alike:
        pairs = [f"{first} and {name}" for name, first in alike]
        raise UserError(f"{folder}: folders that would be one class: {named(pairs)}. Rename all but one of each")
    return names


def _list_split(root: Path, split: str, classes: list[str]) -> Iterator[Entry | Unused]:
    folder, inside = root / split, contents_of(root / split)
    yield from unused_in(inside, split)
    if (ANNOTATIONS in inside.files and "images" in inside.folders) or (inside.files and not inside.folders):
        raise UserError(f"{folder}: has no class folders. {_flat_advice(folder)}")
    for name in inside.files:
        yield from misplaced(split, [name], _beside_classes(name))
    # The same class may be written composed in one split and decomposed in the other.
    found, alike = by_unique(inside.folders, composed)
    yield from misplaced(
        split,
        [name for name, _ in alike],
        "a folder of the same name in another Unicode form: move its images there with mv -n",
    )
    known = {composed(name) for name in classes}
    strangers = [name for form, name in found.items() if form not in known]
    yield from misplaced(split, strangers, "a class that train lacks: move it away, or add training images of it")
    for label, class_id in enumerate(classes):
        if name := found.get(composed(class_id)):
            yield from list_class(root, Path(split) / name, class_id, label)


def _beside_classes(name: str) -> str:
    if is_image(name):
        return "an image outside of the class folders: move it into its class"
    if name.lower().endswith(_ARCHIVES):
        return "an archive beside the class folders: unpack it into its class, or move it away"
    return "a file beside the class folders: move it away"


def _flat_advice(folder: Path) -> str:
    """Say what helps where images are not in class folders: a file may have the labels."""
    inside, shell = contents_of(folder), shlex.quote(str(folder))
    if ANNOTATIONS in inside.files:
        return (
            f"{ANNOTATIONS} has its labels; sort by it: cd {shell} && while read -r f c _; do mkdir -p $c; "
            f"mv -n images/$f $c/; done < {ANNOTATIONS}; then move {ANNOTATIONS} and images away"
        )
    for above in folder.resolve().parents:
        if (above / KAGGLE_DATA).is_dir():
            return f"This is Kaggle's download: give {above}, where {KAGGLE_SOLUTION} with their classes belongs"
    images = [name for name in inside.files if is_image(name)]
    there = f"{len(images)} images lie directly in it, as {images[0]}: sort them" if images else "Sort the images"
    if (folder.parent / KAGGLE_SOLUTION).is_file():
        return f"{there} as Kaggle does: {KAGGLE_DATA}/train and val beside {KAGGLE_SOLUTION}"
    return (
        f"{there} into {folder}/CLASS; or, if they are ImageNet's, give the folder that has {KAGGLE_SOLUTION} (Kaggle) "
        "or ILSVRC2012_img_val.tar and the devkit"
    )


def list_class(root: Path, folder: Path, class_id: str, label: int) -> Iterator[Entry | Unused]:
    """The images of one class.

    Args:
      folder: relative to `root`.
    """
    inside = contents_of(root / folder)
    yield from unused_in(inside, str(folder))
    yield from misplaced(str(folder), inside.folders, _INSIDE_CLASS)
    if not inside.files and not inside.folders:
        yield Unused(MISPLACED, printable(str(folder)), "no images: add some, or move the folder away")
    broken = [file for file in inside.files if not is_utf8(file)]
    yield from misplaced(str(folder), broken, "a name that is not UTF-8: rename it")
    # A name that is no image's is looked at as well, and rejected with its name.
    files, alike = by_unique(
        (file for file in inside.files if is_utf8(file)),
        lambda file: sample_key(class_id, Path(file).stem if is_image(file) else file),
    )
    for file, first in alike:
        yield from misplaced(str(folder), [file], f"would be the same sample as {first}: rename one")
    for key, file in files.items():
        location = f"{folder}/{file}"
        yield Entry(key, label, location, location)


# --- Kaggle's copy of ImageNet ---


def open_kaggle(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Kaggle's download of imagenet-object-localization-challenge."""
    train, solution = root / KAGGLE_DATA / "train", root / KAGGLE_SOLUTION
    if not train.is_dir():
        raise UserError(f"{train}: not found. Expected the layout of Kaggle's imagenet-object-localization-challenge")
    classes = class_folders(train, options.class_order)
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
    order = options.class_order or "unstated"
    return Source("kaggle", root, classes, names, splits, file_reader(root), class_order=order)


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
    for folder, used, others in _KAGGLE_FOLDERS:
        yield from beside(contents_of(root / folder), folder, used, others)
    train = KAGGLE_DATA / "train"
    inside = contents_of(root / train)
    yield from unused_in(inside, str(train))
    yield from misplaced(str(train), inside.files, "a file beside the class folders: move it into its class, or away")
    for label, wnid in enumerate(classes):
        yield from list_class(root, train / wnid, wnid, label)


def _list_kaggle_val(root: Path, solution: Path, numbers: dict[str, int]) -> Iterator[Entry | Unused]:
    folder, labels = KAGGLE_DATA / "val", _read_solution(solution)
    inside = contents_of(root / folder)
    yield from unused_in(inside, str(folder))
    yield from misplaced(str(folder), inside.folders, "a folder among the validation images: move it away")
    files, alike = by_unique(inside.files, lambda name: Path(name).stem)
    for name, first in alike:
        yield from misplaced(str(folder), [name], f"would be the same image as {first}: rename one")
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
    _, later = by_unique(dict.fromkeys(answers), lambda answer: answer[0])
    if later:
        (image, wnid), first = later[0]
        raise UserError(f"{path}: {clipped(image)} has two classes, {first[1]} and {wnid}. Download it again")
    return dict(answers)
