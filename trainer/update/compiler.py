"""Whether the models are compiled, and by what."""

from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch
from torch import nn

from pipelines.common.errors import UserError
from trainer.cluster.world import World

COMPILE_PATIENCE_S = 3600  # The watchdog waits this long: compiling a large model is no hang.
_MOST_SHAPES = 64  # PyTorch's 8 would silently leave the later image sizes of a long schedule uncompiled.
T = TypeVar("T", bound=Callable)
Compiler = Callable[[T], T]


def uncompiled(function: T) -> T:
    """The compiler that leaves everything unchanged."""
    return function


def compiled(function: T) -> T:
    """torch.compile with dynamic=False: training uses few input shapes, and shape-specialised kernels are faster."""
    return cast(T, torch.compile(function, dynamic=False))


def choose_compiler(setting: bool | Literal["auto"], student: nn.Module, world: World) -> tuple[Compiler, str]:
    """What run.compile resolves to on these ranks. Every rank must call it.

    Args:
      setting: auto compiles on GPUs, where it works, unless the student has SyncBatchNorm layers.
    Returns:
      the compiler, the same on all ranks, and a note for the user, which may be "".
    Raises:
      UserError: true, and compiling does not work here.
    """
    if setting is False or (setting == "auto" and world.device.type != "cuda"):
        return uncompiled, ""
    if setting == "auto" and any(isinstance(module, nn.SyncBatchNorm) for module in student.modules()):
        reason = "because each SyncBatchNorm of run.batch_norm sync makes the host wait for the GPU"
    else:
        error = next(filter(None, world.all_gather([why_not(world.device)])), "")
        reason = f"torch.compile does not work here ({error})" if error else ""
    if not reason:
        torch._dynamo.config.cache_size_limit = _MOST_SHAPES
        return compiled, ""
    if setting == "auto":
        return uncompiled, f"run.compile auto: not compiled, {reason}"
    raise UserError(
        f"run.compile is true, and {reason}. Triton, its driver and a C compiler are needed; or use --run.compile false"
    )


def why_not(device: torch.device) -> str:
    """Why nothing can be compiled for a device, "" if it can: the tools behind torch.compile are tried."""
    try:
        torch.compile(lambda matrices: (2 * matrices).bmm(matrices))(torch.ones(2, 16, 16, device=device))
    except Exception as error:  # A missing compiler or driver leads to errors of many types.
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
