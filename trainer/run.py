"""Trains a student: parse, build, loop. Start it plainly, or with torchrun for several ranks.

python trainer/run.py --config configs/usi.yaml --data.root OUT --run.out RUN
torchrun --nproc-per-node 8 trainer/run.py --config configs/usi.yaml --data.root OUT --run.out RUN
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, and not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost rank would bury the line that names it

import torch
from torch import nn

from pipelines import resolve_pipeline
from pipelines.errors import UserError, exit_on_user_error
from pipelines.files import locked, write_synced
from pipelines.plan import EvalPlan, TrainPlan
from trainer import checkpoint
from trainer.audit import audit, audit_table
from trainer.checkpoint import TrainState
from trainer.config import Config, RunConfig, parse, to_dict, to_yaml
from trainer.data import (
    DECODE,
    Pipelines,
    open_indices,
    open_pipelines,
    rank_plans,
    refuse_unreached_sizes,
    share_of_batch,
    train_plan,
)
from trainer.distributed import World, join_world
from trainer.evaluate import evaluate
from trainer.mix import Normalize
from trainer.models import build_student, build_teacher, preprocessing, refuse_size
from trainer.optim import ModelEma, build_optimizer, set_learning_rate
from trainer.ready import facts
from trainer.schedule import learning_rate
from trainer.step import TrainStep
from trainer.telemetry import Stopwatch, Telemetry
from trainer.watchdog import Beating, watched

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKPOINT_PATIENCE_S = 3600  # a slow disk is no hang


@dataclasses.dataclass
class Run:
    """Everything that `build` made and the loop uses.

    Attributes:
      evaluate: gives the metrics of the raw and the averaged weights; None without a validation set.
      precision: of the forward passes.
      changes: what differs from the checkpoint's configuration, in words.
      stop: the step after which this process ends.
    """

    config: Config
    world: World
    plan: TrainPlan
    pipelines: Pipelines
    state: TrainState
    step: TrainStep
    evaluate: Callable[[], dict[str, dict[str, float]]] | None
    micro_batch: int
    total_steps: int
    precision: torch.dtype
    changes: list[str]

    @property
    def stop(self) -> int:
        return min(self.total_steps, self.config.run.stop_after_steps or self.total_steps)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        with exit_on_user_error():
            arguments = sys.argv[1:] if arguments is None else arguments
            config = parse(arguments, prog="trainer/run.py")
            if "--audit" in arguments:
                print(audit_table(audit(config)))
                return
            what_must_agree = functools.partial(facts, config)
            with (
                join_world(config.run.device, what_must_agree, config.run.ready_s) as joined,
                watched(joined, config.run.watchdog_s) as world,
            ):
                train(config, world)
    except KeyboardInterrupt:
        message = "interrupted. Run the same command again: it goes on from the newest checkpoint, if there is one"
        print(message, file=sys.stderr)
        sys.exit(130)


def train(config: Config, world: World) -> dict:
    """Train, from the newest checkpoint in run.out if there is one. Returns the summary.

    Raises:
      UserError: what the user asked for cannot be done; nothing has been written then.
    """
    refuse_unwritable(config.run.out)
    run = build(config, world)
    with claimed(config.run.out, world):
        if world.is_main:
            write_synced(config.run.out / "config.yaml", to_yaml(config).encode())
            if "device" in run.pipelines.decode:
                write_synced(config.run.out / DECODE, (json.dumps(run.pipelines.decode) + "\n").encode())
        folder = config.run.out if world.is_main else None
        return conduct(run, Telemetry(folder, run.state.step, run.total_steps))


def conduct(run: Run, telemetry: Telemetry) -> dict:
    """Go through a run that was built. Returns the summary."""
    config, world = run.config, run.world
    summary_path = config.run.out / "summary.json"
    start_step, start_s = run.state.step, time.perf_counter()
    describe(run, telemetry)
    if start_step >= run.stop and world.choice_of_main(summary_path.exists()):
        telemetry.say(f"nothing to do: the run has done {start_step} of {run.total_steps} steps")
        return json.loads(summary_path.read_text())
    with telemetry.live():
        results = loop(run, telemetry)
    elapsed_s = time.perf_counter() - start_s
    summary = {
        "finished": run.state.step == run.total_steps,
        "step": run.state.step,
        "total_steps": run.total_steps,
        "student": config.student.name,
        "teacher": config.teacher.name,
        "dataset": run.plan.index.digest,
        "deviations": run.state.audit,
        "quarantined": len(run.pipelines.quarantine),
        "evaluation": results,
        "session": {
            "start_step": start_step,
            "elapsed_s": round(elapsed_s, 3),
            "images_per_s": round((run.state.step - start_step) * config.run.global_batch / elapsed_s, 1),
            "ranks": world.size,
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        },
    }
    if world.is_main:
        write_synced(summary_path, (json.dumps(summary, indent=1) + "\n").encode())
        state = "finished" if summary["finished"] else "stopped"
        telemetry.say(f"{state} after step {run.state.step} of {run.total_steps}: {summary_path}")
    return summary


def refuse_unwritable(out: Path) -> None:
    """Raise a UserError, before anything is built, if the run folder cannot be made."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{out}: cannot be made, {existing} is not a folder that can be written. Change --run.out")


