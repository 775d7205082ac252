"""The checkpoints of a run: what they hold, where they lie, and how they are read and written.

A checkpoint is written to a file of another name, synced and renamed: it is there in full or not at all. Its digest
covers all it holds.
"""

import re
from pathlib import Path
from typing import Any

import torch

from pipelines.common.errors import UserError, clipped
from pipelines.common.files import replacing
from pipelines.plan.plan import BEFORE
from trainer.cluster.code_version import software
from trainer.cluster.memory import is_out_of_memory
from trainer.models.checkpoint_format import (
    FORMAT_VERSION,
    DamagedError,
    FieldError,
    check_moments,
    check_resumable,
    check_statistics,
    checked,
    digest_of,
)
from trainer.models.files.torch_files import load_plain
from trainer.state.checkpoint_settings import changes, check_same_plan, store_changes
from trainer.state.train_state import TrainState

BEST = "best.pt"
_FOLDER = "checkpoints"
_OWN_NAME = re.compile(r"step-\d{8,}\.pt")


def checkpoints_folder(run: Path) -> Path:
    """Where a run's folder has its checkpoints; `run` may be that folder itself."""
    return run if run.name == _FOLDER else run / _FOLDER


def to_host(value: Any) -> Any:
    """A copy in host memory of nested dictionaries, lists and tensors."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_host, value))
    return value


def content_of(state: TrainState) -> dict:
    """What a checkpoint holds, without its digest: a copy on the host, so that the training may continue."""
    return to_host(
        {
            "step": state.step,
            "evaluated": state.evaluated,
            "best": state.best,
            "student": state.student.state_dict(),
            "ema": state.ema.module.state_dict() if state.ema else None,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "micro_batch": state.micro_batch,
            "rank_statistics": state.rank_statistics,
            **_origin(state),
        }
    )


def best_content_of(state: TrainState, metrics: dict[str, float]) -> dict:
    """What best.pt holds: the weights that `state.best` names and no others, and their metrics."""
    model = state.ema.module if state.ema and state.best.get("weights") == "ema" else state.student
    return to_host(
        {
            **state.best,
            "metrics": metrics,
            "state_dict": model.state_dict(),
            **_origin(state),
        }
    )


def _origin(state: TrainState) -> dict:
    """The fields that say which run a file comes from."""
    return {
        "format_version": FORMAT_VERSION,
        "plan": state.plan,
        "config": state.config,
        "audit": state.audit,
        "stores": state.stores,
        "classes": state.classes,
        "software": software(),
    }


def write(path: Path, content: dict) -> None:
    """Write `content` with its digest, all of it or nothing. A full disk is an OSError, or torch's RuntimeError."""
    with replacing(path) as file:
        torch.save({**content, "digest": digest_of(content)}, file)


def path_of(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint."""
    return folder / f"step-{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step of a checkpoint's file."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; files of other names, such as copies, are not the run's."""
    return sorted((path for path in folder.glob("step-*.pt") if _OWN_NAME.fullmatch(path.name)), key=step_of)


def newest_complete(folder: Path) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint that is intact.

    Returns:
      its path, None if there is none; what it holds; for each later one a sentence that says how it is damaged.
    Raises:
      UserError: a file cannot be read for another reason, which may be temporary.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_state(path), damaged
        except DamagedError as error:
            damaged.append(str(error))
    return None, {}, damaged


def read_state(path: Path) -> dict:
    """What a run's checkpoint holds, with everything that a run needs to resume.

    Raises:
      DamagedError, UserError: as `read`.
    """
    content = read(path)
    try:
        check_resumable(content, step_of(path))
    except FieldError as error:
        raise DamagedError(f"{path}: damaged ({error})") from error
    return content


def read(path: Path) -> dict:
    """What a checkpoint holds, checked against its digest.

    Raises:
      DamagedError: it is truncated or changed.
      UserError: it cannot be read, is of another format, or does not fit into memory, which is no damage.
    """
    try:
        content = load_plain(path)
        if not isinstance(content, dict) or "format_version" not in content:
            raise ValueError("no format version")
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}). Fix that and start again; all ranks read it, so "
            "run.out must be a folder that all machines share"
        ) from error
    except Exception as error:  # torch, pickle and zipfile each raise their own types of errors.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DamagedError(f"{path}: damaged ({type(error).__name__}: {reason[:100]})") from error
    return checked(path, content)


def load(path: Path, content: dict, state: TrainState) -> list[str]:
    """Set the state to what a file holds.

    Returns:
      one sentence for each setting, store and package that may change and has changed since the file was written.
    Raises:
      UserError: the file belongs to another plan; the first field that differs is named.
    """
    check_same_plan(path, {**BEFORE, **content["plan"]}, state.plan)
    ema = content["ema"] or content["student"]  # An EMA that was switched on since starts from the student.
    try:
        check_moments(content["optimizer"], state.optimizer)
        check_statistics(content.get("rank_statistics", []), state.student)
        _load_weights(state.student, content["student"])
        if state.ema is not None:
            _load_weights(state.ema.module, ema)
    except FieldError as error:
        reason = clipped(error, 200)
        raise UserError(f"{path}: of another model ({reason}). Start a new run with another --run.out") from error
    _load_optimizer(state.optimizer, content["optimizer"])
    if state.scaler.is_enabled() and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    state.evaluated = content.get("evaluated", state.step)
    state.best = content.get("best", {})
    state.rank_statistics = content.get("rank_statistics", [])
    state.micro_batch = content.get("micro_batch", state.micro_batch)
    versions = content.get("software") or {}
    newer = [
        f"{name} was {versions[name]}, now it is {present}: pixels or gradients may differ in their last bits"
        for name, present in software().items()
        if versions.get(name, present) != present
    ]
    stores = store_changes(content.get("stores", {}), state.stores)
    return changes(content["config"], state.config) + stores + newer


def _load_weights(model: torch.nn.Module, saved: dict) -> None:
    """Load the weights; a FieldError says that they are not the model's."""
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        # Errors of memory and of the GPU say nothing about the weights; PyTorch may quote them among those that do.
        if is_out_of_memory(error) or type(error) is not RuntimeError or "an exception occurred" in str(error):
            raise
        raise FieldError(str(error)) from error


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load the saved moments and keep the present settings, which torch would replace by those of the file."""
    groups = [
        {**{name: value for name, value in present.items() if name != "params"}, "params": group["params"]}
        for group, present in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    # The fused update reads weights and moments in the order of their memory. Moments with other strides, as after a
    # change of run.channels_last, would be mixed up on CPUs, and GPUs refuse them.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
