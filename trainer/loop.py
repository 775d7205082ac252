"""The training: every update, and what happens between two of them, in the order of time."""

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections.abc import Iterator
from typing import cast

from pipelines.common.errors import UserError
from pipelines.common.files import locked, write_synced
from trainer import __version__
from trainer.builder import Run
from trainer.config.sections import to_yaml
from trainer.feed import DECODE, sample_names
from trainer.monitor.description import ending, opening_lines
from trainer.monitor.monitor import Monitor
from trainer.monitor.nonfinite import NonFiniteError
from trainer.monitor.report.page import PAGE, report_or_reason
from trainer.monitor.run_files import SUMMARY, Evaluation, Summary, naming, read_summary, write_summary
from trainer.monitor.sample_grid import SAMPLES
from trainer.monitor.telemetry import Telemetry
from trainer.state.resume import prepare, roll_back


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the updates ended.

    Attributes:
      evaluation: the last one of this process, {} without one.
      signal: the number of the signal that stopped them, 0 if they reached their end.
    """

    evaluation: Evaluation
    signal: int


def train(run: Run) -> Summary:
    """Train from the run's present step on. Returns the summary, which rank 0 has written.

    SIGTERM, SIGUSR1, SIGHUP and SIGINT on any rank end it after the present step, with a checkpoint.

    Raises:
      UserError: the run cannot be started, and nothing has been written; or it cannot continue.
    """
    with run.preemption.catching_signals(), claimed(run):
        monitor = make_monitor(run)
        start_step, start_s = run.state.step, time.perf_counter()
        describe(run, monitor)
        if ended := ended_summary(run, monitor):
            return ended
        if run.world.is_main:
            prepare_folder(run)
        with monitor.session():
            outcome = updates_with_rollback(run, monitor)
        summary = summary_of(run, outcome, start_step, time.perf_counter() - start_s)
        if run.world.is_main:
            write_summary(run.config.run.out / SUMMARY, summary)
            monitor.say(ending(run.config, run.state.step, run.total_steps, outcome.signal))
            if summary["finished"]:
                monitor.say(report_or_reason(run.config.run.out))
        return summary


def updates_with_rollback(run: Run, monitor: Monitor) -> Outcome:
    """All updates; after a loss that is not finite once more from the last checkpoint, if the configuration says so."""
    retried_step = -1
    while True:
        try:
            outcome = updates(run, monitor)
            break
        except NonFiniteError as error:
            # The same data give the same loss, so one retry finds out whether the machine was to blame.
            if run.config.run.on_nonfinite == "stop" or error.step <= retried_step:
                raise
            retried_step = error.step
            monitor.say(str(error))
        notes = roll_back(run.checkpoints, run.state, run.total_steps)
        monitor.rewind()
        for note in notes:
            monitor.say(note)
    if not outcome.evaluation and not outcome.signal and run.evaluate and run.state.step == run.total_steps:
        # An earlier session has evaluated the last weights and was killed before it wrote the summary.
        outcome = dataclasses.replace(outcome, evaluation=run.evaluate())
    monitor.report_damage()
    run.checkpoints.finish()
    return outcome


def updates(run: Run, monitor: Monitor) -> Outcome:
    """Every update from run.state.step on, and what happens between two of them.

    Raises:
      NonFiniteError: on every rank, if a loss or gradient is not finite.
    """
    config, state = run.config.run, run.state
    assert run.step.num_micro_batches * state.micro_batch * run.world.size == run.plan.global_batch
    is_saved, evaluation = True, Evaluation()
    # Restore the last update's learning rate: a checkpoint may be saved before the next update sets it.
    run.set_learning_rate(max(state.step - 1, 0))
    preview = config.out / SAMPLES if run.world.is_main else None
    with contextlib.closing(run.feed(state.step, preview)) as batches:
        monitor.watch(batches.wait)
        while True:
            agreed = run.preemption.agree(bool(run.checkpoints.writer.failure))
            if agreed.failed:
                run.checkpoints.check()
            is_end = bool(agreed.signal) or state.step == run.stop
            checkpoint_due = is_end or state.step % config.checkpoint_every == 0
            if checkpoint_due or run.evaluation_due or state.step % config.log_every == 0:
                monitor.flush()
            if run.evaluation_due and not agreed.signal:
                evaluation = evaluate_weights(run, monitor)
                if not evaluation:  # A signal interrupted it; the next agreement reports it to all ranks.
                    continue
                is_saved = False
            if checkpoint_due and not is_saved:
                monitor.sync()  # A checkpoint must not outlive the lines up to it.
                run.checkpoints.save(state)
                is_saved = True
            if is_end:
                is_complete = state.step == run.stop and not run.evaluation_due
                return Outcome(evaluation, 0 if is_complete else agreed.signal)
            run.set_learning_rate(state.step)
            monitor.add(run.step(batches, state.step))
            state.step += 1
            is_saved = False
            monitor.advance()


def evaluate_weights(run: Run, monitor: Monitor) -> Evaluation:
    """The metrics of the present weights, {} if a signal came; the best weights so far are saved."""
    assert run.evaluate is not None
    state = run.state
    with monitor.evaluating():
        results = run.evaluate(interrupted=lambda: bool(run.preemption.agree(False).signal))
    if not results:
        return {}
    state.evaluated = state.step
    monitor.evaluation(results)
    weights = max(results, key=lambda name: results[name]["top1"])
    if results[weights]["top1"] > state.best.get("top1", -1.0):
        state.best = {"step": state.step, "weights": weights, "top1": results[weights]["top1"]}
        run.checkpoints.save_best(state, results[weights])
    return results


# --- before the first update and after the last one ---


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Inside, rank 0 keeps other runs out of the run's folder, which is made if it is not there."""
    if not run.world.is_main:
        yield
        return
    out = run.config.run.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}). Change --run.out") from error
    with locked(out / ".lock", f"{out}: another run is working in it"):
        yield


