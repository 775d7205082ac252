"""Predicts the classes of images with a trained model: of files, of folders, of shards.

    python tools/predict.py --checkpoint CKPT-OR-RUN PATH [PATH ...] [--out FILE.csv]

PATH is an image, a shard (.tar), or a folder, which stands for all images and shards below it in the order of their
names. Images are transformed as in evaluation. An image that cannot be read or decoded becomes a row that says why.
"""

import argparse
import codecs
import collections
import csv
import dataclasses
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import numpy as np
import torch

from pipelines.common.errors import UserError, advice_against, exit_on_user_error, named
from pipelines.common.files import check_parent_folder, replacing
from pipelines.prefetch import read_ahead
from pipelines.shards.manifest import MANIFEST, read_manifest
from tools.lib.common.arguments import path_argument
from tools.lib.common.evaluation import ForwardConfig, on_device
from tools.lib.common.hardware import first_device
from tools.lib.common.terminal import tracked
from tools.lib.common.timing import check_positive
from tools.lib.predict.image_files import Item, decoded_batches, items_of, survey
from trainer.evaluation.trained import TrainedModel, descriptions, load
from trainer.models.class_names import check_order_stated, order_doubt

_BATCHES_AHEAD = 2
_ROW_GROUP = 8192  # rows that a parquet file is written by


