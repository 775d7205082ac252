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
from pipelines.common.files import instead_of_content, replacing, write_synced
from pipelines.shards.manifest import sorted_classes
from tools.lib.shards.sources.contents import contents_of, printable, walk
from tools.lib.shards.sources.source import (
    EXPECTED,
    MISPLACED,
    RECOGNISE,
    Entry,
    Source,
    SourceOptions,
    Unused,
    sample_key,
    slice_location,
    slice_reader,
)
from tools.lib.shards.sources.split_names import SPLIT_WORDS, missing_files

if TYPE_CHECKING:
    import pyarrow

_OTHERS = ("README*", "LICENSE*", "*.md", "*.py", "dataset_info*.json", "state.json")
# Usual names of the two columns, the likeliest first.
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "images", "picture", "photo")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls", "class_id", "category", "y")
_CLASSES = "classes.json"
_CORRECT = "Correct it, or leave the row out"


def open_parquet(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Parquet files as Hugging Face's hub has them."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f"{root}: reading parquet needs pyarrow: pip install pyarrow") from error
    found, unused = _find(root)
    if not found.get("train"):
        raise UserError(f"{root}: no training files below it. {_nearest(root, unused)}")
    job = {
        "files": {str(path.relative_to(root)): path.stat().st_size for paths in found.values() for path in paths},
        "columns": [options.image_column, options.label_column],
        "class_order": options.class_order,
    }
    classes, order = _remembered(scratch, job) or _read_classes(found, options)

    def list_split(split: str) -> Iterator[Entry | Unused]:
        if split == "train":
            yield from unused
            scratch.mkdir(parents=True, exist_ok=True)
            write_synced(scratch / _CLASSES, json.dumps([job, classes, order]).encode())
        yield from _list_parquet(root, found[split], scratch / split, options, classes)

    splits = {split: functools.partial(list_split, split) for split in found}
    read, columns = slice_reader(scratch), [options.image_column, options.label_column]
    columns = [] if columns == [RECOGNISE.image_column, RECOGNISE.label_column] else columns
    return Source(
        "parquet", root, classes, [], splits, read, job["files"], copies=True, class_order=order, columns=columns
    )


def _remembered(scratch: Path, job: dict) -> tuple[list[str], str] | None:
    """The classes and their order as a listing of the same job found them: workers need not read all labels again."""
    if not (scratch / _CLASSES).is_file():
        return None
    listed, classes, order = json.loads((scratch / _CLASSES).read_bytes())
    if listed["columns"] != job["columns"]:
        raise UserError(
            f"{scratch.parent}: holds an unfinished conversion of the columns {' and '.join(listed['columns'])}. Name "
            "those, or move that folder away"
        )
    return (classes, order) if listed == job else None


# --- which files there are ---


def has_parquet(folder: Path) -> bool:
    """Return whether parquet files lie in a folder, or in folders as the hub's data/, CONFIG/ and CONFIG/train/.

    Arrow files of `save_to_disk` count as well: `open_parquet` says how they become parquet files.
    """
    below = []
    if folder.is_dir() and folder.name not in SPLIT_WORDS:
        below = [folder / name for name in contents_of(folder).folders if name not in SPLIT_WORDS]
    places = [path for at in (folder, *below) for path in (at, at / "train")]
    return any(next(path.glob("*.parquet"), None) or _is_saved_to_disk(path) for path in places)


def _is_saved_to_disk(folder: Path) -> bool:
    """Recognise a split as `save_to_disk` of Hugging Face's datasets library writes it. It must be exported."""
    return (folder / "state.json").is_file() and any(folder.glob("*.arrow"))


def _nearest(root: Path, unused: list[Unused]) -> str:
    """Say what probably helps where there are no training files."""
    names = [each.source for each in unused if each.kind == MISPLACED]
    if arrow := [name for name in names if name.endswith(".arrow")]:
        return (
            f"It has Arrow files ({named(arrow, 2)}), as save_to_disk of Hugging Face's datasets writes them: export "
            "each split as parquet, train-0.parquet and validation-0.parquet in a new folder, and give that"
        )
    expected = "The name of a file or of its folder states the split: train-*.parquet or train/*.parquet"
    if nameless := [name for name in names if name.endswith(".parquet")]:
        if root.resolve().name in SPLIT_WORDS:
            return f"Give the folder above it, {root.resolve().parent}"
        return f"{expected}. None is stated by {named(nameless, 3)}: rename them, or move them into {root}/train"
    return f"{expected}, and validation-*.parquet"


def _find(root: Path) -> tuple[dict[str, list[Path]], list[Unused]]:
    """The files of train and val, sorted, and everything else below the folder.

    Raises:
      UserError: the files are of several configurations of a dataset.
    """
    found: dict[str, list[Path]] = {}
    datasets, unused, there = set(), [], []
    for name in walk(root):
        there.append(name.source if isinstance(name, Unused) else name)
        if isinstance(name, Unused):
            unused.append(name)
        elif not name.endswith(".parquet"):
            unused.append(_no_parquet(name))
        elif not (split := _split_of(Path(name))):
            reason = "its name says no split: rename it to train-... or validation-..., or move it away"
            unused.append(Unused(MISPLACED, printable(name), reason))
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
    taken = (str(path.relative_to(root)) for paths in found.values() for path in paths)
    unused += missing_files(taken, there)
    return {split: sorted(found[split]) for split in ("train", "val") if split in found}, unused


def _no_parquet(name: str) -> Unused:
    if any(fnmatch(os.path.basename(name), pattern) for pattern in _OTHERS):
        return Unused(EXPECTED, printable(name), "part of the download, not of train or val")
    return Unused(MISPLACED, printable(name), "not a parquet file: move it away")


def _dataset_of(path: Path) -> str:
    """The folder above that of the split: files of one dataset have it in common."""
    parts = path.parent.parts
    splits = [depth for depth, part in enumerate(parts) if part in SPLIT_WORDS]
    return "/".join(parts[: splits[0]] if splits else parts) or "."


def _split_of(path: Path) -> str:
    """The split of a file by its name, as in train-00000-of-00002, or by the nearest folder of a split's name."""
    first = re.split(r"[^a-z]", path.name, maxsplit=1)[0]
    for word in (first, *reversed(path.parent.parts)):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return ""


# --- labels ---


@dataclasses.dataclass(frozen=True)
class _Labels:
    """The labels of a file.

    Attributes:
      column: integers or text, without nulls.
      is_text: True where they are text.
      names: names of the classes, as Hugging Face's ClassLabel stores them; [] where there are none.
    """

    column: "pyarrow.ChunkedArray"
    is_text: bool
    names: list[str]

    def values(self) -> list:
        """Those that occur, each once."""
        return self.column.unique().to_pylist()


def _read_classes(found: dict[str, list[Path]], options: SourceOptions) -> tuple[list[str], str]:
    """The classes, and who decided their order. Reads the labels of all files.

    Raises:
      UserError: a file is damaged, lacks a column, or differs from the first one; a label is not one.
    """
    labels = {path: _read_labels(path, options) for paths in found.values() for path in paths}
    start, first = next(iter(labels.items()))
    for path, each in labels.items():
        if (each.is_text, each.names) != (first.is_text, first.names):
            raise UserError(f"{path}: the kind or list of its classes is not that of {start}. Write both alike")
    classes, order = first.names, "given"
    if not classes and first.is_text:
        names = {name for path in found["train"] for name in labels[path].values()}
        classes, order = sorted_classes(list(names), options.class_order or "text"), options.class_order or "unstated"
    elif not classes:
        top = max(number for path in found["train"] for number in labels[path].values())
        if top >= max(1000, 100 * sum(len(labels[path].column) for path in found["train"])):
            raise UserError(_where(labels, {top}, "too large for a class number"))
        classes = [str(number) for number in range(top + 1)]
    known = {*(classes if first.is_text else range(len(classes)))}
    if unknown := {value for each in labels.values() for value in each.values() if value not in known}:
        raise UserError(_where(labels, unknown, f"which is none of the {len(classes)} classes"))
    return classes, order


def _where(labels: dict[Path, _Labels], values: set, reason: str) -> str:
    """A sentence that names the first row that has one of the labels."""
    for path, each in labels.items():
        for row, value in enumerate(each.column.to_pylist()):
            if value in values:
                return f"{path}: row {row} has label {clipped(value)}, {reason}. {_CORRECT}"
    raise AssertionError(values)


def _read_labels(path: Path, options: SourceOptions) -> _Labels:
    import pyarrow
    import pyarrow.parquet as parquet

    with _naming_damage(path):
        file = parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow, options)
        column = file.read(columns=[options.label_column])[options.label_column]
        names = _class_names(file.schema_arrow, options.label_column)
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not len(column):
            raise UserError(f"{path}: has no rows. Download it again, or move it away")
        text = any(is_text(column.type) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string))
        integer = pyarrow.types.is_integer(column.type)
        for row, value in enumerate(column.to_pylist()):
            if value is None or value == "" or (integer and value < 0) or not (text or integer):
                shown = (
                    "no label" if value is None else f"label {clipped(repr(value), 30)} ({clipped(column.type, 30)})"
                )
                raise UserError(f"{path}: row {row} has {shown}; expected an integer from 0 on, or text. {_CORRECT}")
        return _Labels(column, text, names)


