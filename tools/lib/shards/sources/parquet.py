"""Hugging Face parquet files: images and labels in columns."""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.common.errors import UserError, clipped, named
from pipelines.common.files import instead_of_content, replacing
from pipelines.shards.manifest import sorted_classes
from tools.lib.shards.sources.contents import printable, walk
from tools.lib.shards.sources.source import (
    EXPECTED,
    MISPLACED,
    RECOGNISE,
    Entry,
    Source,
    SourceOptions,
    Unused,
    read_slice,
    sample_key,
    slice_location,
)
from tools.lib.shards.sources.split_names import SPLIT_WORDS, missing_files

if TYPE_CHECKING:
    from pyarrow import DataType, Schema

_OTHERS = ("README*", "LICENSE*", "*.md", "*.py", "dataset_info*.json", "state.json")
_CORRECT = "Correct it, or leave the row out"
_SPLIT = (
    "The name of a file or of its folder states the split: train-*.parquet or train/*.parquet, validation-*.parquet"
)


def open_parquet(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Parquet files as Hugging Face's hub has them.

    Raises:
      UserError: a file is damaged, lacks a column, or differs from the first one; a label is none of the classes.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f"{root}: reading parquet needs pyarrow: pip install pyarrow") from error
    found, unused = _find(root)
    if "train" not in found:
        raise UserError(f"{root}: no training files below it. {_SPLIT}")
    classes, order = _read_classes(found, options)

    def list_split(split: str) -> Iterator[Entry | Unused]:
        yield from unused if split == "train" else ()
        yield from _list_parquet(root, found[split], scratch / split, options, classes)

    columns = [options.image_column, options.label_column]
    return Source(
        kind="parquet",
        root=root,
        classes=classes,
        class_names=[],
        splits={split: functools.partial(list_split, split) for split in found},
        read=functools.partial(read_slice, scratch),
        files={str(path.relative_to(root)): path.stat().st_size for paths in found.values() for path in paths},
        copies=True,
        class_order=order,
        columns=[] if columns == [RECOGNISE.image_column, RECOGNISE.label_column] else columns,
    )


# --- which files there are ---


def has_parquet(folder: Path) -> bool:
    """Return whether parquet files lie in a folder, or in folders as the hub's data/, CONFIG/ and CONFIG/train/."""
    return any(next(folder.glob(places), None) for places in ("*.parquet", "*/*.parquet", "*/train/*.parquet"))


def _find(root: Path) -> tuple[dict[str, list[Path]], list[Unused]]:
    """The files of train and val, sorted, and everything else below the folder.

    Raises:
      UserError: the files are of several configurations of a dataset.
    """
    found: dict[str, list[Path]] = {}
    datasets, unused = set(), []
    for name in walk(root):
        if isinstance(name, Unused):
            unused.append(name)
        elif any(fnmatch(os.path.basename(name), pattern) for pattern in _OTHERS):
            unused.append(Unused(EXPECTED, printable(name), "part of the download, not of train or val"))
        elif not name.endswith(".parquet"):
            unused.append(Unused(MISPLACED, printable(name), "not a parquet file: move it away"))
        elif not (split := _split_of(Path(name))):
            unused.append(Unused(MISPLACED, printable(name), f"states no split. {_SPLIT}"))
        elif split == "test":
            unused.append(Unused(EXPECTED, printable(name), "belongs to the test split"))
        else:
            found.setdefault(split, []).append(root / name)
            datasets.add(_dataset_of(Path(name)))
    if len(datasets) > 1:
        raise UserError(
            f"{root}: files of several datasets, in {named(sorted(datasets))}. Give the folder of one of them, or move "
            "the others away"
        )
    unused += missing_files(str(path.relative_to(root)) for paths in found.values() for path in paths)
    return {split: sorted(found[split]) for split in ("train", "val") if split in found}, unused


def _dataset_of(path: Path) -> str:
    """The folder above that of the split: files of one dataset have it in common."""
    parts = path.parent.parts
    splits = [depth for depth, part in enumerate(parts) if part in SPLIT_WORDS]
    return "/".join(parts[: splits[0]] if splits else parts) or "."


def _split_of(path: Path) -> str:
    """The split of a file by its name, as in train-00000-of-00002, or by the nearest folder of a split's name."""
    first = re.split(r"[^a-z]", path.name, maxsplit=1)[0]
    return next((SPLIT_WORDS[word] for word in (first, *reversed(path.parent.parts)) if word in SPLIT_WORDS), "")


# --- labels and columns ---


@dataclasses.dataclass(frozen=True)
class _Labels:
    """The labels of a file.

    Attributes:
      values: those that occur, each once: all of them class numbers or all of them names.
      num_rows: how many rows have one.
      names: names of the classes, as Hugging Face's ClassLabel stores them; [] where there are none.
    """

    values: list
    num_rows: int
    names: list[str]


