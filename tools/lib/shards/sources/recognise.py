"""Recognises what kind of source a folder is."""

from collections.abc import Callable
from pathlib import Path

from pipelines.common.errors import UserError
from tools.lib.shards.sources.contents import contents_of
from tools.lib.shards.sources.folders import open_folder
from tools.lib.shards.sources.ilsvrc import DEVKIT, TRAIN_TAR, VAL_TAR, open_ilsvrc
from tools.lib.shards.sources.kaggle import KAGGLE_DATA, open_kaggle
from tools.lib.shards.sources.parquet import has_parquet, open_parquet
from tools.lib.shards.sources.source import Source, SourceOptions
from tools.lib.shards.sources.split_names import SPLIT_WORDS

# Each kind has a function that recognises its folder and one that opens it. The first kind that fits is taken.
KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, SourceOptions, Path], Source]]] = {
    "ilsvrc": (lambda root: (root / TRAIN_TAR).is_file(), open_ilsvrc),
    "kaggle": (lambda root: (root / KAGGLE_DATA).is_dir(), open_kaggle),
    "folder": (
        lambda root: (root / "train").is_dir() and not next((root / "train").glob("*.parquet"), None),
        open_folder,
    ),
    "parquet": (has_parquet, open_parquet),
}


def open_source(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Recognise a source, or take it for the kind that the options name.

    Args:
      scratch: folder for copies, where a kind needs them to read single images.
    Raises:
      UserError: it is none of the kinds, or lacks a part; the message says what was expected.
    """
    if not root.is_dir():
        raise UserError(f"{root}: {'a file, not a folder' if root.exists() else 'not found'}. {_expected(root)}")
    kind = _kind_of(root) if options.kind == "auto" else options.kind
    if not kind:
        above = [root.resolve().parent] if root.resolve().name in SPLIT_WORDS else []
        near = [*above, *(root / name for name in contents_of(root).folders)]
        meant = next((f"Give {path}, if that is meant. " for path in near if _kind_of(path)), "")
        raise UserError(f"{root}: not recognised as a source. {meant}{_expected(root)}")
    source = KINDS[kind][1](root, options, scratch)
    if options.class_order and source.class_order == "given":
        raise UserError(
            f"--class-order is {options.class_order}, and this {kind} source numbers its classes itself. Leave it out"
        )
    return source


def _kind_of(root: Path) -> str:
    """The kind of source that a folder is, "" if it is none."""
    return next((name for name, (looks_like, _) in KINDS.items() if looks_like(root)), "")


def _expected(root: Path) -> str:
    return (
        f"Expected images in {root}/train/CLASS and {root}/val/CLASS; or {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}; or "
        f"Kaggle's {KAGGLE_DATA}; or Hugging Face's train-*.parquet"
    )
