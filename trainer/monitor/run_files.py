"""The files in a run's folder: what they hold, and what of them can be used after they were cut off or edited.

metrics.jsonl has a line for each interval of training ("train"), evaluation ("eval"), session and rollback;
summary.json says how the latest session ended. The functions here return only lines and values of the expected types.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from pipelines.common.errors import ROOM, UserError, advice_against
from pipelines.common.files import parsed_json, split_json_lines, write_synced
from trainer.config.recipe import are_audit_rows
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
    deviations: list[dict]
    quarantined: int
    evaluation: Evaluation
    best: Best
    version: str
    source: str
    session: SessionSummary


_MOST_COUNT = 2**53  # Larger whole numbers are no counts, and no float holds them.
_MOST_TIME_S = 2.5e11  # This is the year 9892; Python has no later dates.
_NUMBER = (int, float)
# _NEEDED: what a line must have besides "kind" and "step". _TYPES: the types of the fields that any line may have.
_NEEDED = {
    "session": (),
    "rollback": ("from_step",),
    "train": ("epoch", "loss", "lr", "images_per_s", "input_wait"),
    "eval": ("epoch",),
}
_TYPES = {
    **{name: int for name in ("step", "from_step", "epoch", "total_steps", "steps_per_epoch", "ranks")},
    **{name: _NUMBER for name in ("loss", "lr", "images_per_s", "input_wait")},
    **{name: (*_NUMBER, type(None)) for name in ("teacher_top1", "agreement")},
    **{name: str for name in ("kind", "host", "device", "validation")},
    **{name: dict for name in ("raw", "ema")},
    "time": _NUMBER,
}
_SUMMARY_TYPES = {"finished": bool, "step": int, "total_steps": int, "deviations": list, "session": dict}


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, errors of the system name the file. Errors of opening a file name it anyway, those of writing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def reporting_full_disk() -> Iterator[None]:
    """Inside, a full disk is a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{error.filename or 'run.out'}: cannot be written ({error.strerror}). {advice_against(error, ROOM)}. The "
            "same command then resumes from the newest checkpoint, if there is one"
        ) from error


def is_metrics_line(line: object) -> bool:
    """True for a line of metrics.jsonl, also of a kind that is unknown here."""
    return isinstance(line, dict) and isinstance(line.get("kind"), str) and _is_count(line.get("step"))


def is_reportable(line: object) -> bool:
    """True for a line of metrics.jsonl with every field of its kind, each of the right type."""
    if not isinstance(line, dict) or not is_metrics_line(line) or not _have_types(line, _TYPES):
        return False
    numbers = [line[name].get("top1") for name in ("raw", "ema") if name in line]
    return (
        all(name in line for name in _NEEDED.get(line["kind"], ()))
        and all(isinstance(number, _NUMBER) and abs(number) < _MOST_COUNT for number in numbers)
        and all(_is_count(line[name]) for name, kind in _TYPES.items() if kind is int and name in line)
        and all(abs(value) < _MOST_COUNT for value in line.values() if isinstance(value, int))
        and line.get("steps_per_epoch") != 0
        and 0 <= line.get("time", 0) <= _MOST_TIME_S
    )


def last_validation(path: Path) -> str:
    """The digest of the validation images in the latest session of a metrics.jsonl that has one; "" without one."""
    lines, _ = split_json_lines(path, is_reportable)
    return next((line["validation"] for line in reversed(lines) if "validation" in line), "")


def is_quarantine_line(line: object) -> bool:
    """True for a line of quarantine.jsonl."""
    return (
        isinstance(line, dict)
        and all(isinstance(line.get(name), str) for name in ("split", "shard"))
        and _is_count(line.get("offset"))
    )


def read_summary(path: Path) -> dict | None:
    """The summary of a session as Summary, {} if there is no file, None if what is there is no summary."""
    if not path.exists():
        return {}
    summary = parsed_json(path.read_bytes()) if path.is_file() else None
    if not isinstance(summary, dict) or not _SUMMARY_TYPES.keys() <= summary.keys():
        return None
    fits = _have_types(summary, _SUMMARY_TYPES) and _is_count(summary["step"]) and _is_count(summary["total_steps"])
    return summary if fits and are_audit_rows(summary["deviations"]) else None


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json, all of it or nothing."""
    with naming(path):
        write_synced(path, (json.dumps(summary, indent=1) + "\n").encode())


def _have_types(values: Mapping, types: Mapping) -> bool:
    """Whether each value whose type is given is of that type; true and false are no numbers."""
    return all(
        isinstance(value, types[name]) and (types[name] is bool or not isinstance(value, bool))
        for name, value in values.items()
        if name in types
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_COUNT
