"""Measures what users wait for, side by side in the same run: medians of repeated, interleaved runs.

    python tools/benchmark.py NAME [--json FILE] [--OPTION VALUE ...]     NAME --help lists its options
    python tools/benchmark.py gpu [--out FOLDER] [--again PART ...]       the first ten minutes on a GPU
    python tools/benchmark.py table FILE ...                              results as tables in Markdown

Every row is measured on this machine, now, and beside the row that it is a ratio of. Nothing is estimated.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.common.errors import exit_on_user_error
from pipelines.common.machine import num_cores
from tools.lib.benchmark import decode as decodes
from tools.lib.benchmark import loader as loaders
from tools.lib.benchmark import resume as resumes
from tools.lib.benchmark import step as steps
from tools.lib.benchmark import teacher as teachers
from tools.lib.benchmark import train as trains
from tools.lib.benchmark.gpu import ALL, PARTS, gpu
from tools.lib.benchmark.results import (
    Result,
    Row,
    command_line,
    markdown,
    new_result,
    notes,
    progress_line,
    read_result,
    save,
    terminal_tables,
)
from tools.lib.common.arguments import path_argument
from tools.lib.common.hardware import first_device
from tools.lib.common.terminal import console
from tools.lib.common.timing import check_positive, check_result_file

Options = Mapping[str, int | float | str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A subcommand.

    Attributes:
      about: what is measured, in a line.
      rows: measures; called with the options by name. A generator's rows are shown and saved as they come.
      columns: key of a row -> its heading. Rows with the same "augmentation" or "setting" are a table.
      options: name -> default, whose type is that of the values; a tuple takes several values.
      on_gpu: defaults that differ where there is a GPU.
    """

    about: str
    rows: Callable[..., Iterable[Row]]
    columns: Mapping[str, str]
    options: Options
    on_gpu: Options = dataclasses.field(default_factory=dict)

    @property
    def defaults(self) -> Options:
        """The defaults on this machine."""
        return {**self.options, **(self.on_gpu if first_device().type == "cuda" else {})}


