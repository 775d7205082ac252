"""Seconds from starting trainer/run.py to the end of its first step: from step 0, and going on deep in a run.

Every measurement is a process of its own, as a user starts it, on the synthetic pipeline with ImageNet's number of
images. "built" is when everything stands and the loop begins, compiled where it is compiled. Deep in a run means from a
checkpoint of step 300,000 of the recipe's 387,810, and a log of as many steps: the files of a run of one step, with
another number in them. A cold cache is an empty folder for what torch.compile makes, a warm one has been through it.
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
    """What all measurements share: settings of the trainer, and a folder that holds a run which stands at DEEP_STEP
    (`deep`), a cache of torch.compile's (`cache`), and the run that is measured (`out`).
    """

    settings: dict[str, object]
    folder: Path


def resume(model: str, teacher: str, size: int, compile: str, repeats: int) -> Iterator[dict]:
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
        cases += [(COLD, 0), (WARM, 0), (WARM, DEEP_STEP)] if True in wanted else []  # cold fills what warm finds
        found = {case: [] for case in cases}
        for turn in range(repeats):
            for (mode, step), results in found.items():
                results.append(first_step(setting, mode, step))
                if turn == repeats - 1:
                    yield _row(mode, step, results)


def first_step(setting: Setting, mode: str, step: int) -> tuple[float, float]:
    """Start a run after `step`: seconds until its next step is done, and until it was built."""
    out, cache = setting.folder / "out", setting.folder / "cache"
    if mode == COLD:
        shutil.rmtree(cache, ignore_errors=True)
    if step:
        shutil.copytree(setting.folder / "deep", out, copy_function=os.link)  # the run writes anew, never into a file
    settings = {
        **setting.settings,
        "run.compile": str(mode != UNCOMPILED).lower(),
        "run.stop_after_steps": step + 1,
    }
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    try:
        start_s, (session, *lines) = run_training(out, settings, environment=environment)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert (session["step"], lines[0]["kind"], lines[0]["step"]) == (step, "train", step + 1), lines
    return lines[0]["time"] - start_s, session["time"] - start_s


def write_deep_run(setting: Setting) -> None:
    """The folder of a run that stands at DEEP_STEP, from one that has done a single step."""
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


def _row(mode: str, step: int, results: list[tuple[float, float]]) -> dict:
    first, built = zip(*results, strict=True)
    return {
        "what": f"from step {step:,}",
        "augmentation": mode,
        "seconds": round(statistics.median(first), 2),
        "min": round(min(first), 2),
        "max": round(max(first), 2),
        "built_s": round(statistics.median(built), 2),
    }
