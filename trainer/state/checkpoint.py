"""The state of a run and its files: copied to the host, hashed and written in the background, checked when read.

A checkpoint is written to a file of another name, synced and renamed: it is there in full or not at all. Its `digest`
covers all it holds. Reading takes the newest one that is whole, and refuses one of another plan.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.common.errors import ROOM, UserError, advice_against, clipped
from pipelines.common.files import replacing
from pipelines.plan.plan import BEFORE
from trainer.models.checkpoint_format import (
    FieldError,
    check_fields,
    check_moments,
    check_resumable,
    check_statistics,
    check_weights,
    first_not_finite,
    lacks_moments,
)
from trainer.models.files.torch_files import load_plain, memory_for
from trainer.state.checkpoint_settings import changes, check_same_plan, newer_software, software
from trainer.update.optimizer import ModelEma

FORMAT_VERSION = 1
_CHUNK = 64 << 20  # bytes of pinned memory that are asked for at once
_ALIGNMENT = 64  # a tensor in it begins at a multiple of so many bytes
BEST = "best.pt"
_OWN_NAME = re.compile(r"step-\d{8,}\.pt")
_OWN_PARTIAL = re.compile(
    r"(step-\d{8,}|best)\.pt\.[0-9a-f]{8}\.partial"
)  # as pipelines.common.files.replacing names them


@dataclasses.dataclass
class TrainState:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
      student, optimizer, scaler: their own states; ema: or None where no average is kept.
      plan: what the data depends on (TrainPlan.describe()) and the student's name and arguments; another is refused.
      config: the resolved configuration, audit: what of it differs from USI; for whoever finds the file.
      classes: the dataset's class names in the order of the labels, None where it has none.
      micro_batch: images of a forward pass on one rank; 0 as long as it is not known.
      step: updates done.
      evaluated: the update after which the weights were evaluated last; 0 is never.
      rank_statistics: of each rank, where ranks differ (TrainStep.local_statistics); [] where they do not.
      best: {"step", "weights": raw or ema, "top1"} of the best evaluation so far; {} without one.
    """

    student: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: dict
    config: dict
    audit: list[dict]
    classes: list[str] | None
    micro_batch: int = 0
    step: int = 0
    evaluated: int = 0
    rank_statistics: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    best: dict = dataclasses.field(default_factory=dict)


def content_of(state: TrainState) -> dict:
    """What a checkpoint holds but its digest, on the host, in memory of its own: the training may go on."""
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
    """What best.pt holds: the weights that `state.best` speaks of and no others, and how good they are."""
    model = state.ema.module if state.best["weights"] == "ema" else state.student
    return to_host(
        {
            **state.best,
            "metrics": metrics,
            "state_dict": model.state_dict(),
            **_origin(state),
        }
    )


def _origin(state: TrainState) -> dict:
    """What every file says of the run that it comes from."""
    return {
        "format_version": FORMAT_VERSION,
        "plan": state.plan,
        "config": state.config,
        "audit": state.audit,
        "classes": state.classes,
        "software": software(),
    }


def to_host(content: Any) -> Any:
    """A copy of nested dictionaries, lists and tensors; the device is waited for once, after all copies."""
    on_device: list[torch.Tensor] = []
    _map_leaves(content, lambda leaf: _append_if_on_gpu(leaf, on_device))
    copies = pinned_like(on_device)
    try:
        for copy, tensor in zip(copies, on_device, strict=True):
            copy.copy_(tensor, non_blocking=True)
    finally:  # PyTorch does not know that the device still writes into this memory, and would give it away
        if on_device:
            torch.cuda.current_stream(on_device[0].device).synchronize()
    in_order = iter(copies)

    def copied(leaf: Any) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        return next(in_order) if leaf.is_cuda else leaf.detach().clone()

    return _map_leaves(content, copied)


