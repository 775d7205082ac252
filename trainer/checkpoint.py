"""The state of a run and its files: written atomically, refused when they belong to another plan."""

import contextlib
import dataclasses
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from pipelines import PIXELS_VERSION
from pipelines.errors import UserError
from pipelines.files import replacing
from pipelines.plan import BEFORE
from trainer.config import Config, to_dict
from trainer.optim import ModelEma

FORMAT_VERSION = 1


@dataclasses.dataclass
class TrainState:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
      student, optimizer, scaler: their own states; ema: or None where no average is kept.
      plan: what the data depends on (TrainPlan.describe()) and the student's name and arguments; another is refused.
      config: the resolved configuration, audit: what of it differs from USI; for whoever finds the file.
      step: updates done.
    """

    student: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: dict
    config: dict
    audit: list[dict]
    step: int = 0


def save(folder: Path, state: TrainState, keep: int) -> Path:
    """Write the state to `folder`, all of it or nothing, and delete all but the `keep` newest files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state.step:08d}.pt"
    content = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "student": state.student.state_dict(),
        "ema": state.ema.module.state_dict() if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "plan": state.plan,
        "config": state.config,
        "audit": state.audit,
        "software": _software(),
    }
    for stale in folder.glob("*.partial"):  # of a process that was killed while it wrote
        stale.unlink()
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be written ({reason}). Make room; older ones are kept") from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load(path: Path, state: TrainState) -> list[str]:
    """Set the state to what the file holds.

    Returns:
      What differs from the configuration that the file was written under, of all that may: one sentence each.
    Raises:
      UserError: the file is damaged, or belongs to another plan; the first field that differs is named.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format_version"]
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Mend that and start again") from error
    except Exception as error:  # torch, pickle and zipfile each raise errors of their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {reason[:200]}). Remove it to resume from the one before"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}. Use another --run.out")
    refuse_other_plan(path, {**BEFORE, **content["plan"]}, state.plan)
    try:
        state.student.load_state_dict(content["student"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: of another model ({reason}). Start a new run with another --run.out") from error
    if state.ema is not None:
        # an average that was switched on later starts where the student stands
        state.ema.module.load_state_dict(content["ema"] or content["student"])
    _load_optimizer(state.optimizer, content["optimizer"])
    if state.scaler.is_enabled() and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    return _changes(content["config"], state.config) + _newer_software(content.get("software", {}))


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The saved moments under the present settings; torch would bring back the settings of the file, too."""
    groups = [
        {**{name: value for name, value in present.items() if name != "params"}, "params": group["params"]}
        for group, present in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _changes(saved: dict, current: dict) -> list[str]:
    """What of the training differs from the checkpoint's configuration, in words."""
    keys = [
        (section, name) for section in ("teacher", "distill", "optim", "schedule", "ema") for name in current[section]
    ]
    keys += [
        ("data", "pipeline"),
        ("data", "decode"),
        ("data", "hw_decoder_load"),
        *(("run", name) for name in ("precision", "tf32", "batch_norm")),
        ("run", "micro_batch"),
    ]
    defaults = to_dict(Config())  # a setting that is younger than the file had its default then
    before = {section: {**values, **saved.get(section, {})} for section, values in defaults.items()}
    return [
        f"{section}.{name} was {before[section][name]}, now it is {current[section][name]}"
        for section, name in keys
        if before[section][name] != current[section][name]
    ]


def _software() -> dict[str, str]:
    """What pixels and gradients depend on in their last bits."""
    versions = {"pipelines": str(PIXELS_VERSION)}
    for package in ("pillow", "torch", "torchvision", "timm", "nvidia-dali-cuda120"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _newer_software(saved: dict[str, str]) -> list[str]:
    return [
        f"{name} was {saved[name]}, now it is {present}: pixels or gradients may differ in their last bits"
        for name, present in _software().items()
        if saved.get(name, present) != present
    ]


# Fields of a plan that are a setting under another name.
_KEYS = {
    "seed": "run.seed",
    "global_batch": "run.global_batch",
    "image_size": "data.image_size",
    "window_shards": "data.window_shards (0 is data.shuffle global)",
}


def refuse_other_plan(path: Path, saved: dict, current: dict) -> None:
    """Raise a UserError that names the first field in which two plans differ."""
    for name in [*current, *(name for name in saved if name not in current)]:
        if saved.get(name) != current.get(name):
            key = _KEYS.get(name, name)
            raise UserError(
                f"{path}: belongs to another plan: {key} was {saved.get(name)}, now it is {current.get(name)}. "
                "Use the same settings and data, or start a new run with another --run.out"
            )
