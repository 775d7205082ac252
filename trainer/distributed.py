"""Ranks: who this process is, and the few collectives that are not DDP's."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from pipelines.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
      rank, size: among all processes.
      local_size: processes on this machine.
      device: of this process.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The card's name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def tensor_of_main(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values on every rank, in place; every rank must call it with the same shape and type."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def choice_of_main(self, value: T) -> T:
        """What rank 0 calls it with, on every rank."""
        chosen = [value]
        if self.size > 1:
            dist.broadcast_object_list(chosen, device=self.device)
        return chosen[0]

    def gather(self, values: list[T]) -> list[T]:
        """The lists of all ranks, one after the other; every rank must call it."""
        lists = [values] * self.size
        if self.size > 1:
            dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    Args:
      device: auto, cuda or cpu; auto is cuda where there is one. One rank a GPU; NCCL between GPUs, Gloo between CPUs.
    Raises:
      UserError: a GPU was asked for and there is none for this rank.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if size > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set and RANK is not: start several ranks with torchrun, or unset WORLD_SIZE")
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError("run.device is cuda and PyTorch finds no GPU: use --run.device cpu, or mend the driver")
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own, this machine has {torch.cuda.device_count()}: start "
            "torchrun with --nproc-per-node up to that number, or use --run.device cpu"
        )
    torch_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(torch_device)
    if size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch_device if on_gpu else None)
    try:
        yield World(rank, size, local_size, torch_device)
    finally:
        if size > 1:
            dist.destroy_process_group()
