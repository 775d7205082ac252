"""Trains a student: parse, build, loop. Start it plainly, or with torchrun for several ranks.

python trainer/run.py --config configs/usi.yaml --data.root OUT --run.out RUN
torchrun --nproc-per-node 8 trainer/run.py --config configs/usi.yaml --data.root OUT --run.out RUN
"""

import os
import signal

if __name__ == "__main__":  # the imports take seconds, and there is nothing to save yet: end without a traceback
    for _number, _code in ((signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGTERM, 75)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, and not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost rank would bury the line that names it

import torch
from torch import nn

from pipelines import Pipeline, resolve_pipeline
from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import locked, write_synced
from pipelines.plan.plan import EvalPlan, TrainPlan
from trainer.cluster.preemption import INTERRUPTED, Control, exit_code, handling, requeueing_on_signals
from trainer.cluster.rendezvous import facts
from trainer.cluster.watchdog import watched
from trainer.cluster.world import World, join_world
from trainer.config.recipe import audit, audit_table
from trainer.config.sections import Config, RunConfig, parse, to_dict, to_yaml
from trainer.evaluation.predict import EvalPass
from trainer.feed import (
    DECODE,
    check_sizes_are_reached,
    dataset_classes,
    open_indices,
    open_pipelines,
    resolve_micro_batch,
    train_plan,
)
from trainer.loop import Run, loop, restore_statistics, resume
from trainer.micro_batch import choose_micro_batch, reporting_out_of_memory
from trainer.models.checks import check_student, one_value_is_reported
from trainer.models.class_names import order_doubt
from trainer.models.factory import synchronize_batch_norms
from trainer.models.preprocessing import preprocessing
from trainer.models.student import build_student
from trainer.models.teacher import Teachers, build_teachers
from trainer.monitor.report.page import PAGE, report_or_reason
from trainer.monitor.run_files import METRICS, SUMMARY, last_validation, naming, read_summary, reporting_full_disk
from trainer.monitor.sinks import open_sinks
from trainer.monitor.telemetry import Telemetry
from trainer.state import checkpoint
from trainer.state.checkpoint import TrainState, Writer
from trainer.update.compiler import COMPILE_PATIENCE_S, Compiler, choose_compiler, kernel_error, uncompiled
from trainer.update.mixing import Normalize
from trainer.update.optimizer import ModelEma, build_optimizer, gradient_clipping
from trainer.update.precision import allow_tf32, resolve_precision
from trainer.update.schedule import ema_decay, initial_fraction
from trainer.update.step import TrainStep, gray_batch


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with handling({signal.SIGINT: signal.default_int_handler}):
        command(arguments)


def command(arguments: list[str] | None) -> None:
    """What the command line says; ends the process where that is not done."""
    try:
        with exit_on_user_error(), reporting_out_of_memory(), one_value_is_reported():
            arguments = sys.argv[1:] if arguments is None else arguments
            config = parse(arguments, prog="trainer/run.py")
            if "--audit" in arguments:
                print(audit_table(config))
                return
            agree = functools.partial(facts_to_compare, config)
            with (
                reporting_full_disk(),
                requeueing_on_signals(),
                join_world(config.run.device, agree, config.run.ready_s) as joined,
                watched(joined, config.run.watchdog_s) as world,
            ):
                summary = train(config, world)
    except KeyboardInterrupt:
        message = "interrupted. Run the same command again: it goes on from the newest checkpoint, if there is one"
        print(message, file=sys.stderr)
        sys.exit(INTERRUPTED)
    if stopped_by := summary["session"].get("stopped_by"):
        sys.exit(exit_code(signal.Signals[stopped_by]))


def facts_to_compare(config: Config, device: torch.device) -> dict:
    """Of all ranks: besides the configuration, what `auto` comes to on their devices."""
    return {**facts(config), "the precision": str(resolve_precision(config.run.precision, device))}


def train(config: Config, world: World) -> dict:
    """Train, from the newest checkpoint in run.out if there is one. Returns the summary.

    SIGTERM, SIGUSR1, SIGHUP and SIGINT on any rank end it after the present step, with a checkpoint.

    Raises:
      UserError: what the user asked for cannot be done; nothing has been written then.
    """
    check_writable(config.run.out)
    sinks = open_sinks(config) if world.is_main else []
    control = Control(world)
    with control.catching_signals(), contextlib.ExitStack() as stack:
        run = build(config, world, control)
        stack.enter_context(claimed(config.run.out, world))
        telemetry = Telemetry(
            config.run.out,
            world,
            step=run.state.step,
            total_steps=run.total_steps,
            steps_per_epoch=run.plan.steps_per_epoch,
            sinks=sinks,
            validation=run.validation,
        )
        return conduct(run, telemetry)


def conduct(run: Run, telemetry: Telemetry) -> dict:
    """Go through a run that was built. Returns the summary."""
    config, world = run.config, run.world
    summary_path = config.run.out / SUMMARY
    start_step, start_s = run.state.step, time.perf_counter()
    describe(run, telemetry)
    summary = world.broadcast_object(ended_summary(summary_path, start_step) if world.is_main else {})
    if summary and start_step >= run.stop and not run.evaluation_pending:
        telemetry.say(f"nothing to do: the run has done {start_step} of {run.total_steps} steps")
        if world.is_main and summary["finished"] and not (config.run.out / "report" / PAGE).exists():
            telemetry.say(report_or_reason(config.run.out))  # the disk was full at the end
        return summary
    if world.is_main:
        prepare(run)
    with telemetry.live():
        outcome = loop(run, telemetry)
    elapsed_s = time.perf_counter() - start_s
    summary = {
        "finished": run.state.step == run.total_steps and not outcome.signal,
        "step": run.state.step,
        "total_steps": run.total_steps,
        "student": config.student.name,
        "teacher": config.teacher.title,
        "dataset": run.plan.index.digest,
        "deviations": run.state.audit,
        "quarantined": len(run.pipelines.quarantine),
        "evaluation": outcome.evaluation,
        "best": run.state.best,
        "session": {
            "start_step": start_step,
            "elapsed_s": round(elapsed_s, 3),
            "images_per_s": round((run.state.step - start_step) * config.run.global_batch / elapsed_s, 1),
            "ranks": world.size,
            "device": world.device_name,
            **({"stopped_by": signal.Signals(outcome.signal).name} if outcome.signal else {}),
        },
    }
    if world.is_main:
        with naming(summary_path):
            write_synced(summary_path, (json.dumps(summary, indent=1) + "\n").encode())
        telemetry.say(ending(run, outcome.signal))
        if summary["finished"]:
            telemetry.say(report_or_reason(config.run.out))
    return summary


def prepare(run: Run) -> None:
    """Make the folder ready for a session."""
    out = run.config.run.out
    checkpoint.prepare(run.folder, run.state.step)
    (out / SUMMARY).unlink(missing_ok=True)  # of an earlier session
    with naming(out / "config.yaml"):
        write_synced(out / "config.yaml", to_yaml(run.config).encode())
    if "device" in run.pipelines.decode:
        write_synced(out / DECODE, (json.dumps(run.pipelines.decode) + "\n").encode())


def ended_summary(path: Path, step: int) -> dict:
    """The summary of a session that came to its end after `step`; {} if there is none."""
    summary = read_summary(path) or {}
    return summary if summary and summary["step"] == step and "stopped_by" not in summary["session"] else {}


def ending(run: Run, signal_number: int) -> str:
    """The last line."""
    where = f"after step {run.state.step} of {run.total_steps}"
    if signal_number:
        return (
            f"{signal.Signals(signal_number).name}: stopped {where}. Run the same command again: it goes on from there"
        )
    state = "finished" if run.state.step == run.total_steps else "stopped"
    return f"{state} {where}: {run.config.run.out / SUMMARY}"


def check_writable(out: Path) -> None:
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


def build(config: Config, world: World, control: Control | None = None) -> Run:
    """Check everything, build everything, and set it to the newest checkpoint. Writes nothing."""
    micro_batch = resolve_micro_batch(config, world)
    check_sizes_are_reached(config)
    index, val_index = open_indices(config.data)
    classes = dataset_classes(config.data)
    student, teacher = build_models(config, index.num_classes, classes, micro_batch, world)
    expects = preprocessing(student)
    plan = train_plan(config, index, expects.fill)
    total_steps = plan.steps_per_epoch * config.schedule.total_epochs
    pipelines = open_pipelines(config, {"train": index, **({"val": val_index} if val_index else {})}, world)
    precision = resolve_precision(config.run.precision, world.device)
    if world.device.type == "cuda":
        allow_tf32(config.run.tf32)
        torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest algorithms are worth a search
    student, teacher = place(student, config.run, world), place(teacher, config.run, world)
    if teacher is not None:
        teacher.to_precision(precision)
    normalize = Normalize(expects.mean, expects.std, precision).to(world.device)
    compiler, note = choose_compiler(config.run.compile, student, world)
    state = build_state(config, plan, student, precision, classes, world)
    notes = [*(teacher.notes if teacher else []), *([note] if note else [])]
    if trouble := kernel_error(world):
        notes.append(f"without Triton, which does not work here ({trouble}), mixing and DALI's RandAugment are slower")
    notes += resume(config.run, state, total_steps, world)

    def make_step(world: World, micro_batch: int, compiler: Compiler = uncompiled) -> TrainStep:
        return build_step(config, state, teacher, normalize, precision, micro_batch, world, compiler)

    evaluation, evaluate_one_batch = None, None
    if val_index is not None:
        plan_of_val = EvalPlan(val_index, config.data.eval_size, config.data.eval_crop_pct, expects.interpolation)
        evaluate_plan = evaluator(config.run, state, normalize, pipelines.of["val"], precision)
        evaluation = evaluate_plan(plan_of_val, world)
        one_batch = plan_of_val.first(config.run.eval_batch)
        evaluate_one_batch = evaluate_plan(one_batch, world.by_itself())
    if config.run.micro_batch == "auto":
        notes.append(choose_micro_batch(config, plan, state, pipelines, world, make_step, evaluate_one_batch))
    else:
        state.micro_batch = micro_batch
    step, note = warmed_up(make_step, config, plan, state, world, compiler)
    notes += [note] if note else []
    return Run(
        config=config,
        world=world,
        plan=plan,
        pipelines=pipelines,
        state=state,
        step=step,
        evaluate=evaluation,
        control=control or Control(world),
        writer=Writer(),
        total_steps=total_steps,
        precision=precision,
        notes=notes,
        validation=val_index.digest if val_index else "",
    )


def build_models(
    config: Config, num_classes: int, classes: list[str] | None, micro_batch: int, world: World
) -> tuple[nn.Module, Teachers | None]:
    """Student and teachers on the CPU, after checking that they take the images they will get, of every size.

    Models that take one size alone are built for the last one, or for teacher.image_size. `classes` are the dataset's.
    """
    torch.manual_seed(config.run.seed)
    doubt = order_doubt(config.data.root)
    student = build_student(config.student, num_classes, config.data.train_sizes[-1], classes, doubt)
    check_student(student, config, num_classes, micro_batch, world)
    if config.run.batch_norm == "sync":
        student = synchronize_batch_norms(student, world)
    return student, build_teachers(config, num_classes, classes, doubt)


def place(model: nn.Module | None, config: RunConfig, world: World) -> nn.Module | None:
    """A model on its device in its memory format; None stays None."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return None if model is None else model.to(world.device, memory_format=memory_format)


def build_state(
    config: Config,
    plan: TrainPlan,
    student: nn.Module,
    precision: torch.dtype,
    classes: list[str] | None,
    world: World,
) -> TrainState:
    """The state of a run that has not begun."""
    return TrainState(
        student=student,
        ema=ModelEma(student) if config.ema.decay else None,
        optimizer=build_optimizer(student, config.optim),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16),
        plan={
            "student.name": config.student.name,
            "student.kwargs": to_dict(config)["student"]["kwargs"],
            **plan.describe(),
        },
        config=to_dict(config),
        audit=audit(config),
        classes=classes,
    )


def evaluator(
    config: RunConfig, state: TrainState, normalize: Normalize, pipeline: Pipeline, precision: torch.dtype
) -> Callable[[EvalPlan, World], Callable[..., dict]]:
    """Functions that evaluate a run's raw and EMA weights on a plan."""
    weights = {"raw": state.student, **({"ema": state.ema.module} if state.ema else {})}

    def evaluate_plan(plan: EvalPlan, world: World) -> Callable[..., dict]:
        eval_pass = EvalPass(normalize, pipeline, plan, config.eval_batch, precision, world)
        return functools.partial(eval_pass.accuracy, weights)

    return evaluate_plan


def build_step(
    config: Config,
    state: TrainState,
    teacher: Teachers | None,
    normalize: Normalize,
    precision: torch.dtype,
    micro_batch: int,
    world: World,
    compiler: Compiler,
) -> TrainStep:
    """The update of a run."""
    step = TrainStep(
        state.student,
        teacher,
        normalize=normalize,
        optimizer=state.optimizer,
        scaler=state.scaler,
        clip=gradient_clipping(state.student, config.optim),
        ema=state.ema,
        ema_decay=functools.partial(ema_decay, config=config.ema),
        distill=config.distill,
        precision=precision,
        seed=config.run.seed,
        micro_batches=config.run.global_batch // world.size // micro_batch,
        batch_norm=config.run.batch_norm,
        world=world,
        compiler=compiler,
    )
    restore_statistics(step, state, world)
    return step


def warmed_up(
    make_step: Callable[..., TrainStep],
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    world: World,
    compiler: Compiler,
) -> tuple[TrainStep, str]:
    """The update after a rehearsal, where it needs one.

    DDP arranges its buckets anew after the first backward pass. The order in which gradients are summed depends on
    them, so without this a run that goes on would differ from one that was never stopped. What is to be compiled is
    compiled for the batches of the present epoch, and before the run begins.

    Args:
      make_step: (world, micro-batch, compiler) -> the update.
    Returns:
      the update, and what is worth saying; "" is nothing.
    Raises:
      UserError: it cannot be compiled though run.compile is true.
    """
    step = make_step(world, state.micro_batch, compiler)
    size = plan.image_size_at(state.step // plan.steps_per_epoch)
    if compiler is uncompiled:
        if world.size > 1:
            step.warm_up(gray_batch(2, size, 2, world.device))
        return step, ""
    world.heartbeat("compiling", COMPILE_PATIENCE_S)
    try:
        start_s = time.perf_counter()
        step.warm_up(gray_batch(state.micro_batch, size, config.augment.mix_group, world.device))
        return step, f"compiled in {time.perf_counter() - start_s:.0f} s"
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = f"{config.student.name} or its teacher cannot be compiled ({' '.join(str(error).split())[:300]})"
        if config.run.compile != "auto":
            raise UserError(f"run.compile is true, and {reason}. Use --run.compile false") from error
    # behind the handler: the error's traceback would keep the step and its memory alive, DDP's buckets with it
    del step
    step, _ = warmed_up(make_step, config, plan, state, world, uncompiled)
    return step, f"run.compile auto: not compiled, {reason}"


def describe(run: Run, telemetry: Telemetry) -> None:
    """Say what is about to happen."""
    config, index = run.config, run.plan.index
    teacher = f"from {config.teacher.title}" if config.teacher.title else "without a teacher"
    pipeline = resolve_pipeline(config.data.pipeline, run.world.device)
    telemetry.say(
        f"{config.student.name} {teacher}: {len(index):,} images of {index.num_classes} classes, "
        f"{config.schedule.total_epochs} epochs of {run.plan.steps_per_epoch} steps of {config.run.global_batch} on "
        f"{run.world.size} x {run.world.device.type}, {str(run.precision).removeprefix('torch.')}, {pipeline} pipeline"
    )
    if run.state.step:
        telemetry.say(f"resuming after step {run.state.step}")
    elif source := config.student.checkpoint or (
        f"the weights of {config.student.name}" if config.student.pretrained else None
    ):
        note = run.state.student.start_note
        telemetry.say(f"starting from {source}" + (f": {note}" if note else ""))
    before = last_validation(config.run.out / METRICS) if run.state.step and run.world.is_main else ""
    if before and run.validation and before != run.validation:
        telemetry.say(
            f"the validation images have changed since step {run.state.step}: accuracies before and after it cannot be "
            "compared, and best.pt may be of the images before"
        )
    remaining = initial_fraction(run.total_steps, config.ema)
    if remaining > 0.05:
        telemetry.say(
            f"ema.decay {config.ema.decay} is slow for {run.total_steps} steps: at the end the average still holds "
            f"{remaining:.0%} of the initial weights"
        )
    if run.state.audit:
        telemetry.say(f"{len(run.state.audit)} settings differ from the USI recipe; --audit lists them")
    for note in run.notes:
        telemetry.say(note)


if __name__ == "__main__":
    main()
