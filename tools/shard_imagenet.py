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

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error, named, write_error_line
from pipelines.common.launcher import array_task, launched
from pipelines.common.machine import num_cores
from pipelines.shards.manifest import CLASS_ORDERS, Manifest
from tools.lib.common.arguments import path_argument
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.shards.build import KEPT, BuildOptions, Progress, build, merge
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.manifest_builder import TOOL
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources import KINDS
from tools.lib.shards.sources.source import SourceOptions
from tools.lib.shards.summary import summarize
from tools.lib.shards.verify import verify


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
    start_s = time.perf_counter()
    part, parts = options.part or _part_from_environment()
    image = ImageOptions(audit=options.audit, resize_short=options.resize_short, quality=options.quality)
    build_options = BuildOptions(options.seed, options.samples_per_shard, image)
    last, say = Progress(0, 0, 0), _Lines()

    def show(progress: Progress) -> None:
        nonlocal last
        last = progress
        elapsed_s = time.perf_counter() - start_s
        rates = f"{progress.images / elapsed_s:,.0f} images/s, {human_bytes(progress.nbytes / elapsed_s)}/s"
        bar.update(task, completed=progress.images, total=progress.total_images, description=rates)
        say(f"{progress.images:,} of {progress.total_images:,} images, {rates}")

    with _bar() as bar:
        task = bar.add_task("listing", total=None)
        manifest = build(
            options.src,
            options.out,
            build_options,
            source_options=SourceOptions(
                options.source, options.class_order, options.image_column, options.label_column
            ),
            workers=options.workers,
            part=(part, parts),
            skip_bad=options.on_bad == "skip",
            on_progress=show,
            on_note=lambda note: bar.console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True),
        )
    took = human_seconds(time.perf_counter() - start_s)
    converted = f"{last.images:,} images, {human_bytes(last.nbytes)} in {took}"
    if manifest is None:
        print(f"part {part + 1}/{parts} is done: {converted}. When all are: python {TOOL} merge {options.out}")
    else:
        print(f"{options.out}: {_counts(manifest)} ({converted if last.images else 'nothing was left to convert'})")


def _merge(options: argparse.Namespace) -> None:
    manifest = merge(options.out, skip_bad=options.on_bad == "skip")
    print(f"{options.out}: {_counts(manifest)}")


@contextlib.contextmanager
def _shard_progress() -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many shards are done, of how many, in a bar or in lines."""
    say = _Lines()
    with _bar() as bar:
        task = bar.add_task("shards", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            say(f"{done:,} of {total:,} shards")

        yield show


def _index(options: argparse.Namespace) -> None:
    with _shard_progress() as show:
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
    with _shard_progress() as show:
        faults = verify(options.out, decode=options.decode, workers=options.workers, on_shard=show)
    for fault in faults:
        print(fault)
    if faults:
        raise UserError(f"{options.out}: {len(faults)} faults. Restore the files named above, or build again")
    print(f"{options.out}: everything is as it was written")


def _info(options: argparse.Namespace) -> None:
    table = Table(show_header=False, box=None)
    for label, text in summarize(options.out).items():
        table.add_row(f"[bold]{label}[/bold]", escape(text))
    Console().print(table)


def _counts(manifest: Manifest) -> str:
    counts = ", ".join(f"{entry['samples']:,} {split}" for split, entry in manifest["splits"].items())
    audit = manifest["audit"]
    words = {
        "repaired": "repaired",
        "rejected": "rejected",
        "duplicates": "groups of duplicates",
        "hidden": "hidden files passed over",
    }
    notes = [f"{count:,} {word}" for kind, word in words.items() if (count := audit["counts"].get(kind))]
    if left_out := audit.get("left_out"):
        names = named([item["source"] for item in left_out[:4]], 3)
        notes.append(f"{audit['counts'].get('left_out', len(left_out)):,} left out ({names})")
    for split, entry in manifest["splits"].items():
        if empty := entry["class_counts"].count(0):
            notes.append(f"{empty} classes without {split} images")
    return "; ".join([f"{counts} samples of {len(manifest['classes'])} classes", *notes])


class _Lines:
    """Prints the progress in plain lines every now and then, where there is no terminal to show a bar."""

    def __init__(self, every_s: float = 30.0):
        self._every_s = 0.0 if sys.stderr.isatty() else every_s
        self._last_s = time.monotonic()

    def __call__(self, text: str) -> None:
        if self._every_s and time.monotonic() - self._last_s >= self._every_s:
            self._last_s = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _bar() -> ProgressBar:
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    return ProgressBar(*columns, console=Console(stderr=True))


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
        command.add_argument("--workers", type=_positive, default=num_cores(), help="processes (default: cores)")
    return parser.parse_args(arguments)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", type=path_argument, help="image folder, ILSVRC2012 tars, Kaggle's copy, or parquet files"
    )
    parser.add_argument("out", type=path_argument, help="dataset folder to make")
    parser.add_argument(
        "--source", choices=("auto", *KINDS), default="auto", help="kind of source (default: recognise)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the order of the training samples (default 0)")
    parser.add_argument("--samples-per-shard", type=_positive, default=5000, help="(default 5000: ImageNet, 550 MB)")
    parser.add_argument("--resize-short", type=_positive, default=0, metavar="PX", help="shrink short sides to PX")
    parser.add_argument("--quality", type=_positive, default=90, help="JPEG quality of shrunk images (default 90)")
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


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


_positive.__name__ = "positive number"  # argparse shows this name.


def _seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 1 << 64:
        raise argparse.ArgumentTypeError(f"{number} is not in [0, 2**64)")
    return number


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
