"""Turns images into WebDataset shards with the index that training reads.

    python tools/shard_imagenet.py build SRC OUT     convert; run it again to resume after an interruption
    python tools/shard_imagenet.py merge OUT         finish a conversion that several machines shared
    python tools/shard_imagenet.py index ROOT        index existing WebDataset tars without rewriting them
    python tools/shard_imagenet.py verify OUT        find every file that differs from what was written
    python tools/shard_imagenet.py info OUT          what a dataset holds

docs/sharding.md describes sources, formats and guarantees.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error, write_error_line
from pipelines.common.launcher import array_task, launched
from pipelines.common.machine import num_cores
from pipelines.shards.manifest import CLASS_ORDERS, Manifest
from tools.lib.common.arguments import path_argument, positive
from tools.lib.common.units import human_seconds
from tools.lib.shards.build import KEPT, build, merge
from tools.lib.shards.conversion import BuildOptions
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.manifest_builder import TOOL
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources import KINDS
from tools.lib.shards.sources.source import SourceOptions
from tools.lib.shards.summary import summarize
from tools.lib.shards.verify import verify

_LINE_EVERY_S = 30.0  # Where there is no terminal, a line about the progress is printed this often at the most.


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    try:
        with exit_on_user_error():
            options.run(options)
    except KeyboardInterrupt:
        print(f"interrupted. {KEPT if options.command == 'build' else ''}".rstrip(), file=sys.stderr)
        sys.exit(130)


def _build(options: argparse.Namespace) -> None:
    part, parts = options.part or _part_from_environment()
    image = ImageOptions(audit=options.audit, resize_short=options.resize_short, quality=options.quality)
    start_s = time.perf_counter()
    with _progress() as (show, note):
        manifest = build(
            options.src,
            options.out,
            BuildOptions(options.seed, options.samples_per_shard, image),
            source_options=SourceOptions(
                options.source, options.class_order, options.image_column, options.label_column
            ),
            workers=options.workers,
            part=(part, parts),
            skip_bad=options.on_bad == "skip",
            on_shard=show,
            on_note=note,
        )
    took = human_seconds(time.perf_counter() - start_s)
    if manifest is None:
        print(f"part {part + 1}/{parts} is done in {took}. When all are: python {TOOL} merge {options.out}")
    else:
        print(f"{options.out}: {_counts(manifest)} (in {took})")


def _merge(options: argparse.Namespace) -> None:
    manifest = merge(options.out, skip_bad=options.on_bad == "skip")
    print(f"{options.out}: {_counts(manifest)}")


def _index(options: argparse.Namespace) -> None:
    with _progress() as (show, _):
        manifest = index_webdataset(
            options.root,
            out=options.out,
            audit=options.audit,
            skip_bad=options.on_bad == "skip",
            workers=options.workers,
            on_shard=show,
        )
    print(f"{options.out or options.root}: {_counts(manifest)}")


def _verify(options: argparse.Namespace) -> None:
    with _progress() as (show, _):
        faults = verify(options.out, decode=options.decode, workers=options.workers, on_shard=show)
    for fault in faults:
        print(fault)
    if faults:
        raise UserError(f"{options.out}: {len(faults)} faults. Restore the files named above, or build again")
    print(f"{options.out}: everything is as it was written")


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A function that shows how many shards are done, of how many, and one that shows a note.

    Where there is no terminal for a bar, plain lines say it every now and then.
    """
    console = Console(stderr=True)
    columns = TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    last_s = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last_s
        bar.update(task, completed=done, total=total)
        if bar.disable and time.monotonic() - last_s >= _LINE_EVERY_S:
            last_s = time.monotonic()
            console.print(f"{done:,} of {total:,} shards", highlight=False)

    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=None)
        yield show, lambda note: console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _info(options: argparse.Namespace) -> None:
    table = Table(show_header=False, box=None)
    for label, text in summarize(options.out).items():
        table.add_row(f"[bold]{label}[/bold]", escape(text))
    Console().print(table)