def _read_classes(found: dict[str, list[Path]], options: SourceOptions) -> tuple[list[str], str]:
    """The classes, and who decided their order. Reads the labels of all files."""
    labels = {path: _read_labels(path, options) for paths in found.values() for path in paths}
    start, first = next(iter(labels.items()))
    is_text = isinstance(first.values[0], str)
    for path, each in labels.items():
        if (isinstance(each.values[0], str), each.names) != (is_text, first.names):
            raise UserError(f"{path}: the kind or list of its classes is not that of {start}. Write both alike")
    classes, order = first.names, "given"
    if not classes and is_text:
        names = {name for path in found["train"] for name in labels[path].values}
        classes, order = sorted_classes(list(names), options.class_order or "text"), options.class_order or "unstated"
    elif not classes:
        top, path = max((max(labels[path].values), path) for path in found["train"])
        if top >= max(1000, 100 * sum(labels[path].num_rows for path in found["train"])):
            raise UserError(f"{path}: label {top} is too large for a class number. {_CORRECT}")
        classes = [str(number) for number in range(top + 1)]
    known = set(classes) if is_text else range(len(classes))
    for path, each in labels.items():
        if unknown := [value for value in each.values if value not in known]:
            raise UserError(f"{path}: label {clipped(unknown[0])} is none of the {len(classes)} classes. {_CORRECT}")
    return classes, order


def _read_labels(path: Path, options: SourceOptions) -> _Labels:
    import pyarrow.parquet as parquet

    with _naming_damage(path):
        file = parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow, options)
        column = file.read(columns=[options.label_column])[options.label_column]
        values = column.cast(_value_type(column.type)).unique().to_pylist()
    if not values:
        raise UserError(f"{path}: has no rows. Download it again, or move it away")
    for value in values:
        if value is None or value == "" or (isinstance(value, int) and value < 0):
            raise UserError(f"{path}: label {value!r}; expected an integer from 0 on, or text. {_CORRECT}")
    return _Labels(values, len(column), _class_names(file.schema_arrow, options.label_column))


def _class_names(schema: "Schema", label_column: str) -> list[str]:
    """The class names that Hugging Face's datasets library stores in the schema; [] where there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label_column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _check_columns(path: Path, schema: "Schema", options: SourceOptions) -> None:
    """Raise a UserError unless the file has one column of encoded images and one of labels."""
    from pyarrow import types

    images = (types.is_binary, types.is_large_binary, types.is_binary_view)
    labels = (types.is_integer, types.is_string, types.is_large_string)
    for name, kinds, what, option in (
        (options.image_column, images, "encoded images, as bytes or a struct with bytes", "--image-column"),
        (options.label_column, labels, "labels, as integers or text", "--label-column"),
    ):
        if schema.names.count(name) != 1:
            raise UserError(
                f"{path}: {name} not once among its columns, {clipped(named(schema.names), 120)}. Name one: {option} X"
            )
        kind = schema.field(name).type
        if types.is_struct(kind) and kinds is images and (place := kind.get_field_index("bytes")) >= 0:
            kind = kind.field(place).type
        if not any(is_kind(_value_type(kind)) for is_kind in kinds):
            raise UserError(f"{path}: column {name} is {clipped(kind)}; expected {what}. Name another: {option} X")


def _value_type(kind: "DataType") -> "DataType":
    """The type of a column's values, which may be dictionary-encoded."""
    from pyarrow import types

    return kind.value_type if types.is_dictionary(kind) else kind


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises about a damaged file into one line."""
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: cannot be read ({error.strerror}). Look at that file or disk") from error
        with open(path, "rb") as file:
            found = instead_of_content(file.read(200))
        damaged = f"damaged, cut off or no parquet file ({clipped(error, 90)}). Download it again"
        raise UserError(f"{path}: {found or damaged}") from error


# --- the listing ---


def _list_parquet(
    root: Path, paths: list[Path], copies: Path, options: SourceOptions, classes: list[str]
) -> Iterator[Entry]:
    """Copy the images of each file one after the other into a scratch file, where any of them can be read alone.

    Parquet compresses rows in groups: reading single images in a shuffled order would read each group over and over.
    """
    copies.mkdir(parents=True, exist_ok=True)
    numbers = {name: label for label, name in enumerate(classes)}
    total = 0
    for number, path in enumerate(paths):
        copy = f"{copies.name}/{number:05d}.bin"
        with replacing(copies.parent / copy) as file:
            for row, (content, value) in enumerate(_rows(path, options)):
                label = numbers[value] if isinstance(value, str) else value
                location = slice_location(copy, file.tell(), len(content))
                source = f"{path.relative_to(root)}: row {row}"
                yield Entry(sample_key(classes[label], f"{total:09d}"), label, location, source)
                file.write(content)
                total += 1


def _rows(path: Path, options: SourceOptions) -> Iterator[tuple[bytes, int | str]]:
    """The image and the label of each row; b"" where there is no image, which the conversion then names as empty."""
    import pyarrow.parquet as parquet

    columns = [options.image_column, options.label_column]
    with _naming_damage(path):
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
            for image, label in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                if isinstance(image, dict):
                    if image["bytes"] is None and image.get("path"):
                        raise UserError(
                            f"{path}: names the file {clipped(image['path'])} and does not hold its bytes. Put them "
                            "into the parquet file, or convert the folder of images"
                        )
                    image = image["bytes"]
                yield image or b"", label
