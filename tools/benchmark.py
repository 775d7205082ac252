"""Measures what users wait for, side by side in the same run: medians of repeated, interleaved runs.

    python tools/benchmark.py read   [--images N] [--repeats R] [--json FILE]
    python tools/benchmark.py shard  [--images N] [--repeats R] [--json FILE]
    python tools/benchmark.py loader [--images N] [--repeats R] [--batch B] [--json FILE]
    python tools/benchmark.py scale  [--model M] [--size PX] [--batch B] [--repeats R] [--json FILE]
    python tools/benchmark.py resume [--model M] [--teacher T] [--size PX] [--compile] [--repeats R] [--json FILE]

Every row is measured against the row it is a ratio of, on this machine, now. Nothing is estimated.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich import box
from rich.table import Table

from pipelines.errors import exit_on_user_error
from tools.benchmarks import loader as loaders
from tools.benchmarks import read as reads
from tools.benchmarks import resume as resumes
from tools.benchmarks import scale as scales
from tools.benchmarks import shard as shards
from tools.benchmarks.measure import console, machine, num_cores
from tools.opening import first_device


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, images, repeats, about in (
        ("read", 4096, 7, "bytes from shards, on one core, from the page cache and from the disk"),
        ("shard", 400, 7, "writing shards, on one core"),
        ("loader", 1024, 5, "training batches, against DALI's own reader, timm, webdataset and FFCV"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("--images", type=int, default=images)
        _add_common(command, repeats)
    command.add_argument("--batch", type=int, default=128, help="images a batch; at most --images")
    _add_runs(commands)
    options = parser.parse_args(arguments)
    if options.command == "scale":
        columns, where = scales.COLUMNS, f"synthetic data, {num_cores()} cores, {first_device().type}"
        rows = scales.scale(options.repeats, options.model, options.size, options.batch)
    elif options.command == "resume":
        columns, where = resumes.COLUMNS, f"synthetic data, {num_cores()} cores, {first_device().type}"
        rows = resumes.resume(options.repeats, options.model, options.teacher, options.size, options.compile)
    elif options.command == "read":
        columns, where = reads.COLUMNS, "one reading thread"
        rows = reads.read(options.images, options.repeats)
    elif options.command == "shard":
        columns, where = shards.COLUMNS, "one core"
        rows = shards.shard(options.images, options.repeats)
    else:
        columns, where = loaders.COLUMNS, f"{loaders.SIZE_PX} px, {num_cores()} cores, {first_device().type}"
        rows = loaders.loader(options.images, options.repeats, options.batch)
    pictures = f"{options.images} JPEGs of 500 x 375, " if "images" in options else ""
    print(f"{pictures}{where}, median of {options.repeats}")
    shown = console()
    for title in dict.fromkeys(row.get("augmentation") for row in rows):
        shown.print(_table(title, columns, [row for row in rows if row.get("augmentation") == title]))
    for note in dict.fromkeys(f"{row['what']}: {row['note']}" for row in rows if "note" in row):
        print(note)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def _add_common(command: argparse.ArgumentParser, repeats: int) -> None:
    command.add_argument("--repeats", type=int, default=repeats)
    command.add_argument("--json", type=Path, help="write the result to this file, too")


def _add_runs(commands: argparse._SubParsersAction) -> None:
    """The benchmarks that start trainer/run.py: small models on a CPU, the recipe's on a GPU."""
    scale = commands.add_parser("scale", help="training on more ranks, the plan over more samples")
    resume = commands.add_parser("resume", help="from the start of a process to its first training step")
    for command, defaults in ((scale, scales.DEFAULTS), (resume, resumes.DEFAULTS)):
        _add_common(command, 3)
        shown = "; ".join(f"{device}: {', '.join(map(str, values))}" for device, values in defaults.items())
        command.add_argument("--model", help=f"student, any timm model (defaults of all options: {shown})")
        command.add_argument("--size", type=int, help="side of the images, pixels")
    scale.add_argument("--batch", type=int, help="global batch")
    resume.add_argument("--teacher", help="teacher, any timm model, of random weights; none for no teacher")
    resume.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compiled runs, too (default: on GPUs; minutes on a CPU)",
    )


def _table(title: str | None, columns: dict[str, str], rows: list[dict]) -> Table:
    columns = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for key, name in columns.items():
        table.add_column(name, justify="left" if key in ("what", "of") else "right")
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in columns))
    return table


if __name__ == "__main__":
    with exit_on_user_error():
        main()
