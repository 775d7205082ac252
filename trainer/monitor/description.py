"""The lines about a run that are printed before it begins and when it ends."""

import signal

import torch

from pipelines import resolve_pipeline
from pipelines.plan.plan import TrainPlan
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.monitor.run_files import METRICS, SUMMARY, last_validation
from trainer.state.train_state import TrainState

_MOST_INITIAL = 0.05  # A larger fraction of the initial weights in the EMA at the end is reported.


def opening_lines(
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    world: World,
    *,
    precision: torch.dtype,
    total_steps: int,
    validation: str,
) -> list[str]:
    """What is about to happen, a sentence each; `validation` is the digest of the validation images, or ""."""
    index = plan.index
    teacher = f"from {config.teacher.title}" if config.teacher.title else "without a teacher"
    pipeline = resolve_pipeline(config.data.pipeline, world.device)
    lines = [
        f"{config.student.name} {teacher}: {len(index):,} images of {index.num_classes} classes, "
        f"{config.schedule.total_epochs} epochs of {plan.steps_per_epoch} steps of {config.run.global_batch} on "
        f"{world.size} x {world.device.type}, {str(precision).removeprefix('torch.')}, {pipeline} pipeline, "
        f"into {config.run.out}"
    ]
    if state.step:
        lines.append(f"resuming after step {state.step}")
    elif config.student.checkpoint or config.student.pretrained:
        note = f": {state.student.start_note}" if state.student.start_note else ""
        lines.append(f"starting from {config.student.checkpoint or f'the weights of {config.student.name}'}{note}")
    before = last_validation(config.run.out / METRICS) if state.step and world.is_main else ""
    if before and validation and before != validation:
        lines.append(
            f"warning: the validation images have changed since step {state.step}: accuracies before and after it "
            "cannot be compared, and best.pt may be of the images before"
        )
    remaining = 0.0 if config.ema.warmup else config.ema.decay**total_steps
    if remaining > _MOST_INITIAL:
        lines.append(
            f"warning: ema.decay {config.ema.decay} is slow for {total_steps} steps: at the end the EMA still holds "
            f"{remaining:.0%} of the initial weights"
        )
    if state.audit:
        lines.append(f"{len(state.audit)} settings differ from the USI recipe; --audit lists them")
    return lines


def ending(config: Config, step: int, total_steps: int, signal_number: int) -> str:
    """The last line of a session."""
    progress = f"after step {step} of {total_steps}"
    if signal_number:
        return f"{signal.Signals(signal_number).name}: stopped {progress}. Run the same command again to resume there"
    result = "finished" if step == total_steps else "stopped"
    return f"{result} {progress}: {config.run.out / SUMMARY}"
