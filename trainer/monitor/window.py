"""The metrics between two log lines."""

import dataclasses
import math
import time

import torch

from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.monitor.nonfinite import NameSamples, nonfinite_error
from trainer.update.step import StepMetrics


@dataclasses.dataclass(frozen=True)
class WindowMetrics:
    """Means over all images of the updates in a window, on all ranks; elapsed_s: from its beginning to now."""

    loss: float
    teacher_top1: float
    agreement: float
    num_steps: int
    elapsed_s: float


class MetricsWindow:
    """Sums metrics on the device. Reading them, in `mean`, is the only time that the host waits for the device.

    Args:
      name_samples: as for nonfinite_error.
    """

    def __init__(self, config: Config, world: World, name_samples: NameSamples):
        self._config = config
        self._world = world
        self._name_samples = name_samples
        self.restart()

    def restart(self) -> None:
        """Empty the window; it begins now."""
        self._sums = torch.zeros(3, device=self._world.device)  # loss, teacher_top1, agreement
        self._bad: list[torch.Tensor] = []  # For each step: bool [images of this rank].
        self._bad_gradients: list[torch.Tensor] = []  # For each step: bool scalar.
        self._start_s = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        """Add the metrics of an update, without waiting for the device."""
        self._sums += torch.stack([metrics.loss, metrics.teacher_top1, metrics.agreement])
        self._bad.append(metrics.bad)
        self._bad_gradients.append(metrics.bad_gradients)

    def mean(self, step: int) -> WindowMetrics | None:
        """The means over the window, None if it is empty. Every rank must call it.

        Args:
          step: updates done in the run.
        Raises:
          NonFiniteError: on every rank, if some rank's loss was not finite.
        """
        num_steps = len(self._bad)
        if not num_steps:
            return None
        bad = torch.stack([rows.any() for rows in self._bad] + self._bad_gradients).any()
        sums = self._world.all_reduce_sum(torch.cat([self._sums, bad.float().view(1)])).tolist()
        loss, teacher_top1, agreement = (total / self._world.size / num_steps for total in sums[:3])
        if sums[3] or not math.isfinite(loss):
            raise nonfinite_error(
                loss,
                step - num_steps,
                self._bad,
                self._bad_gradients,
                config=self._config,
                world=self._world,
                name_samples=self._name_samples,
            )
        return WindowMetrics(loss, teacher_top1, agreement, num_steps, time.perf_counter() - self._start_s)
