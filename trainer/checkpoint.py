"""The state of a run and its files: written atomically, refused when they belong to another plan."""

import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from pipelines.errors import UserError
from trainer.optim import ModelEma

FORMAT_VERSION = 1
_PATTERN = "step-{:08d}.pt"


@dataclasses.dataclass
class TrainState:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
      student, optimizer, scaler: their own states; ema: or None where no average is kept.
      plan: what the data depends on (TrainPlan.describe() and the student's name); another plan is refused.
      config: the resolved configuration, for whoever finds the file.
      step: updates done.
    """

    student: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: dict
    config: dict
    step: int = 0


def save(folder: Path, state: TrainState, keep: int) -> Path:
    """Write the state to `folder`, all of it or nothing, and delete all but the `keep` newest files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _PATTERN.format(state.step)
    content = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "student": state.student.state_dict(),
        "ema": state.ema.module.state_dict() if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "plan": state.plan,
        "config": state.config,
    }
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load(path: Path, state: TrainState, device: torch.device) -> None:
    """Set the state to what the file holds.

    Raises:
      UserError: the file is damaged, or belongs to another plan; the first field that differs is named.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        version = content["format_version"]
    except Exception as error:  # torch, pickle and zipfile each raise errors of their own
        raise UserError(f"{path}: damaged ({type(error).__name__}). Remove it to resume from the one before") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}. Use another --run.out")
    refuse_other_plan(path, content["plan"], state.plan)
    state.student.load_state_dict(content["student"])
    if state.ema is not None and content["ema"] is not None:
        state.ema.module.load_state_dict(content["ema"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]


def refuse_other_plan(path: Path, saved: dict, current: dict) -> None:
    """Raise a UserError that names the first field in which two plans differ."""
    for name in [*current, *(name for name in saved if name not in current)]:
        if saved.get(name) != current.get(name):
            raise UserError(
                f"{path}: belongs to another plan: {name} was {saved.get(name)}, now it is {current.get(name)}. "
                "Use the same settings and data, or start a new run with another --run.out"
            )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
