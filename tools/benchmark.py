"""Measures what users wait for, side by side in the same run: medians of repeated, interleaved runs.

    python tools/benchmark.py NAME [--json FILE] [--OPTION VALUE ...]     NAME --help lists its options
    python tools/benchmark.py gpu [--out FOLDER] [--again PART ...]       the first ten minutes on a GPU
    python tools/benchmark.py table FILE ...                              results as tables in Markdown

Every row is measured on this machine, now, and beside the row that it is a ratio of. Nothing is estimated.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.markdown import Markdown

from pipelines.common.errors import exit_on_user_error
from pipelines.common.machine import num_cores
from tools.lib.benchmark.gpu import PARTS, gpu
from tools.lib.benchmark.loader import SIZE_PX, loader
from tools.lib.benchmark.replay import replay
from tools.lib.benchmark.results import Result, Row, command_line, markdown, new_result, read_result, save, title
from tools.lib.benchmark.step import step
from tools.lib.benchmark.together import together
from tools.lib.benchmark.train import train
from tools.lib.common.arguments import path_argument
from tools.lib.common.hardware import first_device
from tools.lib.common.terminal import console
from tools.lib.common.timing import check_positive, check_result_file

# Each measures; it is called with the options by name. Rows are shown and saved as they come.
BENCHMARKS: dict[str, Callable[..., Iterable[Row]]] = {
    "loader": loader,
    "step": step,
    "train": train,
    "replay": replay,
    "together": together,
}
ABOUT = {
    "loader": f"training batches of {SIZE_PX} px, against DALI's own reader, timm, webdataset and FFCV, on all cores",
    "step": "an update on synthetic images, against a step written from timm's pieces, and against the models alone",
    "train": "a run fed by its own pipeline over photographs, against the same run on synthetic images",
    "replay": "an update with a live teacher, with its recorded outputs, and alone; recording; the store's reading",
    "together": "students that are trained together in one process, against one that is trained alone",
    "gpu": "the first ten minutes on a GPU: tests, then speed; a later call continues with what is not done",
    "table": "print results that were written with --json as tables in Markdown",
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = vars(_parse(arguments))
    with exit_on_user_error():
        command = options.pop("command")
        if command == "table":
            for result in map(read_result, options["files"]):
                print(markdown(result))
        elif command == "gpu":
            gpu(options["out"], options["again"])
        else:
            path = options.pop("json")
            check_positive(options)
            check_result_file(path)
            console().print(Markdown(markdown(measure(command, path, options))))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    commands = {
        name: subparsers.add_parser(
            name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        for name, about in ABOUT.items()
    }
    on_gpu = first_device().type == "cuda"
    _add_model_options(commands["step"], on_gpu, compile_on_gpu="both")
    _add_model_options(commands["train"], on_gpu, compile_on_gpu="yes")
    _add_model_options(commands["replay"], on_gpu, compile_on_gpu="yes")
    _add_model_options(commands["together"], on_gpu, compile_on_gpu="yes")
    commands["together"].add_argument("--students", type=int, nargs="+", default=[1, 2, 4, 8], help="how many together")
    commands["loader"].add_argument("--images", type=int, default=1024, help="about how many a timed run takes")
    commands["loader"].add_argument("--batch", type=int, default=128, help="images a batch")
    about = "JPEGs of 500 x 375 pixels, which are made for it"
    for name, on_cpu in (("train", 512), ("replay", 1024), ("together", 512)):
        commands[name].add_argument("--images", type=int, default=4096 if on_gpu else on_cpu, help=about)
    for name in BENCHMARKS:
        commands[name].add_argument("--repeats", type=int, default=5, help="runs of each row; the median counts")
        commands[name].add_argument("--json", type=path_argument, metavar="FILE", help="write the result here, too")
    commands["gpu"].add_argument("--out", type=path_argument, default="docs/results", metavar="FOLDER", help="results")
    about = f"repeat these parts, though they are done: {', '.join(PARTS)}"
    commands["gpu"].add_argument("--again", nargs="+", choices=PARTS, default=[], metavar="PART", help=about)
    commands["table"].add_argument("files", type=path_argument, nargs="+", metavar="FILE")
    return parser.parse_args(arguments)


def _add_model_options(command: argparse.ArgumentParser, on_gpu: bool, compile_on_gpu: str) -> None:
    """The options of benchmarks that train models."""
    students = ("resnet50", "mobilenetv3_large_100", "vit_small_patch16_224") if on_gpu else ("resnet18",)
    teacher, batch, size = ("tresnet_v2_l", 256, 224) if on_gpu else ("resnet34", 32, 96)
    about = "with random weights; null measures the students without one"
    command.add_argument("--models", nargs="+", default=students, help="students")
    command.add_argument("--teacher", default=teacher, help=about)
    command.add_argument("--batch", type=int, default=batch, help="images an update")
    command.add_argument("--size", type=int, default=size, help="side of the images, pixels")
    about = "auto is what a run takes on this device"
    command.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=about)
    compiled = compile_on_gpu if on_gpu else "no"
    command.add_argument("--compile", choices=("no", "yes", "both"), default=compiled, help="compile the models")
    command.add_argument("--seconds", type=float, default=2.0, help="about how long each run takes")


def measure(name: str, path: Path | None, options: Mapping[str, object]) -> Result:
    """Run a benchmark. After each row the result so far is in the file, if one is given."""
    result = new_result(name, options)
    save(result, path)
    shown = console()
    shown.print(f"{command_line(result)}: {num_cores()} cores, GPU: {result['machine']['gpu']}", soft_wrap=True)
    with shown.status("measuring"):
        for row in BENCHMARKS[name](**options):
            result["rows"].append(row)
            found = f"{row['images_per_s']:,} images/s" if "images_per_s" in row else row.get("note", "")
            shown.print(f"{title(row)}, {row['what']}: {found}", soft_wrap=True, markup=False, highlight=False)
            save(result, path)
    result["complete"] = True
    save(result, path)
    return result


if __name__ == "__main__":
    main()
