"""What a session does before its first update and after its last one: the folder, the first lines, the summary."""

import contextlib
import signal
from collections.abc import Iterator
from typing import cast

from pipelines import resolve_pipeline
from pipelines.common.files import locked, naming_file, write_synced
from trainer import __version__
from trainer.builder import Run
from trainer.config.sections import to_yaml
from trainer.monitor.description import opening_lines
from trainer.monitor.monitor import Monitor
from trainer.monitor.report.page import PAGE, report_or_reason
from trainer.monitor.run_files import SUMMARY, Evaluation, Summary, read_summary
from trainer.monitor.telemetry import Telemetry
from trainer.state.resume import prepare


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Inside, rank 0 keeps other runs out of the run's folder, which is made if it is not there."""
    if not run.world.is_main:
        yield
        return
    out = run.config.run.out
    out.mkdir(parents=True, exist_ok=True)
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
        facts={
            "precision": str(run.precision).removeprefix("torch."),
            "pipeline": resolve_pipeline(run.config.data.pipeline, run.world.device),
            "together": bool(run.title),
            "validation": run.validation,
        },
        title=run.title,
    )
    has_teacher = run.teachers is not None
    return Monitor(run.world, run.plan, run.state, telemetry, run.pipelines.quarantine, has_teacher)


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
    found = run.world.broadcast_object(read_summary(out / SUMMARY) if run.world.is_main else None)
    if not found or found["step"] != run.state.step or "stopped_by" in found["session"]:
        return None
    if run.state.step < run.stop or run.evaluation_due:
        return None
    summary = cast(Summary, found)  # read_summary has checked its fields.
    monitor.say(f"nothing to do: the run has done {run.state.step} of {run.total_steps} steps")
    if run.world.is_main and summary["finished"] and not (out / "report" / PAGE).exists():
        monitor.say(report_or_reason(out))  # It could not be written when the run ended, on a full disk for example.
    return summary


def prepare_folder(run: Run) -> None:
    """Make the folder ready for a session."""
    out = run.config.run.out
    prepare(run.checkpoints.folder, run.state.step)
    (out / SUMMARY).unlink(missing_ok=True)  # It is an earlier session's.
    with naming_file(out / "config.yaml"):
        write_synced(out / "config.yaml", to_yaml(run.config).encode())
    run.pipelines.keep_decode(out)


def summary_of(run: Run, evaluation: Evaluation, signal_number: int, start_step: int, elapsed_s: float) -> Summary:
    """The summary of a session that began at `start_step`.

    Args:
      evaluation: the last one of the session, {} without one.
      signal_number: of the signal that stopped it, 0 for none.
    """
    config, state = run.config, run.state
    summary = Summary(
        finished=state.step == run.total_steps and not signal_number,
        step=state.step,
        total_steps=run.total_steps,
        student=config.student.name,
        teacher=config.teacher.title,
        dataset=run.plan.index.digest,
        deviations=state.audit,
        quarantined=len(run.pipelines.quarantine),
        evaluation=evaluation,
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
    if signal_number:
        summary["session"]["stopped_by"] = signal.Signals(signal_number).name
    return summary
