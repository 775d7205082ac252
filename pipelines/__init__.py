"""The augmented dataset as a pure function: a plan in numpy, and pipelines that carry it out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from pipelines.common.errors import UserError

if TYPE_CHECKING:  # planning and sharding need no torch, and start faster without it
    import torch

    from pipelines.batch import Batch
    from pipelines.plan.plan import BatchPlan
    from pipelines.shards.index import ShardIndex

# OpenMP's threads spin while they wait for each other, by default for so long that a training step beside other work
# is slowed down several times (docs/performance.md). libgomp reads this when torch is imported. Your own choice wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

PIXELS_VERSION = 1  # of what pipelines make of a plan: a run that goes on with another is told
PIPELINES = ("auto", "dali", "torchvision", "synthetic")


class Pipeline(Protocol):
    """Carries plans out."""

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order. Close the iterator to stop early."""

    def forget(self) -> None:
        """Give back what is kept to be used again, between two calls of `batches`."""


def resolve_pipeline(name: str, device: torch.device) -> str:
    """The pipeline that 'auto' stands for: DALI with a GPU, torchvision without."""
    if name not in PIPELINES:
        raise UserError(f"data.pipeline is '{name}', not one of {', '.join(PIPELINES)}")
    return name if name != "auto" else "dali" if device.type == "cuda" else "torchvision"


def open_pipeline(
    name: str,
    index: ShardIndex,
    *,
    device: torch.device,
    threads: int,
    prefetch: int,
    decode: str,
    hw_decoder_load: float,
    decoder_padding_mib: int,
    on_bad: Callable[[int, str], None],
) -> Pipeline:
    """A pipeline by name. Imports only what it needs, so a machine without DALI can use the others.

    Args: as for the pipelines; `decode` (roi or full) and the decoder's options concern DALI alone.
    Raises:
      UserError: an unknown name, or DALI was asked for and is not installed.
    """
    name = resolve_pipeline(name, device)
    if name == "synthetic":
        from pipelines.synthetic import SyntheticPipeline

        return SyntheticPipeline(index, device=device)
    if name == "torchvision":
        from pipelines.cpu import TorchvisionPipeline

        return TorchvisionPipeline(index, device=device, threads=threads, prefetch=prefetch, on_bad=on_bad)
    try:
        from pipelines.dali import DaliPipeline
    except ImportError as error:
        raise UserError(
            f"data.pipeline is 'dali', which cannot be imported ({error}): "
            "pip install nvidia-dali-cuda120 in the version that setup.cfg names, or use --data.pipeline torchvision"
        ) from error
    return DaliPipeline(
        index,
        device=device,
        threads=threads,
        prefetch=prefetch,
        decode=decode,
        hw_decoder_load=hw_decoder_load,
        decoder_padding_mib=decoder_padding_mib,
        on_bad=on_bad,
    )