def _counts(manifest: Manifest) -> str:
    counts = ", ".join(f"{entry['samples']:,} {split}" for split, entry in manifest["splits"].items())
    remarks: dict[str, Any] = {**manifest["audit"]["counts"]}
    kinds = ("repaired", "rejected", "duplicates", "hidden", "left_out")
    notes = [f"{remarks[kind]:,} {kind.replace('_', ' ')}" for kind in kinds if remarks.get(kind)]
    for split, entry in manifest["splits"].items():
        if empty := entry["class_counts"].count(0):
            notes.append(f"{empty} classes without {split} images")
    return "; ".join([f"{counts} samples of {len(manifest['classes'])} classes", *notes])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="convert; run it again to resume after an interruption")
    _add_build_options(build_parser)

    merge_parser = commands.add_parser("merge", help="finish a conversion that several machines shared")
    merge_parser.add_argument("out", type=path_argument)
    merge_parser.set_defaults(run=_merge)

    index = commands.add_parser("index", help="index existing WebDataset tars without rewriting them")
    index.add_argument("root", type=path_argument, help="folder with train/*.tar and, if there is one, val/*.tar")
    where = "new folder for the index, with links to the tars: ROOT, perhaps read-only, is not written to"
    index.add_argument("--out", type=path_argument, metavar="DIR", help=where)
    index.set_defaults(run=_index)

    check = commands.add_parser("verify", help="find every file that differs from what was written")
    check.add_argument("out", type=path_argument)
    check.add_argument("--decode", action="store_true", help="also decode every image")
    check.set_defaults(run=_verify)

    info = commands.add_parser("info", help="what a dataset holds")
    info.add_argument("out", type=path_argument)
    info.set_defaults(run=_info)

    for command in (build_parser, merge_parser, index):
        text = "images that cannot be used: fail after having looked at everything (default), or leave them out"
        command.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help=text)
    for command in (build_parser, index):
        command.add_argument("--no-audit", dest="audit", action="store_false", help="read headers only, decode nothing")
    for command in (build_parser, index, check):
        command.add_argument("--workers", type=positive, default=num_cores(), help="processes (default: cores)")
    return parser.parse_args(arguments)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", type=path_argument, help="image folder, ILSVRC2012 tars, Kaggle's copy, or parquet files"
    )
    parser.add_argument("out", type=path_argument, help="dataset folder to make")
    parser.add_argument(
        "--source", choices=("auto", *KINDS), default="auto", help="kind of source (default: recognise)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the training samples (default 0)")
    parser.add_argument("--samples-per-shard", type=positive, default=5000, help="(default 5000: ImageNet, 550 MB)")
    parser.add_argument("--resize-short", type=positive, default=0, metavar="PX", help="shrink short sides to PX")
    parser.add_argument("--quality", type=positive, default=90, help="JPEG quality of shrunk images (default 90)")
    parser.add_argument(
        "--class-order",
        choices=CLASS_ORDERS,
        default="",
        help="order of class folders: text (torchvision's, the default) or numeric (timm's: 2 before 10)",
    )
    parser.add_argument("--image-column", default="image", metavar="NAME", help="of parquet files (default image)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="of parquet files (default label)")
    parser.add_argument("--part", type=_part, metavar="I/N", help="the part that one machine converts")
    parser.set_defaults(run=_build)


def _part(text: str) -> tuple[int, int]:
    """'2/4' -> (1, 4)."""
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not I/N, as in 1/4") from None
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text}: I runs from 1 to N")
    return part - 1, parts


def _part_from_environment() -> tuple[int, int]:
    """The part of a conversion that torchrun, srun or a job array started this process for; elsewhere all of it.

    Raises:
      UserError: a job array starts tasks with srun, so that both divide.
    """
    this, array = launched(by_hand=False), array_task()
    if this.size > 1 and array.size > 1:
        raise UserError(f"{array.by} and {this.by} both started several processes. Divide the work with --part I/N")
    this = array if array.size > 1 or array.ignored else this
    if this.ignored:
        write_error_line(f"note: {this.ignored}. --part I/N divides a conversion")
    if this.size > 1:
        write_error_line(
            f"note: this is part {this.rank + 1}/{this.size}, for {this.by} started {this.size} processes. "
            "--part 1/1 converts everything"
        )
    return this.rank, this.size


if __name__ == "__main__":
    main()
