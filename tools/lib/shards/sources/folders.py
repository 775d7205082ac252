"""Image folders: train/CLASS/* and val/CLASS/*."""

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError
from tools.lib.shards.sources.contents import (
    beside_source,
    by_unique,
    class_folders,
    composed,
    contents_of,
    is_image,
    list_class,
    misplaced,
    unused_in,
)
from tools.lib.shards.sources.kaggle import KAGGLE_DATA, KAGGLE_SOLUTION
from tools.lib.shards.sources.source import SPLITS, VAL_NAMES, Entry, Source, SourceOptions, Unused, file_reader

ANNOTATIONS = "val_annotations.txt"  # the labels of Tiny ImageNet's validation images
_MAYBE_VAL = ("test", "testing", "eval", "dev", "holdout")
_ARCHIVES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


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
