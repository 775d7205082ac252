"""Recognises what kind of source a folder is, and says what helps if it is none."""

from collections.abc import Callable
from pathlib import Path

from pipelines.common.errors import UserError, named
from tools.lib.shards.sources.contents import contents_of, is_image
from tools.lib.shards.sources.folders import open_folder
from tools.lib.shards.sources.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR, open_ilsvrc
from tools.lib.shards.sources.kaggle import KAGGLE_DATA, open_kaggle
from tools.lib.shards.sources.parquet import has_parquet, open_parquet
from tools.lib.shards.sources.source import VAL_NAMES, Source, SourceOptions

# Each kind has a function that recognises its folder and one that opens it. The first kind that fits is taken.
KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, SourceOptions, Path], Source]]] = {
    "ilsvrc": (lambda root: (root / TRAIN_TAR).is_file(), open_ilsvrc),
    "kaggle": (lambda root: (root / KAGGLE_DATA).is_dir(), open_kaggle),
    "folder": (lambda root: (root / "train").is_dir() and not has_parquet(root / "train"), open_folder),
    "parquet": (lambda root: has_parquet(root) or has_parquet(root / "train"), open_parquet),
}
# Folders of these names hold the images of all classes, or something else about them.
_NO_CLASSES = ("images", "image", "img", "imgs", "jpegimages", "annotations", "labels", "masks", "data", "photos")
_EXPECTED = (
    f"Expected a folder with train/CLASS/*.jpg; or {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}; or Kaggle's "
    f"{KAGGLE_DATA}; or Hugging Face's train-*.parquet"
)


def open_source(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Recognise a source, or take it for the kind that the options name.

    Args:
      scratch: folder for copies, where a kind needs them to read single images.
    Raises:
      UserError: it is none of the kinds, or lacks a part; the message says what was expected.
    """
    if not root.is_dir():
        found = "a file, not a folder" if root.exists() else "not found"
        raise UserError(f"{root}: {found}. {_EXPECTED}")
    kind = options.kind
    if kind == "auto":
        kind = next((name for name, (looks_like, _) in KINDS.items() if looks_like(root)), "")
        if not kind:
            raise UserError(f"{root}: not recognised as a source. {_nearest(root) or _EXPECTED}")
    source = KINDS[kind][1](root, options, scratch)
    if options.class_order and source.class_order == "given":
        raise UserError(
            f"--class-order is {options.class_order}, and this {kind} source numbers its classes itself. Leave it out"
        )
    return source


def _nearest(root: Path) -> str:
    """Say what probably helps: the folder above is often meant, or one inside; "" where nothing is near."""
    for above in root.resolve().parents:
        if (above / KAGGLE_DATA).is_dir():
            return f"It is a part of Kaggle's download: give {above}"
    inside = contents_of(root)
    if reason := inside.others.get("train"):
        return f"Its train is {reason}"
    if "train" in inside.files:
        return f"{root / 'train'} is a file, where a folder of class folders belongs"
    if alike := [name for name in inside.folders if name.lower() in ("train", "training")]:
        return f"Expected the training images in {root / 'train'}: rename {root / alike[0]}"
    if any(name.lower() in VAL_NAMES for name in inside.folders):
        return f"It has validation images alone: put the training images into {root}/train/CLASS"
    if whole := [name for name in inside.folders if any(looks_like(root / name) for looks_like, _ in KINDS.values())]:
        return f"Give the folder inside it: {root / whole[0]}"
    if root.name.lower() in ("train", *VAL_NAMES) and inside.folders:
        return f"Give the folder above it, {root.resolve().parent}, which holds train/CLASS and val/CLASS"
    return _nearest_images(root, inside.folders)


def _nearest_images(root: Path, folders: list[str]) -> str:
    """Say what helps where images lie somewhere below a folder that is no source."""
    if nested := [name for name in folders if len(_with_images(root / name)) > 1]:
        return f"The class folders in {root / nested[0]} belong in {root}/train: rename it, if they are training images"
    classes = _with_images(root)
    if len(classes) == 1 or any(name.lower() in _NO_CLASSES for name in classes):
        return f"Sort the images of {named([root / name for name in classes], 3)} by class: {root}/train/CLASS"
    return f"Its folders of images belong one level deeper: move them into {root}/train" if classes else ""


def _with_images(folder: Path) -> list[str]:
    """Folders in a folder that hold images."""
    names = contents_of(folder).folders
    return [name for name in names if any(map(is_image, contents_of(folder / name).files))]
