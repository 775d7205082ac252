"""Watches a run for its loop: metrics, damaged samples and the teacher, and what is written about them."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch

from pipelines.plan.plan import TrainPlan
from trainer.cluster.world import World
from trainer.models.teacher import num_images_needed, teacher_warning
from trainer.monitor.clock import InputWait
from trainer.monitor.nonfinite import nonfinite_error
from trainer.monitor.quarantine import Quarantine
from trainer.monitor.run_files import TrainRecord
from trainer.monitor.telemetry import Telemetry
from trainer.state.train_state import TrainState
from trainer.update.step import StepMetrics


class Monitor:
    """Collects the metrics between two log lines. Every rank must call `watch`, `add`, `flush` and `evaluating`.

    Attributes:
      telemetry: writes what the monitor finds, and what else there is to say.

    Args:
      state: its step and learning rate are logged.
      quarantine: collects the damaged samples.
      has_teacher: whether the student learns from a teacher.
    """

    def __init__(
        self,
        world: World,
        plan: TrainPlan,
        state: TrainState,
        telemetry: Telemetry,
        quarantine: Quarantine,
        has_teacher: bool,
    ):
        self.telemetry = telemetry
        self._world = world
        self._plan = plan
        self._state = state
        self._quarantine = quarantine
        self._has_teacher = has_teacher

    def say(self, text: str) -> None:
        """Print a line for the user."""
        self.telemetry.say(text)

    def watch(self, input_wait: InputWait) -> None:
        """Start watching updates that take their batches from `input_wait`."""
        self._input_wait = input_wait
        # Labels and the teacher's best classes in the first updates; None when they need not be compared (any more).
        self._teacher_pairs: list[torch.Tensor] | None = [] if self._has_teacher else None
        self._restart()

    def _restart(self) -> None:
        """Forget the metrics so far."""
        self._sums = torch.zeros(3, device=self._world.device)  # loss, teacher_top1, agreement
        self._bad: list[torch.Tensor] = []  # For each step: bool [images of this rank].
        self._bad_gradients: list[torch.Tensor] = []  # For each step: bool scalar.
        self._start_s = time.perf_counter()
        self._input_wait.take_s()

    def add(self, metrics: StepMetrics) -> None:
        """Add the metrics of the update that the state has counted last, without waiting for the device."""
        weight = len(metrics.bad) * self._world.size / self._plan.global_batch  # Ranks may differ by a pair of images.
        self._sums += torch.cat([metrics.loss.view(1), metrics.agreement]) * weight
        self._bad.append(metrics.bad)
        self._bad_gradients.append(metrics.bad_gradients)
        if self._teacher_pairs is not None:
            self._teacher_pairs.append(metrics.teacher_pairs)
        self.telemetry.advance(self._state.step)

    def flush(self) -> None:
        """Write a line about the updates since the last one, if there are any; here the host waits for the device.

        Raises:
          NonFiniteError: on every rank, if some rank's loss or gradient was not finite.
          UserError: too many samples are damaged.
        """
        if self._bad:
            self.telemetry.train(self._mean())
            self._check_teacher()
            self._restart()
        self.report_damage()

    def _mean(self) -> TrainRecord:
        """Means over all images of the updates since the last line, on all ranks."""
        step, num_steps = self._state.step, len(self._bad)
        bad = torch.stack([rows.any() for rows in self._bad] + self._bad_gradients).any()
        sums = self._world.all_reduce_sum(torch.cat([self._sums, bad.float().view(1)])).tolist()
        loss, teacher_top1, agreement = (total / self._world.size / num_steps for total in sums[:3])
        if sums[3] or not math.isfinite(loss):
            raise nonfinite_error(
                step, self._bad, self._bad_gradients, self._plan, self._world, self._state.micro_batch
            )
        elapsed_s = time.perf_counter() - self._start_s
        record = TrainRecord(
            step=step,
            epoch=(step - 1) // self._plan.steps_per_epoch,
            loss=loss,
            lr=self._state.optimizer.param_groups[0]["lr"],
            images_per_s=num_steps * self._plan.global_batch / elapsed_s,
            input_wait=self._input_wait.take_s() / elapsed_s,
        )
        if self._has_teacher:
            record["teacher_top1"] = 100 * teacher_top1
            record["agreement"] = 100 * agreement
        return record

    def _check_teacher(self) -> None:
        """Warn of a teacher that does not know the dataset's classes, once, when there are enough images to say so."""
        pairs, num_classes = self._teacher_pairs, self._plan.index.num_classes
        if pairs is None or len(pairs) * self._plan.global_batch < num_images_needed(num_classes):
            return
        self._teacher_pairs = None
        of_all_ranks = self._world.all_gather([torch.cat(pairs, 1).cpu().numpy()])
        if warning := teacher_warning(of_all_ranks, num_classes):
            self.say(warning)

    def report_damage(self) -> None:
        """Write down the damaged samples since the last call. Raises a UserError if they are too many."""
        if line := self._quarantine.record_new():
            self.say(line)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the weights are evaluated; the time does not count for the metrics."""
        self.telemetry.evaluating()
        yield
        self.report_damage()
        self._restart()
