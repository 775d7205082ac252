"""Writes what happens in a run: metrics.jsonl, a progress line on a terminal, plain lines elsewhere, and to loggers."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipelines.common.errors import UserError
from pipelines.common.files import split_json_lines, write_synced
from trainer.cluster.world import World
from trainer.monitor.clock import Pace
from trainer.monitor.run_files import METRICS, UNUSABLE, Evaluation, TrainRecord, is_metrics_line, naming
from trainer.monitor.sinks import Sink

_LASTING = ("session", "rollback")  # Lines of these kinds are the run's history, and are never dropped.


class Screen:
    """A stream for people that may vanish while a run continues: a pager that is closed, a log on a full disk.

    The first error silences it for good. Nothing is lost: metrics.jsonl has every record.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (A process may have no output.)
        self.encoding = self._stream.encoding

    def write(self, text: str) -> int:
        """Write text, or nothing after an error."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or do nothing after an error."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """True on a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self._stream.fileno()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            # The stream's buffer still holds text, which Python would try to write when the process ends.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


class Telemetry:
    """Writes the records of a run. On ranks other than 0 it writes nothing.

    Args:
      folder: of the run.
      world: the ranks.
      step: the run resumes after this step. Later lines of metrics.jsonl are dropped, because they will be written
        again.
      total_steps, steps_per_epoch: of the whole run.
      sinks: each gets every record that metrics.jsonl gets.
      validation: digest of the validation images, "" without any.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        sinks: Sequence[Sink] = (),
        validation: str = "",
    ):
        self._path = folder / METRICS
        self._world = world
        self._step = step
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._sinks = list(sinks)
        self._validation = {"validation": validation} if validation else {}
        self._file: TextIO | None = None  # It is open in a session, on rank 0.
        self._has_failed = False  # True after a line could not be written to it.
        self._pace = Pace(total_steps)
        self._latest = ""  # The latest numbers, for the progress line.
        screen = cast(TextIO, Screen(sys.stdout))  # It has the methods of a stream that rich calls.
        self._console = Console(file=screen, quiet=not world.is_main, highlight=False, soft_wrap=True)
        bar = [BarColumn(bar_width=12)] if self._console.width >= 100 else []
        self._progress = Progress(*bar, TextColumn("{task.description}"), console=self._console)
        self._task = self._progress.add_task("", total=total_steps, completed=step)

    @contextlib.contextmanager
    def live(self) -> Iterator["Telemetry"]:
        """A session: inside the block records are written and, on a terminal, the progress line is shown."""
        if not self._world.is_main:
            yield self
            return
        with contextlib.ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)
            self._open_log(self._step)
            closing.callback(self._close_log)
            self._write(
                {
                    "kind": "session",
                    "step": self._step,
                    "total_steps": self._total_steps,
                    "steps_per_epoch": self._steps_per_epoch,
                    "ranks": self._world.size,
                    "host": socket.gethostname(),
                    "device": self._world.device_name,
                    **self._validation,
                }
            )
            if self._console.is_terminal:
                closing.enter_context(self._progress)
            self._show()
            yield self

    def _open_log(self, step: int) -> None:
        """Open the log at its end, without the lines of steps later than `step`, after which the run resumes.

        Lines that are not records go to UNUSABLE: a user may have added them, or a crash or disk error left them.
        """
        lines, others = split_json_lines(self._path, is_metrics_line)
        kept = [line for line in lines if line["step"] <= step or line["kind"] in _LASTING]
        with naming(self._path):
            if others:
                _append(self._path.with_name(UNUSABLE), others)
                number = f"{len(others)} {'line' if len(others) == 1 else 'lines'}"
                self.say(f"{self._path}: {number} cannot be used, and moved to {UNUSABLE}")
            write_synced(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(self._path, "a")  # noqa: SIM115 (It stays open as long as the session.)

    def _close_log(self) -> None:
        if self._file is None:
            return
        # Closing writes a line that could not be written once more; its error has been raised before.
        with contextlib.suppress(OSError) if self._has_failed else naming(self._path):
            self._file.close()

    def advance(self, step: int) -> None:
        """Note that `step` updates have been done in all."""
        self._step = step
        self._pace.advance(step)
        self._show()

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def evaluating(self) -> None:
        """Show that an evaluation has begun."""
        self._latest = "evaluating  "
        self._show()

    def rewind(self, step: int) -> None:
        """Go back to `step` within a session. Later lines are dropped, because they will be written again."""
        if self._file is not None:
            self._close_log()
            self._open_log(step)
            self._write({"kind": "rollback", "step": step, "from_step": self._step})
        self._step = step
        self._pace.restart()
        self._show()

    def train(self, record: TrainRecord) -> None:
        """Write a line about the steps since the last one; `kind` and `time` are added."""
        self._write({"kind": "train", **record})
        speed = f"{record['images_per_s']:,.0f} images/s"
        self._latest = f"loss {record['loss']:.3f}  {speed}  {record['input_wait']:.0%} waiting  "
        self._show()
        if not self._console.is_terminal:
            where = f"epoch {record['epoch']} step {record['step']}/{self._total_steps}"
            wait = f"waiting for input {record['input_wait']:.0%}"
            left = f"{self._pace.left()} left"
            self.say(f"{where}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed}  {wait}  {left}")

    def evaluation(self, step: int, epoch: int, results: Evaluation) -> None:
        """Write a line about an evaluation."""
        self._write({"kind": "eval", "step": step, "epoch": epoch, **results})
        parts = (f"{name}: top-1 {r['top1']:.2f} % top-5 {r['top5']:.2f} %" for name, r in results.items())
        self.say(f"epoch {epoch} done, {next(iter(results.values()))['images']:,} images: {'; '.join(parts)}")

    def say(self, text: str) -> None:
        """Print a line for the user."""
        self._console.print(text, markup=False)

    def _show(self) -> None:
        """Update the progress line, with the epoch of the last update."""
        epoch = max(self._step - 1, 0) // self._steps_per_epoch
        text = f"epoch {epoch}  {self._step}/{self._total_steps}  {self._latest}{self._pace.left()} left"
        self._progress.update(self._task, completed=self._step, description=text)

    def _write(self, record: dict) -> None:
        if self._file is None:
            return
        record = {**record, "time": round(time.time(), 3)}
        self._has_failed = True
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._has_failed = False
        for sink in self._sinks:
            try:
                sink(record)
            except UserError:
                raise
            except Exception as error:  # A server that does not answer must not end a training of days.
                self._sinks = [other for other in self._sinks if other is not sink]
                self.say(f"run.loggers: {type(sink).__name__} gets no more numbers ({type(error).__name__}: {error})")


def _append(path: Path, lines: list[bytes]) -> None:
    """Add lines to a file, and wait until they are on the disk."""
    with open(path, "ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
