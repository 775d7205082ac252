"""Measures what users wait for, side by side in the same run: medians of repeated, interleaved runs.

    python tools/benchmark.py NAME [--json FILE] [--OPTION VALUE ...]     NAME --help lists its options
    python tools/benchmark.py gpu [--out FOLDER] [--again PART ...]       the first ten minutes on a GPU
    python tools/benchmark.py table FILE ...                              results as tables in Markdown

Every row is measured against the row it is a ratio of, on this machine, now. Nothing is estimated.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.machine import num_cores
from tools.lib.benchmark import decode as decodes
from tools.lib.benchmark import loader as loaders
from tools.lib.benchmark import prediction as predictions
from tools.lib.benchmark import read as reads
from tools.lib.benchmark import resume as resumes
from tools.lib.benchmark import scale as scales
from tools.lib.benchmark import shard as shards
from tools.lib.benchmark import step as steps
from tools.lib.benchmark import teacher as teachers
from tools.lib.benchmark import train as trains
from tools.lib.benchmark.gpu import ALL, PARTS, gpu
from tools.lib.common.arguments import path_argument
from tools.lib.common.opening import first_device
from tools.lib.common.tables import command_line, for_terminal, markdown, notes
from tools.lib.common.timing import check_positive, check_result_file, console, machine


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A subcommand.

    Attributes:
      about: what is measured, in a line.
      rows: measures; called with the options by name. A generator's rows are saved as they come.
      columns: key of a row -> its heading. Rows with the same "augmentation" or "setting" are a table.
      options: name -> default, of which a value has the type; a tuple takes several values.
      on_gpu: defaults that are others where there is a GPU.
    """

    about: str
    rows: Callable[..., Iterable[dict]]
    columns: dict[str, str]
    options: dict[str, int | float | str | tuple[str, ...]]
    on_gpu: dict[str, int | float | str | tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, int | float | str | tuple[str, ...]]:
        """The options' on this machine."""
        return self.options | (self.on_gpu if first_device().type == "cuda" else {})


STUDENTS = ("resnet50", "mobilenetv3_large_100", "vit_small_patch16_224")
ON_GPU = {"models": STUDENTS, "teacher": "tresnet_v2_l", "batch": 256, "size": 224}
BENCHMARKS = {
    "read": Benchmark(
        "bytes from shards, on one core, from the page cache and from the disk",
        reads.read,
        reads.COLUMNS,
        {"images": 4096, "repeats": 7},
    ),
    "shard": Benchmark("writing shards, on one core", shards.shard, shards.COLUMNS, {"images": 400, "repeats": 7}),
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
        "the whole, a run fed by its own pipeline over photographs, against the same run on synthetic images",
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
        "a teacher in bf16 and fp16 against fp32: speed, and how far its outputs are",
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
    "scale": Benchmark(
        "training on more ranks, and the plan over more samples",
        scales.scale,
        scales.COLUMNS,
        {"model": "resnet18", "batch": 64, "size": 64, "repeats": 3},
        {"model": "resnet50", "batch": 1024, "size": 224},
    ),
    "resume": Benchmark(
        "from the start of a process to its first training step, at the beginning of a run and deep in it",
        resumes.resume,
        resumes.COLUMNS,
        {"model": "test_resnet", "teacher": "test_byobnet", "size": 32, "compile": "no", "repeats": 3},
        {"model": "resnet50", "teacher": "tresnet_v2_l", "size": 224, "compile": "both"},
    ),
    "predict": Benchmark(
        "what tools/doctor.py predicts, against what real runs then do",
        predictions.predict,
        predictions.COLUMNS,
        {"images": 2048, "repeats": 3, "seconds": 3.0},
    ),
}
OPTIONS = {
    "images": "JPEGs of 500 x 375 that are made for it",
    "repeats": "runs of each row; the median counts",
    "seconds": "about how long each run takes",
    "batch": "images a batch",
    "models": "students",
    "model": "the student",
    "teacher": "with random weights; of all students, where these are measured: null is none",
    "checkpoint": "the teacher's weights, a file; random needs none",
    "size": "side of the images, pixels",
    "precision": "bf16, fp32, or auto: bf16 on a GPU, fp32 on a CPU",
    "compile": "no, yes or both",
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = vars(_parse(arguments))
    with exit_on_user_error():
        command = options.pop("command")
        if command == "table":
            for result in map(read_result, options["files"]):
                print(markdown(result, BENCHMARKS[result["benchmark"]].columns))
        elif command == "gpu":
            gpu(options["out"], options["again"])
        else:
            path = options.pop("json")
            check_positive(options)
            show(command, measure(command, path, options))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about, description=benchmark.about)
        for option, default in benchmark.defaults.items():
            several = {"nargs": "+", "type": str} if isinstance(default, tuple) else {"type": type(default)}
            shown = " ".join(default) if isinstance(default, tuple) else default
            command.add_argument(f"--{option}", default=default, help=f"{OPTIONS[option]} ({shown})", **several)
        command.add_argument("--json", type=path_argument, metavar="FILE", help="write the result to this file, too")
    about = "the first ten minutes on a GPU: tests, then speed; a later call goes on with what is not done"
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


def measure(name: str, path: Path | None, options: dict) -> dict:
    """Run a benchmark; its result so far is in the file, if one is given, after each row."""
    check_result_file(path)
    day = datetime.date.today().isoformat()
    result = {"benchmark": name, "options": options, "date": day, "machine": machine(), "complete": False, "rows": []}

    def save() -> None:
        if path is not None:
            path.write_text(json.dumps(result, indent=1) + "\n")

    save()
    shown = console()
    shown.print(f"{command_line(result)}: {num_cores()} cores, GPU: {result['machine']['gpu']}", soft_wrap=True)
    with shown.status("measuring") as status:
        for row in BENCHMARKS[name].rows(**options):
            result["rows"].append(row)
            status.update(f"measuring; {len(result['rows'])} rows are done")
            save()
    result["complete"] = True
    save()
    return result


def show(name: str, result: dict) -> None:
    """Print a result's tables, and what there is to say about single rows."""
    shown = console()
    for table in for_terminal(result["rows"], BENCHMARKS[name].columns):
        shown.print(table)
    for note in notes(result["rows"]):
        print(note)
    if any("ratio" in row for row in result["rows"]):
        print("A ratio is the median over neighbouring runs, which may differ from that of the medians.")


def read_result(path: Path) -> dict:
    """What `measure` wrote.

    Raises:
      UserError: the file cannot be read, or is not one of these.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a file that --json wrote") from error
    if not isinstance(result, dict) or result.get("benchmark") not in BENCHMARKS:
        raise UserError(f"{path}: not a result of tools/benchmark.py. Give a file that --json wrote")
    return result


if __name__ == "__main__":
    main()
