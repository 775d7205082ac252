"""Checkpoints are written in the background, while the training continues."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipelines.common.errors import ROOM, UserError, advice_against
from trainer.cluster.world import World
from trainer.config.sections import RunConfig
from trainer.models.checkpoint_format import first_not_finite
from trainer.state import checkpoint
from trainer.state.train_state import TrainState

DISK_PATIENCE_S = 3600  # The watchdog waits this long: a slow disk is no hang.
_MOST_PENDING = 2  # At most this many files are held in memory; a slower disk makes the training wait.


class Writer:
    """Writes files one after the other, in a thread of its own.

    Attributes:
      failure: why a file could not be written, "" if all were. Nothing is written after a failure.
    """

    def __init__(self):
        self.failure = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def submit(self, path: Path, content: dict, then: Callable[[], None] = lambda: None) -> None:
        """Write `content` with its digest to `path`, all of it or nothing, and call `then`.

        The caller must not use `content` from now on.
        """
        self.wait(_MOST_PENDING - 1)
        self._pending.append(self._thread.submit(self._write, path, content, then))

    def wait(self, num_left: int = 0) -> None:
        """Wait until all files but the `num_left` last are on the disk, or have failed."""
        while len(self._pending) > num_left:
            self._pending.pop(0).result()

    def _write(self, path: Path, content: dict, then: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            if name := first_not_finite(content):
                raise UserError(f"{name} is not finite. Lower optim.lr or change run.precision")
            checkpoint.write(path, content)
            then()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError.
            reason, helps = " ".join(str(error).split())[:200], advice_against(error, ROOM)
            self.failure = f"{path}: cannot be written ({reason}). {helps}; older checkpoints are kept"
        except UserError as error:
            self.failure = f"{path}: not written: {error}"


@dataclasses.dataclass
class CheckpointStore:
    """The checkpoints of a run in its folder: the newest ones, every n-th of all, and the best weights.

    Attributes:
      config: the run's; checkpoints lie in its `out`.
      world: the ranks. Every rank must call each method.
      writer: writes on rank 0.
    """

    config: RunConfig
    world: World
    writer: Writer = dataclasses.field(default_factory=Writer)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return checkpoint.checkpoints_folder(self.config.out)

    def save(self, state: TrainState) -> None:
        """Copy the state to the host; it is written while the training continues."""
        self.world.heartbeat(f"checkpoint of step {state.step}", DISK_PATIENCE_S)
        if state.ranks_differ:
            state.rank_statistics = self.world.all_gather([checkpoint.to_host(state.local_statistics())])
        else:
            state.rank_statistics = []
        if self.world.is_main:
            self.writer.submit(checkpoint.path_of(self.folder, state.step), checkpoint.content_of(state), self._prune)

    def save_best(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Copy the weights that `state.best` names to the host; they are written while the training continues."""
        if self.world.is_main:
            self.writer.submit(self.folder / checkpoint.BEST, checkpoint.best_content_of(state, metrics))

    def finish(self) -> None:
        """Wait for the last file, and raise a UserError on all ranks if one could not be written."""
        self.world.heartbeat("writing the last checkpoint", DISK_PATIENCE_S)
        self.writer.wait()
        self.check()

    def check(self) -> None:
        """Raise a UserError on all ranks if a file could not be written."""
        if failure := self.world.broadcast_object(self.writer.failure):
            raise UserError(failure)

    def _prune(self) -> None:
        """Delete all but the newest checkpoints and every n-th of all."""
        every = self.config.keep_every * self.config.checkpoint_every
        for old in checkpoint.checkpoints(self.folder)[: -self.config.keep_checkpoints]:
            if not every or checkpoint.step_of(old) % every:
                old.unlink()
