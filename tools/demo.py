"""The main job in small, without a download or a GPU: shards, a teacher, its recording, and students.

    make demo        or        python tools/demo.py [FOLDER]

The images are scikit-learn's handwritten digits: 1,797 real ones of 8 x 8 pixels. One student learns from the labels,
the same student and another one from what the teacher said, which is recorded once. Each stage is the command that the
README shows, with configs/demo.yaml; FOLDER/summary.json holds accuracies and durations, FOLDER/report/index.html
compares the runs.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error
from tools.lib.common.arguments import path_argument
from tools.lib.common.photos import write_digits
from trainer.monitor.report.page import write_report
from trainer.monitor.run_files import SUMMARY
from trainer.state.checkpoint import checkpoints, checkpoints_folder

REPOSITORY = Path(__file__).resolve().parents[1]
TEACHER, STUDENT, OTHER_STUDENT = "test_resnet", "test_byobnet", "test_efficientnet"
# A stage's folder: the model, and what it learns from.
MODELS = {
    "teacher": (f"teacher, {TEACHER}", "labels"),
    "student": (f"student, {STUDENT}", "labels"),
    "distilled": (f"student, {STUDENT}", "labels and recorded teacher (USI)"),
    "other": (f"student, {OTHER_STUDENT}", "labels and the same recording"),
}
_MARKER = ".demo"  # lies in the demo's folder: what an earlier demo left, which may be replaced


def demo(folder: Path) -> dict:
    """Run all stages in `folder`, replacing an earlier demo. Returns the summary: top-1 and seconds of the stages.

    Raises:
      UserError: the folder holds something else, or a stage failed.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
        raise UserError(f"{folder}: exists and is not an earlier demo's. Give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()
    write_digits(folder / "images")
    images, dataset, store = folder / "images", folder / "dataset", folder / "store"
    seconds = {}
    _run("Shards", "tools/shard_imagenet.py", "build", images, dataset, "--samples-per-shard", 500)
    settings = ("--config", REPOSITORY / "configs" / "demo.yaml", "--data.root", dataset)
    train = ("trainer/run.py", *settings)
    alone = ("--teacher.name", "null")
    # The teacher learns from unmixed images: it needs fewer epochs that way. The two students follow the scheme.
    as_teacher = (*train, "--student.name", TEACHER, *alone, "--augment.mix_prob", 0, "--schedule.epochs", 26)
    student, other = ("--student.name", STUDENT), ("--student.name", OTHER_STUDENT)
    seconds["teacher"] = _run("The teacher, on labels", *as_teacher, "--run.out", folder / "teacher")
    title = "The student alone, on labels"
    seconds["student"] = _run(title, *train, *student, *alone, "--run.out", folder / "student")
    teacher = ("--teacher.name", TEACHER, "--teacher.checkpoint", _newest_checkpoint(folder / "teacher"))
    title = "What the teacher says of every image of the training, recorded once"
    seconds["store"] = _run(title, "tools/record_teacher.py", store, *settings, *student, *teacher)
    recorded = ("--teacher.store", store)
    title = "The same student, distilled from the recording"
    seconds["distilled"] = _run(title, *train, *student, *recorded, "--run.out", folder / "distilled")
    title = "Another student, distilled from the same recording"
    seconds["other"] = _run(title, *train, *other, *recorded, "--run.out", folder / "other")
    write_report([folder / name for name in MODELS], folder / "report")
    summary = {f"{name}_top1": _top1(folder / name) for name in MODELS}
    summary |= {f"{name}_seconds": round(taken, 1) for name, taken in seconds.items()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _run(title: str, *command) -> float:
    """Run a stage, as a user would type it in the repository. Returns the seconds that it took."""
    command = [sys.executable, *(str(c).removeprefix(f"{REPOSITORY}/") for c in command)]
    print(f"\n=== {title} ===\n$ python {shlex.join(command[1:])}", flush=True)
    start_s = time.perf_counter()
    if subprocess.run(command, cwd=REPOSITORY).returncode:
        raise UserError(f"this stage failed, see above: python {shlex.join(command[1:])}")
    return time.perf_counter() - start_s


def _newest_checkpoint(run: Path) -> Path:
    return checkpoints(checkpoints_folder(run))[-1]


def _top1(run: Path) -> float:
    """Top-1 of the EMA weights, in percent."""
    return round(json.loads((run / SUMMARY).read_text())["evaluation"]["ema"]["top1"], 2)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    folder = _parse(arguments).folder.resolve()
    start_s = time.perf_counter()
    with exit_on_user_error():
        summary = demo(folder)
    table = Table(title="Top-1 of the EMA weights on 360 digits that none of them has seen")
    table.add_column("model")
    table.add_column("learned from")
    table.add_column("top-1 %", justify="right")
    table.add_column("took", justify="right")
    for name, (model, source) in MODELS.items():
        if name == "distilled":
            table.add_row(f"recording of {TEACHER}", "", "", f"{summary['store_seconds']:.0f} s")
        table.add_row(model, source, f"{summary[f'{name}_top1']:.2f}", f"{summary[f'{name}_seconds']:.0f} s")
    Console().print("\n", table, f"{time.perf_counter() - start_s:.0f} s in all. Everything is in {folder}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "folder", type=path_argument, nargs="?", default=REPOSITORY / "runs" / "demo", help="(default runs/demo)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
