"""Seconds from starting trainer/run.py to the end of its first step: at step 0, and resuming deep in a run.

Every measurement is a process of its own, as a user starts it, on the synthetic pipeline with ImageNet's number of
images. A run is "built" when its loop begins; its models are compiled by then, where they are compiled. Deep in a run
means at step 300,000 of the recipe's 387,810, with a checkpoint and a log to match: the files of a run of one step,
with another number in them. A cold cache is an empty folder for what torch.compile makes; a warm one holds it already.
Python's own files and the checkpoint are in the page cache throughout.
"""

import dataclasses
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError
from tools.lib.benchmark.processes import run_training
from tools.lib.benchmark.results import Row
from tools.lib.benchmark.runs import compiled_or_not, random_weights, teacher_or_none
from trainer.config.sections import RunConfig
from trainer.monitor.run_files import METRICS
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder
from trainer.state.writer import Writer

COLUMNS = {
    "what": "what",
    "seconds": "first step after, s",
    "min": "min",
    "max": "max",
    "built_s": "built after, s",
}
DEEP_STEP = 300_000
UNCOMPILED, COLD, WARM = "not compiled", "compiled, cold cache", "compiled, warm cache"
_NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
      settings: of the trainer.
      folder: holds a run that stands at DEEP_STEP (`deep`), torch.compile's cache (`cache`), and the run that is
        measured (`out`).
    """

    settings: dict[str, object]
    folder: Path


def resume(model: str, teacher: str, size: int, compile: str, repeats: int) -> Iterator[Row]:
    """The rows of the benchmark, for --compile no, yes or both; the teacher "null" is no teacher."""
    wanted = compiled_or_not(compile)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "data.pipeline": "synthetic",
            "data.synthetic_classes": _NUM_CLASSES,
            "data.image_size": size,
            "student.name": model,
            "run.log_every": 1,
            **_teacher(teacher, size, Path(scratch)),
        }
        setting = Setting(settings, Path(scratch))
        write_deep_run(setting)
        cases = [(UNCOMPILED, 0), (UNCOMPILED, DEEP_STEP)] if False in wanted else []
        if True in wanted:
            cases += [(COLD, 0), (WARM, 0), (WARM, DEEP_STEP)]  # The cold case fills the cache for the warm ones.
        results: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
        for number in range(repeats):
            for case in cases:
                results[case].append(first_step(setting, *case))
                if number == repeats - 1:
                    yield _row(*case, results[case])


def first_step(setting: Setting, mode: str, step: int) -> tuple[float, float]:
    """Start a run after `step`: seconds until its next step is done, and until it was built."""
    out, cache = setting.folder / "out", setting.folder / "cache"
    if mode == COLD:
        shutil.rmtree(cache, ignore_errors=True)
    if step:
        # Links are enough: a run replaces its files, it never writes into one.
        shutil.copytree(setting.folder / "deep", out, copy_function=os.link)
    settings = {
        **setting.settings,
        "run.compile": str(mode != UNCOMPILED).lower(),
        "run.stop_after_steps": step + 1,
    }
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    try:
        start_s, (session, *lines) = run_training(out, settings, environment)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert (session["step"], lines[0]["kind"], lines[0]["step"]) == (step, "train", step + 1), lines
    return lines[0]["time"] - start_s, session["time"] - start_s


def write_deep_run(setting: Setting) -> None:
    """Make the folder of a run that stands at DEEP_STEP from a run of a single step."""
    begun, deep = setting.folder / "begun", setting.folder / "deep"
    settings = {**setting.settings, "run.compile": "false", "run.stop_after_steps": 1}
    _, lines = run_training(begun, settings)
    content = checkpoint.read(checkpoint.path_of(checkpoints_folder(begun), 1))
    target = checkpoint.path_of(checkpoints_folder(deep), DEEP_STEP)
    target.parent.mkdir(parents=True)
    writer = Writer()
    writer.submit(target, {**content, "step": DEEP_STEP})
    writer.wait()
    if writer.failure:
        raise UserError(writer.failure)
    steps = range(RunConfig().log_every, DEEP_STEP + 1, RunConfig().log_every)
    log = [lines[0], *({**lines[1], "step": step} for step in steps)]
    (deep / METRICS).write_text("".join(json.dumps(line) + "\n" for line in log))
    shutil.rmtree(begun)


def _teacher(name: str, size: int, folder: Path) -> dict[str, object]:
    """The trainer's settings for a teacher of random weights, which are saved in the folder."""
    if teacher_or_none(name) is None:
        return {"teacher.name": "null"}
    return {"teacher.name": name, "teacher.checkpoint": random_weights(name, _NUM_CLASSES, size, folder)}


def _row(mode: str, step: int, results: list[tuple[float, float]]) -> Row:
    first, built = zip(*results, strict=True)
    return {
        "what": f"from step {step:,}",
        "augmentation": mode,
        "seconds": round(statistics.median(first), 2),
        "min": round(min(first), 2),
        "max": round(max(first), 2),
        "built_s": round(statistics.median(built), 2),
    }