@dataclasses.dataclass(frozen=True)
class Row:
    """The prediction for an image.

    Attributes:
      file: its path, SHARD.tar/KEY in a shard.
      error: why there is no prediction, "" if there is one.
      top: (class, words, probability) of the best classes, best first.
    """

    file: str
    error: str
    top: list[tuple[str, str, float]]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    try:
        with exit_on_user_error(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # It warns of large images and odd EXIF data.
            predict(options)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    where = "an image, a shard (.tar), or a folder with some at any depth; of a dataset give OUT/val"
    parser.add_argument("paths", type=path_argument, nargs="+", metavar="PATH", help=where)
    parser.add_argument(
        "--checkpoint", type=path_argument, help="file of weights, run folder (its best), or exported folder"
    )
    parser.add_argument("--name", help="timm's name of a model whose file does not say it; alone: timm's own weights")
    parser.add_argument("--classes", type=path_argument, metavar="FILE", help="names of the outputs, one on a line")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes of each image (default 5)")
    parser.add_argument("--batch", type=int, default=128, help="images of a forward pass (default 128)")
    kinds = ", ".join(WRITERS)
    parser.add_argument("--out", type=path_argument, metavar="FILE", help=f"{kinds} (default: CSV on standard output)")
    return parser.parse_args(arguments)


def predict(options: argparse.Namespace) -> None:
    """Check, load, predict every image, write."""
    check_options(options)
    num_images, no_images = survey(options.paths)
    trained = load(options.name, options.checkpoint, classes=options.classes)
    if not trained.num_outputs:
        raise UserError(f"{trained.source}: has no classifier, so it names no classes. Use a model that has one")
    check_datasets(options.paths, trained)
    device = first_device()
    print(_title(trained, device), file=sys.stderr)
    top_k, counts = min(options.top_k, trained.num_outputs), collections.Counter()
    items = (item for path in options.paths for item in items_of(path))
    rows = predictions(trained, items, top_k, options.batch, device)
    on_screen = options.out is None and sys.stdout.isatty()  # The rows themselves are shown there.
    shown = tracked(_counted(rows, counts), "predicting", num_images, hidden=on_screen)
    write(shown, top_k, options.out)
    failed = f", not usable (the column error says why): {counts['failed']:,}" if counts["failed"] else ""
    print(f"images: {counts['images']:,}{failed}{f', in {options.out}' if options.out else ''}", file=sys.stderr)
    if no_images:
        print(f"not images by their names: {named(no_images)}", file=sys.stderr)


def check_options(options: argparse.Namespace) -> None:
    """Raise a UserError about what could only fail after the model has been loaded, or all images looked at."""
    check_positive({"top-k": options.top_k, "batch": options.batch})
    if (out := options.out) is None:
        return
    if out.suffix not in WRITERS:
        raise UserError(f"--out {out}: ends in none of {', '.join(WRITERS)}. Name a file that does")
    check_parent_folder(out, f"--out {out}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("--out: parquet needs pyarrow: pip install -e '.[parquet]', or name a .csv file")


def check_datasets(paths: list[Path], trained: TrainedModel) -> None:
    """Raise a UserError if the outputs have no names and a path lies in a dataset whose class order is in doubt."""
    for root in {folder for path in paths for folder in (path, *path.absolute().parents)}:
        if not (root / MANIFEST).is_file():
            continue
        try:
            names, doubt = read_manifest(root)["classes"], order_doubt(root)
        except UserError:  # The manifest is of another program, or of a dataset that cannot be opened here.
            continue
        check_order_stated("" if trained.has_names_for(names) else doubt, trained.source)


def _title(trained: TrainedModel, device: torch.device) -> str:
    outputs = f"{trained.num_outputs:,} classes"
    if trained.classes is None:
        outputs = f"{trained.num_outputs:,} outputs without names, here their numbers (--classes FILE names them)"
    elif trained.classes_guessed:
        outputs += " taken to be ImageNet's (--classes FILE names others)"
    weights = f", {trained.weights} weights" if trained.weights else ""
    return f"{trained.name} ({trained.source}{weights}), {trained.transform.image_size} px, {outputs}, {device}"


# --- predictions ---


def predictions(
    trained: TrainedModel, items: Iterator[Item], top_k: int, batch: int, device: torch.device
) -> Iterator[Row]:
    """A row for each image, in order.

    Raises:
      UserError: a batch does not fit into the GPU's memory.
    """
    model, normalize, precision = on_device(trained, device, ForwardConfig())
    names = trained.classes or [str(output) for output in range(trained.num_outputs)]
    words = descriptions(names)

    @torch.inference_mode()
    def best(pixels: np.ndarray) -> Iterator[list[tuple[int, float]]]:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(normalize(torch.from_numpy(pixels).to(device)))
        top = logits.float().softmax(1).topk(top_k, dim=1)
        return (list(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True))

    for decoded in read_ahead(decoded_batches(items, trained.transform, batch), _BATCHES_AHEAD):
        usable = [pixels for _, pixels, _ in decoded if pixels is not None]
        try:
            found = best(np.stack(usable)) if usable else iter(())
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(f"--batch is {batch}: it does not fit into the GPU's memory. Give a smaller one") from error
        for name, pixels, error in decoded:
            yield Row(name, error, []) if pixels is None else _row(name, next(found), names, words)


def _row(name: str, best: list[tuple[int, float]], names: list[str], words: list[str]) -> Row:
    if any(probability != probability for _, probability in best):
        return Row(name, "the model's outputs are not finite", [])
    return Row(name, "", [(names[output], words[output], float(f"{probability:.6g}")) for output, probability in best])


def _counted(rows: Iterator[Row], counts: collections.Counter) -> Iterator[Row]:
    """The same rows; `counts` gets how many images there were, and how many failed."""
    for row in rows:
        counts["images"] += 1
        counts["failed"] += bool(row.error)
        yield row


# --- files ---


def write(rows: Iterator[Row], top_k: int, out: Path | None) -> None:
    """Write the rows as a file, all or nothing, or to standard output one by one.

    Raises:
      UserError: the file cannot be written.
    """
    names = ["file", "error", *(f"{name}_{i + 1}" for i in range(top_k) for name in ("class", "words", "probability"))]
    try:
        if out is None:
            write_csv(rows, names, sys.stdout.buffer)
            sys.stdout.flush()
            return
        with replacing(out) as file:
            WRITERS[out.suffix](rows, names, file)
    except BrokenPipeError:
        raise
    except OSError as error:
        where, helps = out or "standard output", advice_against(error, "Name another file")
        raise UserError(f"{where}: cannot be written ({error.strerror or error}). {helps}") from error


def _cells(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """A row by the names of a table's columns, None where there is no class."""
    return dict(itertools.zip_longest(names, (row.file, row.error, *itertools.chain.from_iterable(row.top))))


def write_csv(rows: Iterator[Row], names: Sequence[str], file: BinaryIO) -> None:
    """A line for each row, below the names of the columns; UTF-8."""
    table = csv.DictWriter(codecs.getwriter("utf-8")(file), names, lineterminator="\n")
    table.writeheader()
    table.writerows(_cells(row, names) for row in rows)


def write_jsonl(rows: Iterator[Row], _: Sequence[str], file: BinaryIO) -> None:
    """An object for each row, on a line of its own: file, error, and top, a list of the best classes."""
    for row in rows:
        top = [dict(zip(("class", "words", "probability"), each, strict=True)) for each in row.top]
        line = {"file": row.file, "error": row.error, "top": top}
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def write_parquet(rows: Iterator[Row], names: Sequence[str], file: BinaryIO) -> None:
    """The table of `write_csv`, with null where there is no class."""
    import pyarrow
    import pyarrow.parquet

    kinds = [pyarrow.float32() if name.startswith("probability") else pyarrow.string() for name in names]
    schema = pyarrow.schema(list(zip(names, kinds, strict=True)))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while part := list(itertools.islice(rows, _ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist([_cells(row, names) for row in part], schema=schema))


WRITERS: dict[str, Callable[[Iterator[Row], Sequence[str], BinaryIO], None]] = {
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


if __name__ == "__main__":
    main()
