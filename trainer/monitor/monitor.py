"""Watches a run for its loop: metrics, evaluations, damaged samples and the teacher, and what is written about them."""

import contextlib
from collections.abc import Iterator

from pipelines.plan.plan import TrainPlan
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.monitor.clock import InputWait
from trainer.monitor.nonfinite import NameSamples
from trainer.monitor.quarantine import Quarantine
from trainer.monitor.run_files import Evaluation, TrainRecord
from trainer.monitor.teacher_watch import TeacherWatch
from trainer.monitor.telemetry import Telemetry
from trainer.monitor.window import MetricsWindow
from trainer.state.train_state import TrainState
from trainer.update.step import StepMetrics


class Monitor:
    """What the loop calls between two updates. Every rank must call `watch`, `flush` and `evaluation`.

    Args:
      state: its step and learning rate are logged.
      quarantine: collects the damaged samples.
      has_teacher: whether the student learns from a teacher.
      name_samples: as for trainer.monitor.nonfinite.nonfinite_error.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        plan: TrainPlan,
        state: TrainState,
        telemetry: Telemetry,
        quarantine: Quarantine,
        has_teacher: bool,
        name_samples: NameSamples,
    ):
        self._config = config
        self._world = world
        self._plan = plan
        self._state = state
        self._telemetry = telemetry
        self._quarantine = quarantine
        self._has_teacher = has_teacher
        self._window = MetricsWindow(config, world, name_samples)
        self._teacher: TeacherWatch | None = None
        self._input_wait: InputWait | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Inside, records are written, and the progress line is shown on a terminal."""
        with self._telemetry.live():
            yield

    def say(self, text: str) -> None:
        """Print a line for the user."""
        self._telemetry.say(text)

    def watch(self, input_wait: InputWait) -> None:
        """Start watching updates that take their batches from `input_wait`."""
        self._input_wait = input_wait
        if self._has_teacher:
            self._teacher = TeacherWatch(self._plan.index.num_classes, self._plan.global_batch, self._world)
        self._restart()

    def _restart(self) -> None:
        self._window.restart()
        if self._input_wait is not None:
            self._input_wait.take_s()

    def add(self, metrics: StepMetrics) -> None:
        """Add the metrics of an update, before the state counts it."""
        self._window.add(metrics)
        if self._teacher is not None:
            self._teacher.add(metrics.teacher_pairs)

    def advance(self) -> None:
        """Note that an update has been done, and counted by the state."""
        self._telemetry.advance(self._state.step)

    def flush(self) -> None:
        """Write a line about the updates since the last one, if there are any; here the host waits for the device.

        Raises:
          NonFiniteError: on every rank, if some rank's loss was not finite.
          UserError: too many samples are damaged.
        """
        metrics = self._window.mean(self._state.step)
        if metrics is not None:
            waited_s = self._input_wait.take_s() if self._input_wait is not None else 0.0
            record = TrainRecord(
                step=self._state.step,
                epoch=(self._state.step - 1) // self._plan.steps_per_epoch,
                loss=metrics.loss,
                lr=self._state.optimizer.param_groups[0]["lr"],
                images_per_s=metrics.num_steps * self._plan.global_batch / metrics.elapsed_s,
                input_wait=waited_s / metrics.elapsed_s,
            )
            if self._teacher is not None:
                record["teacher_top1"] = 100 * metrics.teacher_top1
                record["agreement"] = 100 * metrics.agreement
                if warning := self._teacher.warning():
                    self.say(warning)
            self._telemetry.train(record)
            self._restart()
        self.report_damage()

    def report_damage(self) -> None:
        """Write down the damaged samples since the last call. Raises a UserError if they are too many."""
        if line := self._quarantine.record_new():
            self.say(line)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the weights are evaluated; the time does not count for the metrics."""
        self._telemetry.evaluating()
        yield
        self.report_damage()
        self._restart()

    def evaluation(self, results: Evaluation) -> None:
        """Write a line about an evaluation of the present weights."""
        step = self._state.step
        self._telemetry.evaluation(step, step // self._plan.steps_per_epoch - 1, results)

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        self._telemetry.sync()

    def rewind(self) -> None:
        """Note that the state has gone back to an earlier step."""
        self._telemetry.rewind(self._state.step)