def _append_if_on_gpu(leaf: Any, tensors: list[torch.Tensor]) -> None:
    if torch.is_tensor(leaf) and leaf.is_cuda:
        tensors.append(leaf.detach())


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested dictionaries, lists and tuples again, with what `function` makes of everything that is none of these."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(item, function) for item in value)
    return function(value)


def pinned_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of these shapes, types and strides, which share a few pieces of pinned host memory.

    Pinning a piece takes longer than filling it, and PyTorch rounds its size up to a power of two. One piece for each
    tensor would be thousands of them. Each tensor still has a storage of its own, because torch.save writes whole
    storages.
    """
    sizes, places = [0], []  # bytes of each piece; for each tensor, its piece and its first byte in it
    for tensor in tensors:
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if sizes[-1] and sizes[-1] + size > _CHUNK:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += size
    pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() for size in sizes] if tensors else []
    return [
        _tensor_in(pieces[piece][start : start + tensor.nbytes], tensor)
        for tensor, (piece, start) in zip(tensors, places, strict=True)
    ]


def _tensor_in(memory: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """A tensor in uint8 `memory` of as many bytes as `like` has; the strides are those of torch.empty_like."""
    strides = torch.empty_like(like, device="meta").stride()
    return torch.from_numpy(memory).view(like.dtype).as_strided(like.shape, strides)


def digest_of(content: Any) -> str:
    """sha256 over names, types, shapes and bytes of nested dictionaries, lists, tensors and plain values, in hex."""
    sha = hashlib.sha256()

    def feed(value) -> None:
        if torch.is_tensor(value):
            sha.update(f"{value.dtype} {list(value.shape)};".encode())
            value = value.resolve_conj().resolve_neg().contiguous()
            sha.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(f"{len(value)} entries;".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, (list, tuple)):
            sha.update(f"{len(value)} items;".encode())
            for item in value:
                feed(item)
        else:
            sha.update(f"{value!r};".encode())

    feed(content)
    return sha.hexdigest()


class Writer:
    """Writes files one after the other, in a thread of its own.

    Attributes:
      failure: why a file could not be written, '' if all were. Nothing is written after a failure.
    """

    _AT_ONCE = 2  # files in memory; a slower disk makes the training wait

    def __init__(self):
        self.failure = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future] = []

    def submit(self, path: Path, content: dict, then: Callable[[], None] = lambda: None) -> None:
        """Write `content` with its digest to `path`, all of it or nothing, and call `then`.

        `content` is nobody else's from now on.
        """
        while len(self._pending) >= self._AT_ONCE:
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self._write, path, content, then))

    def wait(self) -> None:
        """Until the last file is on the disk, or has failed."""
        while self._pending:
            self._pending.pop(0).result()

    def _write(self, path: Path, content: dict, then: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            if name := first_not_finite(content):
                raise UserError(f"{name} is not finite. Lower optim.lr or change run.precision")
            write(path, content)
            then()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason, helps = " ".join(str(error).split())[:200], advice_against(error, ROOM)
            self.failure = f"{path}: cannot be written ({reason}). {helps}; older checkpoints are kept"
        except UserError as error:
            self.failure = f"{path}: not written: {error}"


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


def prepare(folder: Path, step: int) -> None:
    """Make a folder ready for a run that goes on after `step`, once no other run is working in it.

    Half files of processes that were killed are removed. Files of later steps, which were found damaged, are put aside
    under another name.

    Raises:
      UserError: a whole file of a later step has come since the run was set to `step`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial"):
        if _OWN_PARTIAL.fullmatch(stale.name):
            stale.unlink()
    for later in checkpoints(folder):
        if step_of(later) > step:
            with contextlib.suppress(DamagedError):
                read_state(later)
                raise UserError(f"{later}: another run has written it meanwhile. Start again: it goes on from there")
            later.rename(later.with_suffix(".damaged"))


def prune(folder: Path, keep: int, every: int) -> None:
    """Delete all but the `keep` newest checkpoints and those of steps that `every` divides; 0 divides none."""
    for old in checkpoints(folder)[:-keep]:
        if not every or step_of(old) % every:
            old.unlink()


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


