"""What tools/doctor.py predicts, beside what a real run writes into metrics.jsonl; processes of their own, in turn.

The run takes ten seconds or more and writes four lines; the first one, of starting up, does not count. Images are
scikit-learn's digits and photographs, teachers have random weights.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError
from tools.demo import write_digits
from tools.lib.benchmark.processes import REPOSITORY, run_training
from tools.lib.benchmark.runs import random_weights
from tools.lib.common.opening import first_device
from tools.lib.common.photos import write_common_photographs
from tools.lib.shards.build import BuildOptions, build

COLUMNS = {
    "what": "what",
    "images_per_s": "predicted",
    "measured": "measured",
    "ratio": "ratio",
    "min": "min",
    "max": "max",
}
_RUN_S, _LINES = 12, 4
_NUM_CLASSES = 10
# dataset, side of the images in pixels, student, teacher, global batch, mixing group
_CASES = {
    "cpu": [
        ("digits", 32, "test_resnet", None, 64, 32),
        ("digits", 32, "test_resnet", "test_resnet", 64, 32),
        ("photographs", 64, "resnet18", None, 64, 32),
        ("photographs", 64, "resnet18", "test_resnet", 64, 32),
        ("photographs", 128, "test_resnet", "test_resnet", 64, 32),
    ],
    "cuda": [
        ("photographs", 224, "resnet18", None, 1024, 128),
        ("photographs", 224, "resnet50", None, 1024, 128),
        ("photographs", 224, "resnet50", "tresnet_v2_l", 1024, 128),
    ],
}


def predict(images: int, repeats: int, seconds: float) -> Iterator[dict]:
    """The rows: for each case the doctor's images/s, a real run's, and the one over the other.

    Args:
      images: photographs in the dataset; more than a global batch.
      seconds: of measuring for each of the doctor's stages.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, cases = Path(scratch), _CASES[first_device().type]
        write_digits(folder / "digits-images")
        write_common_photographs(folder / "photographs-images", images)
        for dataset in {case[0] for case in cases}:
            build(folder / f"{dataset}-images", folder / dataset, BuildOptions(samples_per_shard=500))
        for case in cases:
            settings = _settings(folder, *case)
            yield _row(case, [_pair(folder, settings, seconds) for _ in range(repeats)])


def _settings(
    folder: Path, dataset: str, size: int, student: str, teacher: str | None, global_batch: int, group: int
) -> dict[str, object]:
    settings = {
        "data.root": folder / dataset,
        "data.image_size": size,
        "student.name": student,
        "teacher.name": teacher or "null",
        "run.global_batch": global_batch,
        "schedule.epochs": 1000,  # the run is cut off
        "augment.mix_group": group,
    }
    if teacher is None:
        return settings
    weights = random_weights(teacher, _NUM_CLASSES, size, folder)
    return {**settings, "teacher.checkpoint": weights}


def _pair(folder: Path, settings: dict[str, object], seconds: float) -> tuple[float, float]:
    """Images/s as the doctor predicts them, and as a run then has them."""
    predicted = _predicted(folder / "doctor.json", settings, seconds)
    steps = _LINES * max(2, round(_RUN_S * predicted / settings["run.global_batch"] / _LINES))
    pace = {"run.stop_after_steps": steps, "run.log_every": steps // _LINES, "run.eval_every": 10**6}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        _, lines = run_training(Path(out), {**settings, **pace})
    later = [line for line in lines if line["kind"] == "train" and line["step"] > steps // _LINES]
    return predicted, statistics.harmonic_mean([line["images_per_s"] for line in later])


def _predicted(out: Path, settings: dict[str, object], seconds: float) -> float:
    command = [sys.executable, REPOSITORY / "tools" / "doctor.py", REPOSITORY / "configs" / "usi.yaml"]
    command += ["--no-trials", "--seconds", seconds, "--json", out]
    command += [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"tools/doctor.py ended with code {done.returncode}: {done.stderr.strip().rpartition(chr(10))[2]}"
        )
    return json.loads(out.read_text())["images_per_s"]


def _row(case: tuple, pairs: list[tuple[float, float]]) -> dict:
    dataset, size, student, teacher, *_ = case
    ratios = [predicted / measured for predicted, measured in pairs]
    return {
        "what": f"{dataset}, {size} px, {student} {f'from {teacher}' if teacher else 'alone'}",
        "images_per_s": round(statistics.median(predicted for predicted, _ in pairs), 1),
        "measured": round(statistics.median(measured for _, measured in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }
