"""The state of a run: what an update changes, and what the run is."""

import dataclasses
from typing import TypedDict

import torch
from torch import nn

from trainer.config.recipe import AuditRow
from trainer.models.batch_norm import running_statistics
from trainer.models.ema import ModelEma


class Best(TypedDict, total=False):
    """The best evaluation so far: after which update, of which weights (raw or ema), and their top-1 in percent."""

    step: int
    weights: str
    top1: float


@dataclasses.dataclass
class TrainState:
    """Everything that a run needs to resume as if it had never stopped.

    Attributes:
      student, optimizer, scaler: each has its own state_dict; ema: None where no EMA is kept.
      plan: what the data depends on (TrainPlan.describe()) and the student's name and arguments; a checkpoint of
        another plan is refused.
      config: the resolved configuration. audit: its deviations from USI. Both are informational.
      stores: what each recorded teacher's store was recorded from, by the teacher's key; resuming reports what differs.
      classes: the dataset's class names in the order of the labels, None where it has none.
      micro_batch: images of a forward pass on one rank; 0 as long as it is not known.
      step: updates done.
      evaluated: the update after which the weights were evaluated last; 0 is never.
      ranks_differ: True if each rank keeps running statistics of its own (run.batch_norm none, several ranks).
      rank_statistics: `local_statistics` of each rank, from a checkpoint; [] where ranks do not differ.
      best: the best evaluation so far; {} without one.
    """

    student: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: dict
    config: dict
    audit: list[AuditRow]
    classes: list[str] | None
    micro_batch: int = 0
    step: int = 0
    evaluated: int = 0
    ranks_differ: bool = False
    rank_statistics: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    best: Best = dataclasses.field(default_factory=Best)
    stores: dict[str, dict] = dataclasses.field(default_factory=dict)

    def local_statistics(self) -> list[torch.Tensor]:
        """This rank's running statistics where ranks differ, else [].

        Returns:
          the student's, then the EMA's if there is one. A checkpoint must hold every rank's, for the student's own
          state is that of one rank.
        """
        return self._running_statistics() if self.ranks_differ else []

    def _running_statistics(self) -> list[torch.Tensor]:
        return running_statistics(self.student) + (running_statistics(self.ema.module) if self.ema else [])

    @torch.no_grad()
    def restore_rank_statistics(self, rank: int, num_ranks: int) -> None:
        """Give a rank its own statistics back, if the checkpoint is of as many ranks.

        It must be called after TrainStep was made, because DDP then gives all ranks the buffers of rank 0. An EMA that
        has been switched on since begins with the student's statistics.
        """
        if self.ranks_differ and len(self.rank_statistics) == num_ranks:
            present, saved = self._running_statistics(), self.rank_statistics[rank]
            if len(saved) < len(present):
                saved = [*saved, *saved]
            for values, own in zip(present, saved, strict=False):  # An EMA may have been switched off since.
                values.copy_(own)
