"""The learning rate as a pure function of the epoch, the EMA's decay as one of the update."""

import math

from trainer.config.sections import EmaConfig, OptimConfig, ScheduleConfig


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


def ema_decay(step: int, config: EmaConfig) -> float:
    """The decay of the EMA at an update.

    Args:
      step: updates done before this one; the run's first has 0.
    Source: the warm-up is tf.train.ExponentialMovingAverage's num_updates: min(decay, (1 + t) / (10 + t)). timm has
      none of that form (that of its ModelEmaV3 is a power law).
    """
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay
