"""Image folders: train/CLASS/* and val/CLASS/*."""

import functools
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError
from tools.lib.shards.sources.contents import (
    below,
    beside_source,
    by_unique,
    class_folders,
    composed,
    contents_of,
    list_class,
    unused_in,
)
from tools.lib.shards.sources.kaggle import KAGGLE_SOLUTION
from tools.lib.shards.sources.source import MISPLACED, SPLITS, Entry, Source, SourceOptions, Unused, read_file


def open_folder(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """An image folder."""
    classes = class_folders(root / "train", options.class_order)
    splits = {split: functools.partial(_list_split, root, split, options, classes) for split in _splits_in(root)}
    for split in splits:
        if not contents_of(root / split).folders:
            raise UserError(
                f"{root / split}: has no class folders. Expected {root / split}/CLASS/*.jpg. Of Kaggle's ImageNet give "
                f"the folder that holds {KAGGLE_SOLUTION}"
            )
    read, order = functools.partial(read_file, root), options.class_order or "unstated"
    return Source("folder", root, classes, [], splits, read, class_order=order)


def _splits_in(root: Path) -> list[str]:
    return [split for split in SPLITS if (root / split).is_dir()]


def _list_split(root: Path, split: str, options: SourceOptions, classes: list[str]) -> Iterator[Entry | Unused]:
    if split == "train":
        yield from beside_source(root, options, _splits_in(root))
    inside = contents_of(root / split)
    # The same class may be written composed in one split and decomposed in the other.
    found, alike = by_unique(inside.folders, composed)
    known = {composed(name) for name in classes}
    used = {name for form, name in found.items() if form in known}.union(name for name, _ in alike)
    reason = "not a class folder that train has, too: move it into one, unpack it there, or move it away"
    yield from unused_in(inside, split, used, reason)
    for name, _ in alike:
        reason = "a folder of the same name in another Unicode form: move its images there with mv -n"
        yield Unused(MISPLACED, below(split, name), reason)
    for label, class_id in enumerate(classes):
        if name := found.get(composed(class_id)):
            yield from list_class(root, Path(split) / name, class_id, label)
