"""The training: every update, and what happens between two of them, in the order of time."""

import contextlib
import dataclasses
import time
from collections.abc import Generator

from pipelines.common.errors import UserError, counted, system_error_text
from trainer.builder import Run
from trainer.monitor.description import ending
from trainer.monitor.monitor import Monitor, NonFiniteError
from trainer.monitor.report.page import report_or_reason
from trainer.monitor.run_files import SUMMARY, Evaluation, Summary, write_summary
from trainer.monitor.sample_grid import SAMPLES
from trainer.session import claimed, describe, ended_summary, make_monitor, prepare_folder, summary_of
from trainer.state.checkpoint import checkpoints, step_of
from trainer.state.resume import roll_back


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
    loop = training(run)
    with run.preemption.catching_signals():
        while True:
            try:
                next(loop)
            except StopIteration as end:
                return end.value


def training(run: Run) -> Generator[None, None, Summary]:
    """As `train`, an update for each item that is asked for; signals are left to the caller.

    It pauses before the first update, when the run has its folder, and after each one.
    """
    with claimed(run):
        monitor = make_monitor(run)
        start_step, start_s = run.state.step, time.perf_counter()
        describe(run, monitor)
        if ended := ended_summary(run, monitor):
            return ended
        if run.world.is_main:
            prepare_folder(run)
        with monitor.telemetry.live():
            yield
            outcome = yield from updates_with_rollback(run, monitor)
        elapsed_s = time.perf_counter() - start_s
        summary = summary_of(run, outcome.evaluation, outcome.signal, start_step, elapsed_s)
        if run.world.is_main:
            write_summary(run.config.run.out / SUMMARY, summary)
            monitor.say(ending(run.config, run.state.step, run.total_steps, outcome.signal))
            if summary["finished"]:
                monitor.say(report_or_reason(run.config.run.out))
        return summary


def updates_with_rollback(run: Run, monitor: Monitor) -> Generator[None, None, Outcome]:
    """Run all updates, with a pause after each.

    With run.on_nonfinite rollback, return to the last checkpoint once after a non-finite loss.
    """
    retried_step = -1
    while True:
        try:
            outcome = yield from updates(run, monitor)
            break
        except NonFiniteError as error:
            # The same data give the same loss, so one retry finds out whether the machine was to blame.
            if run.config.run.on_nonfinite == "stop" or error.step <= retried_step:
                raise
            retried_step = error.step
            monitor.say(str(error))
        notes = roll_back(run.checkpoints, run.state, run.total_steps)
        monitor.telemetry.rewind(run.state.step)
        for note in notes:
            monitor.say(note)
    if not outcome.evaluation and not outcome.signal and run.evaluate and run.state.step == run.total_steps:
        # An earlier session has evaluated the last weights and was killed before it wrote the summary.
        outcome = dataclasses.replace(outcome, evaluation=run.evaluate())
    monitor.report_damage()
    run.checkpoints.finish()
    return outcome


def updates(run: Run, monitor: Monitor) -> Generator[None, None, Outcome]:
    """Every update from run.state.step on, and what happens between two of them; it pauses after each update.

    Raises:
      NonFiniteError: on every rank, if a loss or gradient is not finite.
      UserError: the input of an update or of an evaluation fails, too many images are damaged, or a checkpoint cannot
        be written. On one rank the updates before an error of the input are saved first.
    """
    config, state = run.config.run, run.state
    # The step was built for this session's number of ranks and micro-batch.
    assert (run.step.division.ranks, run.step.division.micro_batch) == (run.world.size, state.micro_batch)
    is_saved, evaluation = True, Evaluation()  # The state is that of its checkpoint, or no update has changed it.
    # Restore the last update's learning rate: a checkpoint may be saved before the next update sets it.
    run.set_learning_rate(max(state.step - 1, 0))
    preview = config.out / SAMPLES if run.world.is_main else None
    with contextlib.closing(run.feed(state.step, preview)) as batches:
        monitor.watch(batches.wait)
        while True:
            # All ranks get the answer to the question of one step ago, so that nobody waits for it.
            agreed = run.preemption.agree(bool(run.checkpoints.writer.failure))
            if agreed.failed:
                run.checkpoints.check()
            try:
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
                    monitor.telemetry.sync()  # A checkpoint must not outlive the lines up to it.
                    run.checkpoints.save(state)
                    is_saved = True
                if is_end:
                    # A signal after the last update stops nothing: the run is complete.
                    is_complete = state.step == run.stop and not run.evaluation_due
                    return Outcome(evaluation, 0 if is_complete else agreed.signal)
                run.set_learning_rate(state.step)
                metrics = run.step(batches, state.step)
            except UserError as error:
                # With several ranks the others may be in the middle of an update.
                if isinstance(error, NonFiniteError) or run.world.size > 1:
                    raise
                reason = why_not_saved(run, monitor, is_saved=is_saved)
                raise saying_where_it_resumes(error, run, reason) from error
            state.step += 1
            is_saved = False
            monitor.add(metrics)
            yield


def why_not_saved(run: Run, monitor: Monitor, *, is_saved: bool) -> str:
    """Save the updates so far, unless they are saved already. Returns why this failed, "" if it did not.

    The state is one between two updates: an update whose input fails has changed nothing.
    """
    try:
        if not is_saved:
            run.set_learning_rate(max(run.state.step - 1, 0))  # It may be that of the update whose input failed.
            monitor.log_updates()
            with contextlib.suppress(UserError):  # Too many samples are damaged: the run that resumes counts them, too.
                monitor.report_damage()
            monitor.telemetry.sync()
            run.checkpoints.save(run.state)
        run.checkpoints.finish()
    except UserError as failure:
        return str(failure)
    except OSError as failure:
        return system_error_text(failure)
    return ""


def saying_where_it_resumes(error: UserError, run: Run, reason: str) -> UserError:
    """The error of an input, with the newest checkpoint, if there is one.

    Args:
      reason: why the last updates are not saved, "" if they are.
    """
    sentences = [str(error)]
    if reason:
        sentences.append(f"The updates since the newest checkpoint are not saved: {reason}")
    if saved := checkpoints(run.checkpoints.folder):
        done = counted(step_of(saved[-1]), "update")
        sentences.append(f"Then run the same command again: it resumes after {done}, from {saved[-1].name}")
    return UserError(". ".join(sentences), help_with=error.help_with)


def evaluate_weights(run: Run, monitor: Monitor) -> Evaluation:
    """The metrics of the present weights, {} if a signal came; the best weights so far are saved."""
    assert run.evaluate is not None
    state = run.state
    with monitor.evaluating():  # A checkpoint that could not be written is reported by the next call of agree().
        results = run.evaluate(interrupted=lambda: bool(run.preemption.agree(False).signal))
    if not results:
        return {}
    state.evaluated = state.step
    monitor.telemetry.evaluation(state.step, results)
    weights = max(results, key=lambda name: results[name]["top1"])
    if results[weights]["top1"] > state.best.get("top1", -1.0):
        state.best = {"step": state.step, "weights": weights, "top1": results[weights]["top1"]}
        run.checkpoints.save_best(state, results[weights])
    return results
