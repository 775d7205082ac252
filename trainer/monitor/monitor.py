"""Watches a run for its loop: metrics, damaged samples and the teacher, and what is written about them."""

import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np
import torch

from pipelines.common.errors import UserError, named
from pipelines.plan.plan import TrainPlan
from trainer.cluster.world import World
from trainer.models.teacher import TeacherCheck
from trainer.monitor.clock import InputWait
from trainer.monitor.quarantine import Quarantine
from trainer.monitor.run_files import TrainRecord
from trainer.monitor.telemetry import Telemetry
from trainer.state.train_state import TrainState
from trainer.update.step import StepMetrics

_ADVICE = "Lower optim.lr or change run.precision; the run resumes from its newest checkpoint, if there is one"
_SHOWN = 3  # An error names at most this many samples.


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, at update `step`, which metrics.jsonl calls step + 1."""

    def __init__(self, message: str, step: int):
        super().__init__(f"step {step + 1}: {message}. {_ADVICE}")
        self.step = step


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
        teacher = self._state.config["teacher"]
        is_recorded = any(each["store"] for each in (teacher, *teacher["others"]))
        self._teacher_check = TeacherCheck(self._plan.index.num_classes, is_recorded=is_recorded)
        self._restart()

    def _restart(self) -> None:
        """Forget the metrics so far."""
        self._updates: list[StepMetrics] = []
        self._start_s = time.perf_counter()
        self._input_wait.take_s()

    def add(self, metrics: StepMetrics) -> None:
        """Add the metrics of the update that the state has counted last, without waiting for the device."""
        self._updates.append(metrics)
        self.telemetry.advance(self._state.step)

    def flush(self) -> None:
        """Write down the updates and the damaged samples since the last call.

        Raises:
          NonFiniteError: as `log_updates`.
          UserError: too many samples are damaged.
        """
        self.log_updates()
        self.report_damage()

    def log_updates(self) -> None:
        """Write a line about the updates since the last one, if there are any; here the host waits for the device.

        Raises:
          NonFiniteError: on every rank, if some rank's loss or gradient was not finite.
        """
        if self._updates:
            record, teacher_top1s = self._means()
            self.telemetry.train(record)
            # The updates are judged one by one, so that run.log_every does not matter.
            if self._has_teacher and (warning := self._teacher_check.add(teacher_top1s, self._plan.global_batch)):
                self.say(warning)
            self._restart()

    def _means(self) -> tuple[TrainRecord, list[float]]:
        """Means over all images of the updates since the last line, on all ranks.

        Returns:
          the record; and for each update the fraction of its images whose label the teachers find.
        """
        step, num_steps = self._state.step, len(self._updates)
        # The ranks may differ by a pair of images.
        weight = len(self._updates[0].bad) * self._world.size / self._plan.global_batch
        values = torch.stack([torch.stack([u.loss, *u.agreement, u.bad.any().float()]) for u in self._updates]) * weight
        sums = self._world.all_reduce_sum(torch.cat([values.sum(0), values[:, 1]])) / self._world.size
        loss, teacher_top1, agreement, bad = (sums[:4] / num_steps).tolist()
        if bad or not math.isfinite(loss):
            raise self._nonfinite_error()
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
        return record, sums[4:].tolist()

    def _nonfinite_error(self) -> NonFiniteError:
        """The error about the first bad update of any rank, the last one if none is known. Every rank must call it."""
        stop, plan, world = self._state.step, self._plan, self._world
        mine: list[tuple[int, list[str]]] = []  # This rank's first bad update, and the samples with bad logits in it.
        for step, update in enumerate(self._updates, start=stop - len(self._updates)):
            if update.bad.any() or not update.loss.isfinite():
                batches = plan.batches(
                    step, step + 1, rank=world.rank, ranks=world.size, micro_batch=self._state.micro_batch
                )
                samples = np.concatenate([batch.sample for batch in batches])[update.bad.cpu().numpy()]
                mine = [(step, [plan.index.name(int(sample)) for sample in samples])]
                break
        found = world.all_gather(mine)
        first = min((step for step, _ in found), default=stop - 1)
        names = [name for step, samples in found if step == first for name in samples]
        if not names:
            return NonFiniteError("the gradient or the loss is not finite, though all logits are", first)
        what = f"the logits of the student or a teacher are not finite for {len(names)} of {plan.global_batch} images"
        return NonFiniteError(f"{what}: {named(names, _SHOWN)}", first)

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