def _class_names(schema, label_column: str) -> list[str]:
    """The class names that Hugging Face's datasets library stores in the schema; [] where there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label_column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


# --- columns ---


def _check_columns(path: Path, schema, options: SourceOptions) -> None:
    """Raise a UserError that names what helps, unless the file has one column of encoded images and one of labels."""
    names = schema.names
    wanted = {"image": options.image_column, "label": options.label_column}
    usual = {"image": _IMAGE_COLUMNS, "label": _LABEL_COLUMNS}
    if missing := [kind for kind, name in wanted.items() if names.count(name) != 1]:
        nearest = {kind: next((name for name in usual[kind] if names.count(name) == 1), "NAME") for kind in missing}
        raise UserError(
            f"{path}: {' and '.join(wanted[kind] for kind in missing)} not once among its columns, "
            f"{clipped(named(names), 120)}. Name them: "
            + " ".join(f"--{kind}-column {name}" for kind, name in nearest.items())
        )
    kind = schema.field(options.image_column).type
    if not _holds_images(kind):
        raise UserError(
            f"{path}: column {options.image_column} is {clipped(kind)}; expected encoded images, as bytes or a struct "
            "with bytes. Name another: --image-column NAME"
        )


def _holds_images(kind) -> bool:
    """Return True for a pyarrow type of bytes, and for a struct with a field `bytes` of them."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and _is_bytes(kind.field(field).type)
    return _is_bytes(kind)


def _is_bytes(kind) -> bool:
    """Return True for a pyarrow type of bytes, dictionary-encoded or not."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    return any(is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary, types.is_binary_view))


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
            for row, (image, value) in enumerate(_rows(path, options)):
                content = _content(image, f"{path}: row {row}")
                label = numbers[value] if isinstance(value, str) else value
                location = slice_location(copy, file.tell(), len(content))
                source = f"{path.relative_to(root)}: row {row}"
                yield Entry(sample_key(classes[label], f"{total:09d}"), label, location, source)
                file.write(content)
                total += 1


def _rows(path: Path, options: SourceOptions) -> Iterator[tuple[bytes | dict | None, int | str]]:
    import pyarrow.parquet as parquet

    columns = [options.image_column, options.label_column]
    with _naming_damage(path):
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _content(image: bytes | dict | None, source: str) -> bytes:
    """The bytes of an image; b"" where there is none, which the conversion then names as an empty file."""
    if isinstance(image, dict):
        if image["bytes"] is None and image.get("path"):
            raise UserError(
                f"{source} names the file {clipped(image['path'])} and does not hold its bytes. Put them into the "
                "parquet file, or convert the folder of images"
            )
        image = image["bytes"]
    return image or b""
