"""The loop over updates: what happens between them, and in which order."""

import contextlib
import dataclasses
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.common.errors import UserError
from pipelines.plan.plan import TrainPlan
from trainer.cluster.preemption import Control
from trainer.cluster.watchdog import HeartbeatIterator
from trainer.cluster.world import World
from trainer.config.sections import Config, RunConfig
from trainer.feed import Pipelines, rank_plans
from trainer.models.class_order import num_images_needed
from trainer.models.teacher import teacher_warning
from trainer.monitor.sample_grid import SAMPLES, keep_samples
from trainer.monitor.telemetry import InputWait, Telemetry
from trainer.state import checkpoint
from trainer.state.checkpoint import TrainState
from trainer.update.compiler import COMPILE_PATIENCE_S
from trainer.update.optimizer import set_learning_rate
from trainer.update.schedule import learning_rate
from trainer.update.step import StepMetrics, TrainStep

DISK_PATIENCE_S = 3600  # a slow disk is no hang


@dataclasses.dataclass
class Run:
    """Everything that a run was built of.

    Attributes:
      evaluate: gives the metrics of the raw and the averaged weights; None without a validation set.
      validation: digest of that set, "" without one.
      control: stops all ranks together; writer: of checkpoints.
      precision: of the forward passes.
      notes: what is worth saying before the run begins, in sentences.
      stop: the step after which this process ends.
    """

    config: Config
    world: World
    plan: TrainPlan
    pipelines: Pipelines
    state: TrainState
    step: TrainStep
    evaluate: Callable[..., dict[str, dict[str, float]]] | None
    control: Control
    writer: checkpoint.Writer
    total_steps: int
    precision: torch.dtype
    notes: list[str]
    validation: str = ""

    @property
    def stop(self) -> int:
        return min(self.total_steps, self.config.run.stop_after_steps or self.total_steps)

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return checkpoint_folder(self.config.run)

    @property
    def evaluation_pending(self) -> bool:
        """Whether the weights are to be evaluated after the present step, and have not been."""
        epoch, within = divmod(self.state.step, self.plan.steps_per_epoch)
        due = (
            epoch > 0
            and within == 0
            and (epoch % self.config.run.eval_every == 0 or self.state.step == self.total_steps)
        )
        return due and self.evaluate is not None and self.state.evaluated < self.state.step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a loop ended.

    Attributes:
      evaluation: the last one of this process, {} without one.
      signal: what stopped it, 0 if it came to its end.
    """

    evaluation: dict[str, dict[str, float]]
    signal: int


class NonFiniteError(UserError):
    """A loss or gradient that is not finite, at update `step`, which metrics.jsonl calls step + 1."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return config.out / "checkpoints"


def loop(run: Run, telemetry: Telemetry) -> Outcome:
    """All updates from the state's step on."""
    retried = -1
    while True:
        try:
            outcome = go_on(run, telemetry)
        except NonFiniteError as error:
            # the same data give the same loss: only what the machine did differently can help
            if run.config.run.on_nonfinite == "stop" or error.step <= retried:
                raise
            retried = error.step
            telemetry.say(str(error))
            roll_back(run, telemetry)
            continue
        if not outcome.evaluation and not outcome.signal and run.evaluate and run.state.step == run.total_steps:
            outcome = dataclasses.replace(outcome, evaluation=run.evaluate())  # of a run killed after its last step
        settle(run, telemetry)
        run.world.heartbeat("writing the last checkpoint", DISK_PATIENCE_S)
        run.writer.wait()
        check_writer(run)
        return outcome


def go_on(run: Run, telemetry: Telemetry) -> Outcome:
    """Updates until the run ends, is stopped, or meets a loss that is not finite."""
    assert run.step.micro_batches * run.state.micro_batch * run.world.size == run.plan.global_batch
    plans = rank_plans(run.plan, run.state.step, run.stop, run.world, run.state.micro_batch)
    with contextlib.closing(run.pipelines.of["train"].batches(plans)) as batches:
        shown = keep_samples(batches, run.config.run.out / SAMPLES) if run.world.is_main else batches
        beating = HeartbeatIterator(shown, run.world.heartbeat, lambda: step_name(run))
        return update(run, telemetry, InputWait(beating, run.world.device))


