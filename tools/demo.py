"""The main job in small, without a download or a GPU: shards, a teacher, a student alone, the same student distilled.

    make demo        or        python tools/demo.py [FOLDER]

The images are scikit-learn's handwritten digits: 1,797 real ones of 8 x 8 pixels. Each stage is the command that the
README shows, with configs/demo.yaml; FOLDER/summary.json holds the three accuracies, FOLDER/report/index.html compares
the three.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error
from tools.lib.common.arguments import path_argument
from trainer.monitor.report.page import write_report
from trainer.monitor.run_files import SUMMARY
from trainer.state.checkpoint import checkpoints, checkpoints_folder

REPOSITORY = Path(__file__).resolve().parents[1]
TEACHER, STUDENT = "test_resnet", "test_byobnet"
_MARKER = ".demo"  # lies in the demo's folder: what an earlier demo left, which may be replaced


def write_digits(folder: Path, num_train: int = 1437, num_val: int = 360) -> None:
    """scikit-learn's digits as FOLDER/{train,val}/DIGIT/*.jpg: grayscale JPEGs of 8 x 8 pixels, the same every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    train, val = train_test_split(
        np.arange(len(data.target)), train_size=num_train, test_size=num_val, random_state=0, stratify=data.target
    )
    for split, chosen in (("train", train), ("val", val)):
        for i in chosen:
            path = folder / split / str(data.target[i]) / f"digit-{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            # values 0 to 16 -> 0 to 255
            Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)).save(path, quality=95)


def demo(folder: Path) -> dict:
    """Run all stages in `folder`, replacing an earlier demo. Returns the summary.

    Raises:
      UserError: the folder holds something else, or a stage failed.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
        raise UserError(f"{folder}: exists and is not an earlier demo's. Give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()
    write_digits(folder / "images")
    images, dataset = folder / "images", folder / "dataset"
    _run("Shards", "tools/shard_imagenet.py", "build", images, dataset, "--samples-per-shard", 500)
    train = ("trainer/run.py", "--config", REPOSITORY / "configs" / "demo.yaml", "--data.root", dataset)
    alone = ("--teacher.name", "null")
    # The teacher learns from unmixed images: it needs fewer epochs that way. The two students follow the scheme.
    as_teacher = (*train, "--student.name", TEACHER, *alone, "--augment.mix_prob", 0, "--schedule.epochs", 26)
    as_student = (*train, "--student.name", STUDENT)
    _run("The teacher, on labels", *as_teacher, "--run.out", folder / "teacher")
    _run("The student alone, on labels", *as_student, *alone, "--run.out", folder / "student")
    teacher = ("--teacher.name", TEACHER, "--teacher.checkpoint", _newest_checkpoint(folder / "teacher"))
    _run("The same student, distilled from the teacher", *as_student, *teacher, "--run.out", folder / "distilled")
    runs = ("teacher", "student", "distilled")
    write_report([folder / name for name in runs], folder / "report")
    summary = {f"{name}_top1": _top1(folder / name) for name in runs}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _run(title: str, *command) -> None:
    """A stage, as a user would type it in the repository."""
    command = [sys.executable, *(str(c).removeprefix(f"{REPOSITORY}/") for c in command)]
    print(f"\n=== {title} ===\n$ python {shlex.join(command[1:])}", flush=True)
    if subprocess.run(command, cwd=REPOSITORY).returncode:
        raise UserError(f"this stage failed, see above: python {shlex.join(command[1:])}")


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
    table.add_row(f"teacher, {TEACHER}", "labels", f"{summary['teacher_top1']:.2f}")
    table.add_row(f"student, {STUDENT}", "labels", f"{summary['student_top1']:.2f}")
    table.add_row(f"student, {STUDENT}", "labels and teacher (USI)", f"{summary['distilled_top1']:.2f}")
    Console().print("\n", table, f"{time.perf_counter() - start_s:.0f} s in all. Everything is in {folder}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "folder", type=path_argument, nargs="?", default=REPOSITORY / "runs" / "demo", help="(default runs/demo)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
