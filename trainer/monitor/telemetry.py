"""Writes what happens in a run: metrics.jsonl, a progress line on a terminal, plain lines elsewhere, and to loggers."""

import contextlib
import datetime
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import Progress, TextColumn

from pipelines.common.errors import UserError
from pipelines.common.files import append_synced, naming_file, split_json_lines, write_synced
from trainer.cluster.world import World
from trainer.monitor.run_files import METRICS, UNUSABLE, Evaluation, TrainRecord, is_metrics_line
from trainer.monitor.sinks import Sink

_LASTING = ("session", "rollback")  # Lines of these kinds are the run's history, and are never dropped.


class Screen:
    """A stream for people that may vanish while a run continues: a pager that is closed, a log on a full disk.

    The first error silences it for good. Nothing is lost: metrics.jsonl has every record.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (A process may have no output.)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or nothing after an error."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # The stream's buffer still holds text, which Python would try to write when the process ends.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
        return len(text)


class Telemetry:
    """Writes the records of a run. On ranks other than 0 it writes nothing.

    Args:
      folder: of the run.
      step: the run resumes after this step. Later lines of metrics.jsonl are dropped, because they will be written
        again.
      total_steps, steps_per_epoch: of the whole run.
      sinks: each gets every record that metrics.jsonl gets.
      facts: further keys of the line of the session.
      title: begins every line on the screen, where runs share it; there is no progress line then.
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
        facts: Mapping[str, object] = MappingProxyType({}),
        title: str = "",
    ):
        self._path = folder / METRICS
        self._world = world
        self._step = step
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._sinks = list(sinks)
        self._facts = facts
        self._file: TextIO | None = None  # It is open in a session, on rank 0.
        self._latest = ""  # The latest numbers, for the progress line.
        screen = cast(TextIO, Screen(sys.stdout))  # It has the methods of a stream that rich calls.
        self._title = title and f"{title}: "
        terminal = False if title else None  # None finds out whether it is one.
        self._console = Console(
            file=screen, quiet=not world.is_main, highlight=False, soft_wrap=True, force_terminal=terminal
        )
        # The time left follows from the pace of this session, evaluations and all, without its first log line.
        column = TextColumn("{task.description}")
        self._progress = Progress(column, console=self._console, speed_estimate_period=math.inf)
        self._task = self._progress.add_task("", total=total_steps, completed=step)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """A session: inside the block records are written and, on a terminal, the progress line is shown."""
        with contextlib.ExitStack() as closing:
            if self._world.is_main:
                self._begin(closing)
            yield

    def _begin(self, closing: contextlib.ExitStack) -> None:
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
                **self._facts,
            }
        )
        if self._console.is_terminal:
            closing.enter_context(self._progress)
        self._show()

    def _open_log(self, step: int) -> None:
        """Open the log at its end, without the lines of steps later than `step`, after which the run resumes.

        Lines that are not records go to UNUSABLE: a user may have added them, or a crash or disk error left them.
        """
        lines, others = split_json_lines(self._path, is_metrics_line)
        kept = [line for line in lines if line["step"] <= step or line["kind"] in _LASTING]
        if others:
            append_synced(self._path.with_name(UNUSABLE), others)
            self.say(f"{self._path}: what cannot be used is moved to {UNUSABLE}, lines: {len(others)}")
        with naming_file(self._path):
            write_synced(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(self._path, "a")  # noqa: SIM115 (It stays open as long as the session.)

    def _close_log(self) -> None:
        if self._file is not None:
            with naming_file(self._path):
                self._file.close()

    def advance(self, step: int) -> None:
        """Note that `step` updates have been done in all."""
        self._step = step
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
        self._progress.reset(self._task, completed=step)
        self._show()

    def train(self, record: TrainRecord) -> None:
        """Write a line about the steps since the last one; `kind` and `time` are added."""
        self._write({"kind": "train", **record})
        self._progress.update(self._task, completed=record["step"])
        speed = f"{record['images_per_s']:,.0f} images/s"
        self._latest = f"loss {record['loss']:.4f}  {speed}  {record['input_wait']:.0%} waiting for input  "
        line = self._show()
        if not self._console.is_terminal:
            self.say(line)

    def evaluation(self, step: int, results: Evaluation) -> None:
        """Write a line about an evaluation at the end of an epoch, after `step` updates."""
        epoch = step // self._steps_per_epoch - 1
        self._write({"kind": "eval", "step": step, "epoch": epoch, **results})
        parts = (f"{name}: top-1 {r['top1']:.2f} % top-5 {r['top5']:.2f} %" for name, r in results.items())
        self.say(f"epoch {epoch} done, {next(iter(results.values()))['images']:,} images: {'; '.join(parts)}")

    def say(self, text: str) -> None:
        """Print a line for the user."""
        self._console.print(f"{self._title}{text}", markup=False)

    def _show(self) -> str:
        """Update the progress line, and return its text, with the epoch of the last update."""
        epoch = max(self._step - 1, 0) // self._steps_per_epoch
        seconds = self._progress.tasks[0].time_remaining  # None where it is not known yet
        left = "-:--" if seconds is None else datetime.timedelta(seconds=seconds)
        text = f"epoch {epoch}  step {self._step}/{self._total_steps}  {self._latest}{left} left"
        self._progress.update(self._task, description=text)
        return text

    def _write(self, record: dict) -> None:
        if self._file is None:
            return
        record = {**record, "time": round(time.time(), 3)}
        with naming_file(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for sink in self._sinks:
            try:
                sink(record)
            except UserError:
                raise
            except Exception as error:  # A server that does not answer must not end a training of days.
                self._sinks = [other for other in self._sinks if other is not sink]
                self.say(f"run.loggers: {type(sink).__name__} gets no more numbers ({type(error).__name__}: {error})")
