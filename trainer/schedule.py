"""The learning rate as a pure function of the epoch."""

import math

from trainer.config import OptimConfig, ScheduleConfig


def learning_rate(epoch: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """The rate of every update of an epoch.

    Args:
      epoch: 0 <= epoch; from schedule.epochs on, the cooldown.
    Source: timm.scheduler.CosineLRScheduler, t_in_epochs, one cycle: the cosine counts from epoch 0, so it starts
      below its peak once the warm-up is over.
    """
    if epoch < schedule.warmup_epochs:
        return schedule.warmup_lr + epoch * (optim.lr - schedule.warmup_lr) / schedule.warmup_epochs
    if epoch < schedule.epochs:
        return schedule.min_lr + 0.5 * (optim.lr - schedule.min_lr) * (1 + math.cos(math.pi * epoch / schedule.epochs))
    return schedule.min_lr