@contextlib.contextmanager
def claimed(out: Path, world: World) -> Iterator[None]:
    """Make the run folder and keep other runs out of it."""
    if not world.is_main:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}). Change --run.out") from error
    with locked(out / ".lock", f"{out}: another run is working in it"):
        yield


def build(config: Config, world: World) -> Run:
    """Check everything, build everything, and set it to the newest checkpoint. Writes nothing."""
    micro_batch = share_of_batch(config, world)
    refuse_unreached_sizes(config)
    index, val_index = open_indices(config.data)
    student, teacher = build_models(config, index.num_classes)
    expects = preprocessing(student)
    plan = train_plan(config, index, expects.fill)
    total_steps = plan.steps_per_epoch * config.schedule.total_epochs
    pipelines = open_pipelines(config, {"train": index, **({"val": val_index} if val_index else {})}, world)
    precision = resolve_precision(config.run.precision, world.device)
    student, normalize = place(student, config.run, world)
    teacher, normalize_teacher = place(teacher, config.run, world)
    state = build_state(config, plan, student, precision, world)
    changes = resume(config.run, state, total_steps, world)
    step = TrainStep(
        student,
        teacher,
        normalize_student=normalize,
        normalize_teacher=normalize_teacher,
        optimizer=state.optimizer,
        scaler=state.scaler,
        ema=state.ema,
        distill=config.distill,
        precision=precision,
        seed=config.run.seed,
        micro_batches=config.run.global_batch // world.size // micro_batch,
        world=world,
    )
    evaluation = None
    if val_index is not None:
        evaluation = functools.partial(
            evaluate,
            {"raw": student, **({"ema": state.ema.module} if state.ema else {})},
            normalize,
            pipelines.of["val"],
            EvalPlan(val_index, config.data.eval_size, config.data.eval_crop_pct, expects.interpolation),
            batch=config.run.eval_batch,
            precision=precision,
            world=world,
        )
    return Run(
        config=config,
        world=world,
        plan=plan,
        pipelines=pipelines,
        state=state,
        step=step,
        evaluate=evaluation,
        micro_batch=micro_batch,
        total_steps=total_steps,
        precision=precision,
        changes=changes,
    )


def build_models(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module | None]:
    """Student and teacher on the CPU, after checking that they take the images they will get, of every size.

    Models that take one size alone are built for the last one.
    """
    sizes = config.data.train_sizes
    torch.manual_seed(config.run.seed)
    student = build_student(config.student, num_classes, sizes[-1])
    for size in sorted({*sizes, config.data.eval_size}):
        refuse_size(student, config.student.name, size)
    teacher = build_teacher(config.teacher, num_classes, sizes[-1])
    if teacher is not None:
        for size in sorted(set(sizes)):
            refuse_size(teacher, config.teacher.name, size)
    return student, teacher


def place(model: nn.Module | None, config: RunConfig, world: World) -> tuple[nn.Module | None, Normalize | None]:
    """A model on its device in its memory format, and its own normalisation."""
    if model is None:
        return None, None
    expects = preprocessing(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(world.device, memory_format=memory_format)
    return model, Normalize(expects.mean, expects.std).to(world.device)


def build_state(
    config: Config, plan: TrainPlan, student: nn.Module, precision: torch.dtype, world: World
) -> TrainState:
    """The state of a run that has not begun."""
    return TrainState(
        student=student,
        ema=ModelEma(student, config.ema.decay) if config.ema.decay else None,
        optimizer=build_optimizer(student, config.optim),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16),
        plan={
            "student.name": config.student.name,
            "student.kwargs": to_dict(config)["student"]["kwargs"],
            **plan.describe(),
        },
        config=to_dict(config),
        audit=audit(config),
    )


def loop(run: Run, telemetry: Telemetry) -> dict:
    """All updates from the state's step on. Returns the last evaluation, {} without a validation set."""
    plans = rank_plans(run.plan, run.state.step, run.stop, run.world, run.micro_batch)
    with contextlib.closing(run.pipelines.of["train"].batches(plans)) as batches:
        beating = Beating(batches, run.world.beat, lambda: f"step {run.state.step + 1}")
        results = update(run, telemetry, Stopwatch(beating))
    if not results and run.evaluate is not None and run.state.step == run.total_steps:
        results = run.evaluate()  # of a run that was killed after its last step
    settle(run, telemetry)
    return results