def step_name(run: Run) -> tuple[str, float]:
    """Where the run is, for the watchdog: a compiled model is compiled anew when another image size comes."""
    epoch, within = divmod(run.state.step, run.plan.steps_per_epoch)
    new = within == 0 and epoch > 0 and run.plan.image_size_at(epoch) != run.plan.image_size_at(epoch - 1)
    return f"step {run.state.step + 1}", COMPILE_PATIENCE_S if new else 0


def update(run: Run, telemetry: Telemetry, batches: InputWait) -> Outcome:
    """The updates themselves, and what comes between them in the order in which it happens."""
    config, state = run.config, run.state
    log = StepLog(run, telemetry, batches)
    unsaved, evaluation = False, {}
    set_rate(run, max(state.step - 1, 0))  # as it was: a checkpoint may be written before the next update
    while True:
        agreed = run.control.ask(bool(run.writer.failure))
        if agreed.failed:
            check_writer(run)
        ends = bool(agreed.signal) or state.step == run.stop
        checkpoint_due = ends or state.step % config.run.checkpoint_every == 0
        if state.step % config.run.log_every == 0 or run.evaluation_pending or checkpoint_due:
            log.write()
            settle(run, telemetry)
        if run.evaluation_pending and not agreed.signal:
            evaluation = evaluate_weights(run, telemetry)
            log.restart()
            if not evaluation:  # given up for a signal, which all ranks are about to be told
                continue
            unsaved = True
        if checkpoint_due and unsaved:
            save(run, telemetry)
            unsaved = False
        if ends:
            complete = state.step == run.stop and not run.evaluation_pending
            return Outcome(evaluation, 0 if complete else agreed.signal)
        set_rate(run, state.step)
        log.add(run.step(batches, state.step))
        state.step += 1
        unsaved = True
        telemetry.advance(state.step)


def set_rate(run: Run, step: int) -> None:
    """Set the learning rate of an update."""
    epoch = step // run.plan.steps_per_epoch
    set_learning_rate(run.state.optimizer, learning_rate(epoch, run.config.optim, run.config.schedule))