STUDENTS = ("resnet50", "mobilenetv3_large_100", "vit_small_patch16_224")
ON_GPU = {"models": STUDENTS, "teacher": "tresnet_v2_l", "batch": 256, "size": 224}
BENCHMARKS = {
    "loader": Benchmark(
        f"training batches of {loaders.SIZE_PX} px, against DALI's own reader, timm and webdataset, on all cores",
        loaders.loader,
        loaders.COLUMNS,
        {"images": 1024, "batch": 128, "repeats": 5},
    ),
    "decode": Benchmark(
        "DALI's decode paths: which work here, and how fast each makes the recipe's batches",
        decodes.decode,
        decodes.COLUMNS,
        {"images": 256, "batch": 32, "repeats": 3},
        {"images": 512, "batch": 128},
    ),
    "step": Benchmark(
        "an update on synthetic images, against a step written from timm's pieces, and against the models alone",
        steps.step,
        steps.COLUMNS,
        {
            "models": ("resnet18", "vit_tiny_patch16_224"),
            "teacher": "resnet34",
            "batch": 32,
            "size": 96,
            "precision": "auto",
            "compile": "no",
            "repeats": 5,
            "seconds": 2.0,
        },
        {**ON_GPU, "compile": "both"},
    ),
    "train": Benchmark(
        "a run fed by its own pipeline over photographs, against the same run on synthetic images",
        trains.train,
        trains.COLUMNS,
        {
            "models": ("resnet18",),
            "teacher": "resnet34",
            "images": 512,
            "batch": 32,
            "size": 96,
            "precision": "auto",
            "compile": "no",
            "repeats": 5,
            "seconds": 2.0,
        },
        {**ON_GPU, "images": 4096, "compile": "yes"},
    ),
    "teacher": Benchmark(
        "a teacher in bf16 and fp16 against fp32: its speed, and how far its outputs are from those in fp32",
        teachers.teacher,
        teachers.COLUMNS,
        {
            "teacher": "resnet34",
            "checkpoint": teachers.RANDOM,
            "images": 128,
            "batch": 32,
            "size": 96,
            "repeats": 5,
            "seconds": 1.0,
        },
        {"teacher": "tresnet_v2_l", "images": 1024, "batch": 256, "size": 224},
    ),
    "resume": Benchmark(
        "from the start of a process to its first training step, at the beginning of a run and deep in it",
        resumes.resume,
        resumes.COLUMNS,
        {"model": "test_resnet", "teacher": "test_byobnet", "size": 32, "compile": "no", "repeats": 3},
        {"model": "resnet50", "teacher": "tresnet_v2_l", "size": 224, "compile": "both"},
    ),
}
OPTIONS = {
    "images": "JPEGs of 500 x 375 pixels, which are made for it",
    "repeats": "runs of each row; the median counts",
    "seconds": "about how long each run takes",
    "batch": "images a batch",
    "models": "students",
    "model": "the student",
    "teacher": "with random weights; null measures the students without one",
    "checkpoint": "the teacher's weights, a file; random needs none",
    "size": "side of the images, pixels",
    "precision": "bf16, fp32, or auto: what a run takes on this device",
    "compile": "no, yes or both",
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = vars(_parse(arguments))
    with exit_on_user_error():
        command = options.pop("command")
        if command == "table":
            for result in map(read_result, options["files"]):
                print(markdown(result, columns_of(result)))
        elif command == "gpu":
            gpu(options["out"], options["again"])
        else:
            path = options.pop("json")
            check_positive(options)
            show(measure(command, path, options))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about, description=benchmark.about)
        for option, default in benchmark.defaults.items():
            about = f"{OPTIONS[option]} ({' '.join(default) if isinstance(default, tuple) else default})"
            if isinstance(default, tuple):
                command.add_argument(f"--{option}", default=default, help=about, nargs="+")
            else:
                command.add_argument(f"--{option}", default=default, help=about, type=type(default))
        command.add_argument("--json", type=path_argument, metavar="FILE", help="write the result to this file, too")
    about = "the first ten minutes on a GPU: tests, then speed; a later call continues with what is not done"
    command = commands.add_parser("gpu", help=about, description=about)
    command.add_argument(
        "--out", type=path_argument, default=Path("docs/results"), metavar="FOLDER", help="results (docs/results)"
    )
    names = [*(part.name for part in PARTS), ALL]
    about = f"repeat these parts, though they are done: {', '.join(names)}"
    command.add_argument("--again", nargs="+", choices=names, default=[], metavar="PART", help=about)
    command = commands.add_parser("table", help="print results that were written with --json as tables in Markdown")
    command.add_argument("files", type=path_argument, nargs="+", metavar="FILE")
    return parser.parse_args(arguments)


def measure(name: str, path: Path | None, options: Mapping[str, object]) -> Result:
    """Run a benchmark. After each row the result so far is in the file, if one is given."""
    check_result_file(path)
    result = new_result(name, options)
    save(result, path)
    shown = console()
    shown.print(f"{command_line(result)}: {num_cores()} cores, GPU: {result['machine']['gpu']}", soft_wrap=True)
    with shown.status("measuring"):
        for row in BENCHMARKS[name].rows(**options):
            result["rows"].append(row)
            shown.print(progress_line(row, BENCHMARKS[name].columns), soft_wrap=True, markup=False, highlight=False)
            save(result, path)
    result["complete"] = True
    save(result, path)
    return result


def show(result: Result) -> None:
    """Print a result's tables, and what there is to say about single rows."""
    shown = console()
    for table in terminal_tables(result["rows"], columns_of(result)):
        shown.print(table)
    for note in notes(result["rows"]):
        print(note)
    if any("ratio" in row for row in result["rows"]):
        print("A ratio is the median over neighbouring runs, which may differ from that of the medians.")


def columns_of(result: Result) -> Mapping[str, str]:
    """The columns of a result's tables; those of a benchmark that no longer exists are named like its values."""
    if result["benchmark"] in BENCHMARKS:
        return BENCHMARKS[result["benchmark"]].columns
    return {key: key for row in result["rows"] for key in row if key not in ("augmentation", "setting", "note")}


if __name__ == "__main__":
    main()