def update(run: Run, telemetry: Telemetry, batches: Stopwatch) -> dict:
    """The updates themselves, in the order in which things happen."""
    config, state = run.config, run.state
    log = _LossLog(run, telemetry, batches)
    results = {}
    while state.step < run.stop:
        epoch = state.step // run.plan.steps_per_epoch
        lr = learning_rate(epoch, config.optim, config.schedule)
        set_learning_rate(state.optimizer, lr)
        log.add(run.step(batches, state.step).loss)
        state.step += 1
        telemetry.advance(state.step)
        epoch_ends = state.step % run.plan.steps_per_epoch == 0
        evaluation_due = epoch_ends and ((epoch + 1) % config.run.eval_every == 0 or state.step == run.total_steps)
        checkpoint_due = state.step % config.run.checkpoint_every == 0 or state.step == run.stop
        if state.step % config.run.log_every == 0 or evaluation_due or checkpoint_due:
            log.write(epoch, lr)
            settle(run, telemetry)
        if evaluation_due and run.evaluate is not None:
            results = run.evaluate()
            settle(run, telemetry)
            telemetry.evaluation(state.step, epoch, results)
            log.restart()
        if checkpoint_due:
            save(run)
    return results


def settle(run: Run, telemetry: Telemetry) -> None:
    """Write down what damaged samples were met, and end the run if they are too many."""
    if line := run.pipelines.quarantine.settle():
        telemetry.say(line)


class _LossLog:
    """Averages between two lines of the log. Reading them is the only time the host waits for the device."""

    def __init__(self, run: Run, telemetry: Telemetry, batches: Stopwatch):
        self._run = run
        self._telemetry = telemetry
        self._batches = batches
        self.restart()

    def restart(self) -> None:
        self._loss = torch.zeros((), device=self._run.world.device)
        self._steps = 0
        self._start_s = time.perf_counter()
        self._waited_s = self._batches.waited_s

    def add(self, loss: torch.Tensor) -> None:
        self._loss += loss
        self._steps += 1

    def write(self, epoch: int, lr: float) -> None:
        world = self._run.world
        loss = world.sum(self._loss).item() / world.size / self._steps
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in one of the {self._steps} steps up to {self._run.state.step}. "
                "Lower optim.lr or change run.precision; the run goes on from its newest checkpoint, if there is one"
            )
        elapsed_s = time.perf_counter() - self._start_s
        record = {
            "step": self._run.state.step,
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "images_per_s": self._steps * self._run.config.run.global_batch / elapsed_s,
            "input_wait": (self._batches.waited_s - self._waited_s) / elapsed_s,
        }
        self._telemetry.train(record)
        self.restart()


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the forward passes; auto is bf16 on GPUs that have it, fp16 on others, fp32 on CPUs."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def resume(config: RunConfig, state: TrainState, total_steps: int, world: World) -> list[str]:
    """Set the state to the newest checkpoint in the run folder, if there is one. Returns what has changed since."""
    found = checkpoint.checkpoints(checkpoint_folder(config))
    newest = world.choice_of_main(found[-1] if found else None)
    if newest is None:
        return []
    changes = checkpoint.load(newest, state)
    if state.step > total_steps:
        raise UserError(
            f"{newest}: has done {state.step} steps, this run ends after {total_steps}: raise schedule.epochs, "
            "or start a new run with another --run.out"
        )
    return changes


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return config.out / "checkpoints"


def save(run: Run) -> None:
    """Write a checkpoint; all ranks wait for it."""
    run.world.beat(f"checkpoint of step {run.state.step}", CHECKPOINT_PATIENCE_S)
    if run.world.is_main:
        checkpoint.save(checkpoint_folder(run.config.run), run.state, run.config.run.keep_checkpoints)
    run.world.barrier()


def describe(run: Run, telemetry: Telemetry) -> None:
    """Say what is about to happen."""
    config, index = run.config, run.plan.index
    teacher = f"from {config.teacher.name}" if config.teacher.name else "without a teacher"
    pipeline = resolve_pipeline(config.data.pipeline, run.world.device)
    telemetry.say(
        f"{config.student.name} {teacher}: {len(index):,} images of {index.num_classes} classes, "
        f"{config.schedule.total_epochs} epochs of {run.plan.steps_per_epoch} steps of {config.run.global_batch} on "
        f"{run.world.size} x {run.world.device.type}, {str(run.precision).removeprefix('torch.')}, {pipeline} pipeline"
    )
    if run.state.step:
        telemetry.say(f"resuming after step {run.state.step}")
    remaining = config.ema.decay**run.total_steps
    if remaining > 0.05:
        telemetry.say(
            f"ema.decay {config.ema.decay} is slow for {run.total_steps} steps: at the end the average still holds "
            f"{remaining:.0%} of the initial weights"
        )
    if run.state.audit:
        telemetry.say(f"{len(run.state.audit)} settings differ from the USI recipe; --audit lists them")
    for change in run.changes:
        telemetry.say(f"changed since the checkpoint: {change}")


if __name__ == "__main__":
    main()
