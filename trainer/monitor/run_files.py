"""The files in a run's folder: what they hold, and what of them can be used after they were cut off or edited.

metrics.jsonl has a line for each interval of training ("train"), evaluation ("eval"), session and rollback;
the line of a session has its device, the precision and the pipeline that it resolved, and whether other runs trained
in the same process ("together");
summary.json says how the latest session ended. The functions here return only lines and values of the expected types.
"""

import json
from pathlib import Path
from typing import TypedDict

from pipelines.common.files import naming_file, read_json, split_json_lines, write_synced
from pipelines.common.settings import fits
from trainer.config.recipe import AuditRow
from trainer.state.train_state import Best

METRICS = "metrics.jsonl"
UNUSABLE = "metrics.jsonl.unusable"  # It gets the lines of metrics.jsonl that are not records, unchanged.
SUMMARY = "summary.json"

Evaluation = dict[str, dict[str, float]]  # For the raw and the EMA weights: top1, top5, loss, images.


class _TrainNumbers(TypedDict):
    step: int
    epoch: int
    loss: float
    lr: float
    images_per_s: float
    input_wait: float


class TrainRecord(_TrainNumbers, total=False):
    """A line about the updates since the last one; the teacher's fields, absent without a teacher, are in percent."""

    teacher_top1: float
    agreement: float


class SessionSummary(TypedDict, total=False):
    """The part of a summary that is about the latest session; stopped_by names the signal that stopped it."""

    start_step: int
    elapsed_s: float
    images_per_s: float
    ranks: int
    device: str
    stopped_by: str


class Summary(TypedDict):
    """summary.json. version and source say which code the latest session ran (trainer.cluster.code_version)."""

    finished: bool
    step: int
    total_steps: int
    student: str
    teacher: str | None
    dataset: str
    deviations: list[AuditRow]
    quarantined: int
    evaluation: Evaluation
    best: Best
    version: str
    source: str
    session: SessionSummary


_MOST_COUNT = 2**53  # Larger whole numbers are no counts, and no float holds them.
_MOST_TIME_S = 2.5e11  # This is the year 9892; Python has no later dates.
_COUNTS = ("from_step", "epoch", "total_steps", "steps_per_epoch")
_NUMBERS = ("loss", "lr", "images_per_s", "input_wait", "teacher_top1", "agreement")
_NEEDED = {  # What a line must have besides "kind" and "step".
    "rollback": ("from_step",),
    "train": ("epoch", "loss", "lr", "images_per_s", "input_wait"),
    "eval": ("epoch",),
}


def is_metrics_line(line: object) -> bool:
    """True for a line of metrics.jsonl, also of a kind that is unknown here."""
    return isinstance(line, dict) and isinstance(line.get("kind"), str) and _is_count(line.get("step"))


def is_reportable(line: object) -> bool:
    """True for a line of metrics.jsonl with every field of its kind, each of the type that the report needs."""
    if not isinstance(line, dict) or not is_metrics_line(line):
        return False
    weights = [line[name] for name in ("raw", "ema") if name in line]
    time = line.get("time", 0)
    return (
        all(line.get(name) is not None for name in _NEEDED.get(line["kind"], ()))
        and all(_is_count(line[name]) for name in _COUNTS if name in line)
        and all(_is_number(line[name]) for name in _NUMBERS if line.get(name) is not None)
        and all(isinstance(metrics, dict) and _is_number(metrics.get("top1")) for metrics in weights)
        and _is_number(time)
        and 0 <= time <= _MOST_TIME_S
    )


def last_validation(path: Path) -> str:
    """The digest of the validation images in the latest session of a metrics.jsonl that has one; "" without one."""
    lines, _ = split_json_lines(path, is_metrics_line)
    return next((line["validation"] for line in reversed(lines) if line.get("validation")), "")


def read_summary(path: Path) -> dict:
    """The summary of a session as Summary; {} without one."""
    summary = read_json(path)
    if (
        isinstance(summary.get("finished"), bool)
        and isinstance(summary.get("session"), dict)
        and all(_is_count(summary.get(name)) for name in ("step", "total_steps"))
        and fits(summary.get("deviations"), list[AuditRow])
    ):
        return summary
    return {}


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json, all of it or nothing."""
    with naming_file(path):
        write_synced(path, (json.dumps(summary, indent=1) + "\n").encode())


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _MOST_COUNT)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_COUNT