def newest_complete(folder: Path) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint that is as it was written.

    Returns:
      its path, None if there is none; what it holds; what is wrong with later ones, a sentence each.
    Raises:
      UserError: a file cannot be read for another reason, which may pass.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_state(path), damaged
        except DamagedError as error:
            damaged.append(str(error))
    return None, {}, damaged


def read_state(path: Path) -> dict:
    """What a run's checkpoint holds, of which everything is there that a run needs to go on.

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
      UserError: it cannot be read, or is of another format; or the memory is too short, which is no damage.
    """
    try:
        content = load_plain(path)
        if not isinstance(content, dict) or "format_version" not in content:
            raise ValueError("no format version")
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}). Mend that and start again; all ranks read it, so "
            "run.out must be a folder that all machines share"
        ) from error
    except Exception as error:  # torch, pickle and zipfile each raise errors of their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DamagedError(f"{path}: damaged ({type(error).__name__}: {reason[:100]})") from error
    return checked(path, content)


def is_of_trainer(content: object) -> bool:
    """Whether what a file holds is a checkpoint of this trainer, of any version: one that says what it is of."""
    if not isinstance(content, dict) or not {"format_version", "config", "step"} <= content.keys():
        return False
    student = content["config"].get("student") if isinstance(content["config"], dict) else None
    return isinstance(student, dict) and "name" in student


def checked(path: Path, content: dict) -> dict:
    """What was read from a checkpoint, without its digest. What is in it is of the types that trainer reads.

    Raises:
      UserError: it is of another format, or memory is too short.
      DamagedError: it is not what was written, or a field of it is not what that field must be.
    """
    version = content.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {clipped(version)}, this program reads {FORMAT_VERSION}. Use the version of the "
            "program that wrote it, or start a new run with another --run.out"
        )
    digest = content.pop("digest", None)  # files of earlier versions have none
    try:
        with memory_for(path):
            if digest is not None and digest != digest_of(content):
                raise FieldError(f"its content does not have the hash {clipped(digest, 15)} it was written with")
        check_fields(content)
        if digest is None and lacks_moments(content):  # what was written may lack them: no gradient, no moments
            raise FieldError("'optimizer' has lost the moments of some parameters")
    except FieldError as error:
        raise DamagedError(f"{path}: damaged ({error})") from error
    return content


def load(path: Path, content: dict, state: TrainState) -> list[str]:
    """Set the state to what a file holds.

    Returns:
      What differs from the configuration that the file was written under, of all that may: one sentence each.
    Raises:
      UserError: the file belongs to another plan; the first field that differs is named.
    """
    check_same_plan(path, {**BEFORE, **content["plan"]}, state.plan)
    average = content["ema"] or content["student"]  # one that was switched on later starts where the student stands
    try:
        check_weights(content["student"], state.student)
        check_weights(average, state.student)
        check_moments(content["optimizer"], state.optimizer)
        check_statistics(content.get("rank_statistics", []), state.student)
    except FieldError as error:
        raise UserError(f"{path}: of another model ({error}). Start a new run with another --run.out") from error
    state.student.load_state_dict(content["student"])
    if state.ema is not None:
        state.ema.module.load_state_dict(average)
    _load_optimizer(state.optimizer, content["optimizer"])
    if state.scaler.is_enabled() and content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]
    state.evaluated = content.get("evaluated", state.step)
    state.best = content.get("best", {})
    state.rank_statistics = content.get("rank_statistics", [])
    state.micro_batch = content.get("micro_batch", state.micro_batch)
    return changes(content["config"], state.config) + newer_software(content.get("software") or {})


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The saved moments under the present settings; torch would bring back the settings of the file, too."""
    groups = [
        {**{name: value for name, value in present.items() if name != "params"}, "params": group["params"]}
        for group, present in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    # The fused update goes through weights and moments in the order of their memory: with other strides, as after
    # run.channels_last was changed, it mixes up the values on CPUs and is refused on GPUs.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