def evaluate_weights(run: Run, telemetry: Telemetry) -> dict[str, dict[str, float]]:
    """The metrics of the present weights, {} if a signal came; the best weights so far are kept."""
    telemetry.evaluating()
    results = run.evaluate(interrupted=lambda: bool(run.control.ask(False).signal))
    settle(run, telemetry)
    if not results:
        return {}
    state = run.state
    state.evaluated = state.step
    telemetry.evaluation(state.step, state.step // run.plan.steps_per_epoch - 1, results)
    weights = max(results, key=lambda name: results[name]["top1"])
    if results[weights]["top1"] > state.best.get("top1", -1.0):
        state.best = {"step": state.step, "weights": weights, "top1": results[weights]["top1"]}
        if run.world.is_main:
            content = checkpoint.best_content_of(state, results[weights])
            run.writer.submit(run.folder / checkpoint.BEST, content)
    return results


def save(run: Run, telemetry: Telemetry) -> None:
    """Copy the state to the host; it is written while the training goes on. Every rank must call it."""
    telemetry.sync()  # a checkpoint must not outlive the lines up to it
    run.world.heartbeat(f"checkpoint of step {run.state.step}", DISK_PATIENCE_S)
    local = run.step.local_statistics()
    run.state.rank_statistics = [] if local is None else run.world.all_gather([checkpoint.to_host(local)])
    if run.world.is_main:
        config = run.config.run
        keep = (run.folder, config.keep_checkpoints, config.keep_every * config.checkpoint_every)
        path = checkpoint.path_of(run.folder, run.state.step)
        run.writer.submit(path, checkpoint.content_of(run.state), lambda: checkpoint.prune(*keep))


def check_writer(run: Run) -> None:
    """End the run on all ranks if a checkpoint could not be written. Every rank must call it."""
    if failure := run.world.broadcast_object(run.writer.failure):
        raise UserError(failure)


def settle(run: Run, telemetry: Telemetry) -> None:
    """Write down what damaged samples were met, and end the run if they are too many."""
    if line := run.pipelines.quarantine.settle():
        telemetry.say(line)


def resume(config: RunConfig, state: TrainState, total_steps: int, world: World) -> list[str]:
    """Set the state to the newest whole checkpoint in the run folder, if there is one.

    Returns:
      what is worth saying: which checkpoints are damaged, and what has changed since.
    Raises:
      UserError: another rank has a later one in its folder, or as checkpoint.load.
    """
    check_shared_folder(checkpoint_folder(config), world)
    path, content, damaged = None, {}, []
    if world.is_main:
        path, content, damaged = checkpoint.newest_complete(checkpoint_folder(config))
    path, damaged = world.broadcast_object((path, damaged))
    if path is None:
        return start_over(config, damaged)
    notes = [f"{line}; going on from an earlier one, {path.name}" for line in damaged]
    changes = checkpoint.load(path, content or checkpoint.read_state(path), state)
    notes += [f"changed since the checkpoint: {change}" for change in changes]
    if state.step > total_steps:
        raise UserError(
            f"{path}: has done {state.step} steps, this run ends after {total_steps}: raise schedule.epochs, "
            "or start a new run with another --run.out"
        )
    return notes


def check_shared_folder(folder: Path, world: World) -> None:
    """Raise a UserError, on every rank, if one of them sees a later checkpoint than rank 0: of another folder, most
    likely, which rank 0 had before a restart.
    """
    mine = max(map(checkpoint.step_of, checkpoint.checkpoints(folder)), default=0)
    steps = world.all_gather([(mine, f"rank {world.rank} on {socket.gethostname()}")])
    latest, where = max(steps)
    if latest > steps[0][0]:
        raise UserError(
            f"{checkpoint.path_of(folder, latest)}: {where} has it, {steps[0][1]} has not. run.out must be a folder "
            "that all machines share. If it is, start again: its listing was late, or another run is writing there"
        )


def start_over(config: RunConfig, damaged: list[str]) -> list[str]:
    """What to say where no checkpoint is whole: nothing where there is none, and where the first alone was damaged.

    Raises:
      UserError: more is lost than up to the first checkpoint.
    """
    newest = max((checkpoint.step_of(path) for path in checkpoint.checkpoints(checkpoint_folder(config))), default=0)
    if newest > config.checkpoint_every:
        raise UserError(
            f"{damaged[0]}; no other checkpoint is whole. Restore one, or begin anew with another --run.out"
        )
    return [f"{line}; it was the first: the run begins anew" for line in damaged]


def restore_statistics(step: TrainStep, state: TrainState, world: World) -> None:
    """Give a rank what it alone knew, after the state was set to a checkpoint of as many ranks."""
    if step.local_statistics() is not None and len(state.rank_statistics) == world.size:
        step.set_local_statistics(state.rank_statistics[world.rank])


def roll_back(run: Run, telemetry: Telemetry) -> None:
    """Go back to the newest checkpoint."""
    run.writer.wait()
    check_writer(run)
    step, micro_batch = run.state.step, run.state.micro_batch
    for note in resume(run.config.run, run.state, run.total_steps, run.world):
        telemetry.say(note)
    run.state.micro_batch = micro_batch  # of this session: the update was made for it
    if run.state.step == step:
        raise UserError("there is no checkpoint to go back to. Lower optim.lr or change run.precision, and start again")
    restore_statistics(run.step, run.state, run.world)
    telemetry.rewind(run.state.step)
    telemetry.say(f"going back to step {run.state.step}")


class StepLog:
    """Averages between two lines of the log. Reading them is the only time the host waits for the device."""

    def __init__(self, run: Run, telemetry: Telemetry, batches: InputWait):
        self._run = run
        self._telemetry = telemetry
        self._batches = batches
        teaches = run.config.teacher.name is not None
        self._pairs_wanted = num_images_needed(run.plan.index.num_classes) if teaches else 0  # over all ranks; then 0
        self._pairs: list[torch.Tensor] = []  # of the first steps: StepMetrics.teacher_pairs
        self.restart()

    def restart(self) -> None:
        self._sums = torch.zeros(3, device=self._run.world.device)  # loss, teacher_top1, agreement
        self._bad: list[torch.Tensor] = []  # of each step: bool [images of this rank]
        self._bad_gradients: list[torch.Tensor] = []  # of each step: bool scalar
        self._start_s = time.perf_counter()
        self._batches.take_s()

    def add(self, metrics: StepMetrics) -> None:
        self._sums += torch.stack([metrics.loss, metrics.teacher_top1, metrics.agreement])
        self._bad.append(metrics.bad)
        self._bad_gradients.append(metrics.bad_gradients)
        if len(self._pairs) * self._run.config.run.global_batch < self._pairs_wanted:
            self._pairs.append(metrics.teacher_pairs)

    def write(self) -> None:
        """A line about the steps since the last one, if there are any. Every rank must call it.

        Raises:
          NonFiniteError: on every rank, if some rank's loss was not finite.
        """
        steps, state = len(self._bad), self._run.state
        if not steps:
            return
        bad = torch.stack([rows.any() for rows in self._bad] + self._bad_gradients).any()
        *sums, num_bad = self._run.world.all_reduce_sum(torch.cat([self._sums, bad.float().view(1)])).tolist()
        loss, teacher_top1, agreement = (total / self._run.world.size / steps for total in sums)
        if num_bad or not math.isfinite(loss):
            raise self._error(loss)
        elapsed_s = time.perf_counter() - self._start_s
        record = {
            "step": state.step,
            "epoch": (state.step - 1) // self._run.plan.steps_per_epoch,
            "loss": loss,
            "lr": state.optimizer.param_groups[0]["lr"],
            "images_per_s": steps * self._run.config.run.global_batch / elapsed_s,
            "input_wait": self._batches.take_s() / elapsed_s,
        }
        if self._run.config.teacher.name is not None:
            record |= {"teacher_top1": 100 * teacher_top1, "agreement": 100 * agreement}
            self._watch_teacher()
        self._telemetry.train(record)
        self.restart()

    def _watch_teacher(self) -> None:
        """Look once, after enough images, whether the teacher knows the dataset's classes. Every rank must call it."""
        if not self._pairs_wanted or len(self._pairs) * self._run.config.run.global_batch < self._pairs_wanted:
            return
        pairs = self._run.world.all_gather([torch.cat(self._pairs, 1).cpu().numpy()])
        self._pairs, self._pairs_wanted = [], 0
        classes, unnamed = self._run.state.classes, self._run.step.teacher.unnamed
        if warning := teacher_warning(pairs, self._run.plan.index.num_classes, classes, unnamed):
            self._telemetry.say(warning)

    def _error(self, loss: float) -> NonFiniteError:
        """Names the first step in which a loss was not finite, and samples."""
        run, last = self._run, self._run.state.step
        advice = "Lower optim.lr or change run.precision; the run goes on from its newest checkpoint, if there is one"
        mine = [
            (step, len(rows), self._names(step, rows[:3]))
            for step, (bad, gradients) in enumerate(
                zip(self._bad, self._bad_gradients, strict=True), start=last - len(self._bad)
            )
            if len(rows := bad.nonzero().flatten().tolist()) or gradients
        ][:1]
        found = run.world.all_gather(mine)
        if not found:
            return NonFiniteError(
                f"the loss is {loss} in one of the {len(self._bad)} steps up to {last}. {advice}", last
            )
        first = min(step for step, _, _ in found)
        count = sum(num for step, num, _ in found if step == first)
        names = [name for step, _, names in found if step == first for name in names]
        if not count:
            return NonFiniteError(f"step {first + 1}: the gradient is not finite, though the loss is. {advice}", first)
        whose = "the student" if run.config.teacher.name is None else "the student or a teacher"
        message = (
            f"step {first + 1}: the output of {whose} is not finite for {count} of "
            f"{run.config.run.global_batch} images: {', '.join(names[:3])}{', ...' if count > 3 else ''}. {advice}"
        )
        return NonFiniteError(message, first)

    def _names(self, step: int, rows: list[int]) -> list[str]:
        """The samples that this rank's rows of a step are."""
        plan = self._run.plan
        (share,) = rank_plans(plan, step, step + 1, self._run.world, plan.global_batch // self._run.world.size)
        return [plan.index.name(int(share.sample[row])) for row in rows]