def make_monitor(run: Run) -> Monitor:
    """The run's monitor; it writes nothing yet."""
    telemetry = Telemetry(
        run.config.run.out,
        run.world,
        step=run.state.step,
        total_steps=run.total_steps,
        steps_per_epoch=run.plan.steps_per_epoch,
        sinks=run.sinks,
        validation=run.validation,
    )
    unnamed = run.step.teacher.unnamed if run.step.teacher is not None else None
    name_samples = functools.partial(sample_names, run.plan, run.world)
    quarantine = run.pipelines.quarantine
    return Monitor(run.config, run.world, run.plan, run.state, telemetry, quarantine, unnamed, name_samples)


def describe(run: Run, monitor: Monitor) -> None:
    """Say what is about to happen."""
    lines = opening_lines(
        run.config,
        run.plan,
        run.state,
        run.world,
        precision=run.precision,
        total_steps=run.total_steps,
        validation=run.validation,
    )
    for line in [*lines, *run.notes]:
        monitor.say(line)


def ended_summary(run: Run, monitor: Monitor) -> Summary | None:
    """The summary of an earlier session if it has done all that this one is to do, else None."""
    out = run.config.run.out
    summary: Summary | None = None
    if run.world.is_main:
        found = read_summary(out / SUMMARY)
        if found and found["step"] == run.state.step and "stopped_by" not in found["session"]:
            summary = cast(Summary, found)  # read_summary has checked its fields.
    summary = run.world.broadcast_object(summary)
    if summary is None or run.state.step < run.stop or run.evaluation_due:
        return None
    monitor.say(f"nothing to do: the run has done {run.state.step} of {run.total_steps} steps")
    if run.world.is_main and summary["finished"] and not (out / "report" / PAGE).exists():
        monitor.say(report_or_reason(out))  # The disk was full when the run ended.
    return summary


def prepare_folder(run: Run) -> None:
    """Make the folder ready for a session."""
    out = run.config.run.out
    prepare(run.checkpoints.folder, run.state.step)
    (out / SUMMARY).unlink(missing_ok=True)  # It is an earlier session's.
    with naming(out / "config.yaml"):
        write_synced(out / "config.yaml", to_yaml(run.config).encode())
    if "device" in run.pipelines.decode:
        write_synced(out / DECODE, (json.dumps(run.pipelines.decode) + "\n").encode())


def summary_of(run: Run, outcome: Outcome, start_step: int, elapsed_s: float) -> Summary:
    """The summary of a session that began at `start_step`."""
    config, state = run.config, run.state
    summary = Summary(
        finished=state.step == run.total_steps and not outcome.signal,
        step=state.step,
        total_steps=run.total_steps,
        student=config.student.name,
        teacher=config.teacher.title,
        dataset=run.plan.index.digest,
        deviations=state.audit,
        quarantined=len(run.pipelines.quarantine),
        evaluation=outcome.evaluation,
        best=state.best,
        version=__version__,
        source=run.source,
        session={
            "start_step": start_step,
            "elapsed_s": round(elapsed_s, 3),
            "images_per_s": round((state.step - start_step) * config.run.global_batch / elapsed_s, 1),
            "ranks": run.world.size,
            "device": run.world.device_name,
        },
    )
    if outcome.signal:
        summary["session"]["stopped_by"] = signal.Signals(outcome.signal).name
    return summary
