"""Hugging Face parquet files: images and labels in columns."""

import json
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import UserError
from pipelines.files import replacing
from tools.sharding.entries import Entry, Source, SourceOptions, sample_key
from tools.sharding.slices import slice_reader

_PARQUET_SPLITS = {"train": ("train",), "val": ("validation", "val")}


def open_parquet(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """Parquet files as Hugging Face's hub has them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{root}: reading parquet needs pyarrow: pip install pyarrow") from error
    found = {
        split: sorted(path for path in root.rglob("*.parquet") if path.name.startswith(prefixes))
        for split, prefixes in _PARQUET_SPLITS.items()
    }
    if not found["train"]:
        raise UserError(f"{root}: no train-*.parquet below it. Expected train-*.parquet and validation-*.parquet")
    schema = parquet.read_schema(found["train"][0])
    if not {"image", "label"} <= set(schema.names):
        raise UserError(
            f"{found['train'][0]}: columns {', '.join(schema.names)}. Expected image (with bytes) and label"
        )
    names = _parquet_class_names(schema)
    if not names:
        top = max(max(parquet.read_table(path, columns=["label"])["label"].to_pylist()) for path in found["train"])
        names = [str(label) for label in range(top + 1)]
    splits = {
        split: lambda split=split, paths=paths: _list_parquet(root, paths, scratch, split, names)
        for split, paths in found.items()
        if paths
    }
    files = {str(path.relative_to(root)): path.stat().st_size for paths in found.values() for path in paths}
    return Source("parquet", root, names, [], splits, slice_reader(scratch), files, copies=True)


def _parquet_class_names(schema) -> list[str]:
    """The class names that Hugging Face's datasets library stores in the schema; [] where there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _list_parquet(root: Path, paths: list[Path], scratch: Path, split: str, names: list[str]) -> Iterator[Entry]:
    """Copy the images of each file one after the other into a scratch file, where any of them can be read alone.

    Parquet compresses rows in groups: reading single images in a shuffled order would read each group over and over.
    """
    import pyarrow.parquet as parquet

    (scratch / split).mkdir(parents=True, exist_ok=True)
    row = 0
    for number, path in enumerate(paths):
        copy = f"{split}/{number:05d}.bin"
        with replacing(scratch / copy) as file:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64, columns=["image", "label"]):
                for item in batch.to_pylist():
                    content, label = (item["image"] or {}).get("bytes") or b"", item["label"]
                    if label is None or not 0 <= label < len(names):
                        raise UserError(f"{path}: row {row} has label {label}; there are {len(names)} classes")
                    location, source = f"{copy}\n{file.tell()}\n{len(content)}", f"{path.relative_to(root)}: row {row}"
                    yield Entry(sample_key(names[label], f"{row:09d}"), label, location, source)
                    file.write(content)
                    row += 1


def has_parquet(root: Path) -> bool:
    """Whether a folder holds parquet files, itself or in data/."""
    return any(next(folder.glob("*.parquet"), None) is not None for folder in (root, root / "data"))
