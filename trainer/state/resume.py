"""Resuming: a run continues from the newest complete checkpoint in its folder, at its start and after a rollback."""

import contextlib
import socket
from pathlib import Path

from pipelines.common.errors import UserError
from trainer.cluster.world import World
from trainer.config.sections import RunConfig
from trainer.models.checkpoint_format import DamagedError
from trainer.state.checkpoint import (
    checkpoints,
    checkpoints_folder,
    load,
    newest_complete,
    path_of,
    read_state,
    step_of,
)
from trainer.state.train_state import TrainState
from trainer.state.writer import CheckpointStore


def resume(config: RunConfig, state: TrainState, total_steps: int, world: World) -> list[str]:
    """Set the state to the newest complete checkpoint in the run folder, if there is one.

    Returns:
      notes for the user: which checkpoints are damaged, and which settings have changed since.
    Raises:
      UserError: another rank has a later one in its folder; more steps are lost than those up to the first checkpoint;
        or as trainer.state.checkpoint.load.
    """
    folder = checkpoints_folder(config.out)
    check_shared_folder(folder, world)
    path, content, damaged = newest_complete(folder) if world.is_main else (None, {}, [])
    path, damaged = world.broadcast_object((path, damaged))
    if path is None:
        found = checkpoints(folder)
        if found and step_of(found[-1]) > config.checkpoint_every:
            raise UserError(
                f"{damaged[0]}; no other checkpoint is intact. Restore one, or start a new run with another --run.out"
            )
        return [f"{line}; it was the first: the run starts from scratch" for line in damaged]
    notes = [f"{line}; resuming from an earlier one, {path.name}" for line in damaged]
    changes = load(path, content or read_state(path), state)
    notes += [f"changed since the checkpoint: {change}" for change in changes]
    if state.step > total_steps:
        raise UserError(
            f"{path}: has done {state.step} steps, this run ends after {total_steps}: raise schedule.epochs, "
            "or start a new run with another --run.out"
        )
    return notes


def check_shared_folder(folder: Path, world: World) -> None:
    """Raise a UserError on every rank if one of them sees a later checkpoint than rank 0.

    Most likely its folder is another one, on a machine that had rank 0 before a restart.
    """
    mine = max(map(step_of, checkpoints(folder)), default=0)
    steps = world.all_gather([(mine, f"rank {world.rank} on {socket.gethostname()}")])
    (latest, where), (step_of_main, main) = max(steps), steps[0]
    if latest > step_of_main:
        raise UserError(
            f"{path_of(folder, latest)}: {where} has it, {main} has not. run.out must be a folder "
            "that all machines share. If it is, start again: its listing was late, or another run is writing there"
        )


def prepare(folder: Path, step: int) -> None:
    """Make the checkpoints' folder ready for a run that resumes after `step`, once no other run is working in it.

    Partial files of processes that were killed are removed. Files of later steps, which were found damaged, are renamed
    to *.damaged.

    Raises:
      UserError: another run has written a complete file of a later step since this one was set to `step`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("step-*.pt.*.partial"), *folder.glob("best.pt.*.partial")):
        stale.unlink()
    for later in checkpoints(folder):
        if step_of(later) > step:
            with contextlib.suppress(DamagedError):
                read_state(later)
                raise UserError(f"{later}: another run has written it meanwhile. Start again, to resume from it")
            later.rename(later.with_suffix(".damaged"))


def roll_back(store: CheckpointStore, state: TrainState, total_steps: int) -> list[str]:
    """Set the state back to the newest checkpoint, within a session. Every rank must call it.

    Returns:
      notes for the user, as `resume`.
    Raises:
      UserError: there is no earlier checkpoint, or as `resume`.
    """
    world, step, micro_batch = store.world, state.step, state.micro_batch
    store.finish()
    notes = resume(store.config, state, total_steps, world)
    if state.step == step:
        raise UserError("there is no checkpoint to go back to. Lower optim.lr or change run.precision, and start again")
    state.micro_batch = micro_batch  # TrainStep was made for this session's micro-batch.
    state.restore_rank_statistics(world.rank, world.size)
    return [*notes, f"going back to step {state.step}"]
