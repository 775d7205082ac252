"""Ranks: who this process is, and the few collectives that are not DDP's."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from pipelines.common.errors import UserError, write_error_line
from pipelines.common.launcher import Launch, launched
from trainer.cluster import rendezvous

T = TypeVar("T")


def _ignore(where: str, patience_s: float = 0) -> None:
    """Stands for the heartbeat where no watchdog runs."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place among the run's ranks.

    Attributes:
      rank, size: among all processes.
      local_size: processes on this machine.
      device: of this process.
      heartbeat: reports where this rank is, "step 12: input", to the watchdog (trainer/cluster/watchdog.py). It costs
        nothing, and all ranks must call it alike; heartbeat(where, seconds) reports a place that may take that long.
      store: rank 0's, which all have; None for a single rank.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    heartbeat: Callable[..., None] = _ignore
    store: dist.TCPStore | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values on every rank, in place; every rank must call it with the same shape and type."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank; every rank must call it."""
        chosen = [value]
        if self.size > 1:
            dist.broadcast_object_list(chosen, device=self.device)
        return chosen[0]

    def all_gather(self, values: list[T]) -> list[T]:
        """The lists of all ranks, one after the other; every rank must call it."""
        lists = [values] * self.size
        if self.size > 1:
            dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def by_itself(self) -> "World":
        """This process as the only one: nothing is sent to other ranks, and its heartbeats are ignored."""
        return dataclasses.replace(self, rank=0, size=1, local_size=1, heartbeat=_ignore)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world(
    device: str, facts: Callable[[torch.device], dict] = lambda _: {}, ready_s: float = 60
) -> Iterator[World]:
    """Join the processes that torchrun or srun started, or be the only one.

    Args:
      device: auto, cuda or cpu; auto is cuda where there is one. One rank a GPU; NCCL between GPUs, Gloo between CPUs.
      facts: gives, for a rank's device, what must be equal on all (trainer/cluster/rendezvous.py); it is called where
        there are several ranks.
      ready_s: seconds that the ranks have for meeting, and again for their first collective.
    Raises:
      UserError: a GPU was asked for and there is none for this rank; ranks are missing, differ, or do not connect; srun
        started copies that do not know of each other.
    """
    this = launched()
    _check_launch(this)
    if this.size == 1:
        yield World(this.rank, this.size, this.local_size, _prepared_device(device, this.local_rank))
        return

    def describe() -> dict:
        own_device = _prepared_device(device, this.local_rank)
        return {"device": own_device.type, **facts(own_device)}

    store = rendezvous.meet(this.rank, this.size, describe, ready_s)
    own_device = _prepared_device(device, this.local_rank)
    rendezvous.connect(store, this.rank, this.size, own_device, ready_s)
    yield World(this.rank, this.size, this.local_size, own_device, store=store)
    dist.destroy_process_group()  # After an error it could wait for ranks that are gone.


def _check_launch(this: Launch) -> None:
    """Print which of a launcher's variables are ignored. Raises a UserError if srun alone has started copies."""
    if this.by == "srun" and this.size > 1:
        raise UserError(
            f"srun has started {this.size} copies of this program, which do not know of each other. Start ranks with "
            "'sbatch tools/slurm/train.sbatch' or with torchrun, or a single process with 'srun --ntasks 1'"
        )
    if this.ignored:
        write_error_line(f"note: {this.ignored}. torchrun and tools/slurm/train.sbatch start several ranks")


def alone(device: str = "auto", local_rank: int = 0, local_size: int = 1) -> World:
    """This process and no other, whatever torchrun's variables say; `device` as for join_world.

    Args:
      local_rank, local_size: its place among processes of this machine that work beside each other, of which each takes
        a GPU of its own.
    """
    return World(0, 1, local_size, _prepared_device(device, local_rank))


def _prepared_device(device: str, local_rank: int) -> torch.device:
    """The device of this rank; a GPU is made the current one."""
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if not on_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda and PyTorch finds no GPU: use --run.device cpu, or fix the driver")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own, this process sees {torch.cuda.device_count()}: start "
            "torchrun with --nproc-per-node up to that number, srun without --gpus-per-task and --gpu-bind (each task "
            "must see all GPUs of its machine), or use --run.device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
