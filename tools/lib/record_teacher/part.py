"""Which part of a recording a process makes: any number of them may work at once, and say nothing to each other."""

import dataclasses
from collections.abc import Mapping

import torch

from pipelines.common.errors import write_error_line
from pipelines.common.launcher import array_task, launched
from trainer.cluster.world import World, alone


@dataclasses.dataclass(frozen=True)
class Part:
    """A process among those that its launcher and its job array started.

    Attributes:
      index, count: it takes every count-th block, from block `index` on.
      local_rank, local_size: its place among the processes on this machine.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    local_size: int = 1

    def own(self, blocks: list[tuple[int, int]], block_steps: int) -> list[tuple[int, int]]:
        """Return the blocks that this process records.

        The number of a block decides, not its place in the list, because other processes may see another list.

        Args:
          blocks: pairs (first step, stop step).
        """
        return [block for block in blocks if block[0] // block_steps % self.count == self.index]

    def world(self, device: str) -> World:
        """This process by itself on the device, a GPU of its own where the machine has one for each process."""
        num_gpus = torch.cuda.device_count() if device != "cpu" else 0
        # srun may show a task one GPU alone, and processes may outnumber the GPUs: a recording needs no GPU for each.
        local_rank = self.local_rank % num_gpus if num_gpus else 0
        return alone(device, local_rank, self.local_size)

    def __str__(self) -> str:
        return f"process {self.index + 1} of {self.count}"


def part_of_this_process(environment: Mapping[str, str] | None = None) -> Part:
    """The part that torchrun, srun or a job array, or ranks within each task of an array, gave this process; else all.

    Prints a line about variables of a launcher that are ignored.

    Args:
      environment: os.environ by default.
    """
    this, array = launched(environment), array_task(environment)
    ignored = array.ignored or (this.ignored if array.size == 1 else "")
    if ignored:
        write_error_line(f"note: {ignored}. torchrun, srun and sbatch --array=0-N start several processes")
    return Part(array.rank * this.size + this.rank, array.size * this.size, this.local_rank, this.local_size)
