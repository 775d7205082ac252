"""What a run tells: metrics.jsonl, a progress line on a terminal, plain lines elsewhere, and the loggers asked for."""

import contextlib
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipelines.common.errors import UserError
from pipelines.common.files import split_json_lines, write_synced
from trainer.cluster.world import World
from trainer.monitor.run_files import METRICS, UNUSABLE, is_metrics_line, naming
from trainer.monitor.sinks import Sink

_LASTING = ("session", "rollback")  # lines of these kinds tell what happened to the run, and are never dropped
T = TypeVar("T")


class InputWait(Iterator[T]):
    """An iterator that knows for how long the device has had no work for want of its next item.

    On a GPU the host runs ahead of the device, so that its own waiting says little. Two events are put into the
    device's queue, before the host waits and after: where the device still has work it comes to both at once, and where
    it has none it comes to the second one when the item is there. Nobody waits for them.

    Args:
      items: complete when they are given.
      device: on which they are used, in the stream that is current for it.
    """

    def __init__(self, items: Iterator[T], device: torch.device):
        self._items = items
        self._make_mark = (
            functools.partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else _HostMark
        )
        self._waits: list[tuple] = []

    def __next__(self) -> T:
        before, after = self._make_mark(), self._make_mark()
        before.record()
        item = next(self._items)
        after.record()
        self._waits.append((before, after))
        return item

    def take_s(self) -> float:
        """Seconds since it was asked last. On a GPU, to be called when the device has done what was enqueued."""
        waits, self._waits = self._waits, []
        return sum(before.elapsed_time(after) for before, after in waits) / 1e3


class _HostMark:
    """What an event is on a GPU, where host and device are one."""

    def record(self) -> None:
        self._time_s = time.perf_counter()

    def elapsed_time(self, later: "_HostMark") -> float:
        """In ms."""
        return 1e3 * (later._time_s - self._time_s)


class Pace:
    """How long the rest of the run will take at the pace of this session: updates, evaluations and all.

    The first update does not count, it waits for the first images and for kernels to be chosen.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic):
        self._total = total_steps
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """The run goes on from another step."""
        self._first = self._last = None

    def advance(self, step: int) -> None:
        """An update has been done: `step` in all."""
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def left(self) -> str:
        """As 2 d 3 h, 3:04:05 or 4:05; -:-- where it is not known yet."""
        if self._first == self._last:
            return "-:--"
        (first, start_s), (step, now_s) = self._first, self._last
        seconds = round((now_s - start_s) / (step - first) * (self._total - step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        if hours >= 24:
            return f"{hours // 24} d {hours % 24} h"
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


class Screen:
    """A stream for people, which may go away while a run goes on: a pager that is closed, a log on a full disk.

    The first error silences it for good. Nothing is lost: metrics.jsonl has every record.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (a process may be started without any output)
        self.encoding = self._stream.encoding

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            # The stream's buffer still holds text, which Python would try to write when the process ends.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


class Telemetry:
    """Everything that is written down about a run. On ranks other than 0 it writes nothing.

    Args:
      folder: of the run.
      world: the ranks.
      step: the run goes on from here: later lines of metrics.jsonl are dropped, they will be written again.
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
        self._file = None  # open in a session, on rank 0
        self._has_failed = False  # to write to it
        self._pace = Pace(total_steps)
        self._latest = ""  # what the last train line said, for the progress line
        self._console = Console(file=Screen(sys.stdout), quiet=not world.is_main, highlight=False, soft_wrap=True)
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
        """Open the log at its end, without what a later step had written before the run was set back to `step`.

        Lines that are none go to UNUSABLE: they may be somebody's own, or what a crash or an error of the disk left.
        """
        lines, others = split_json_lines(self._path, is_metrics_line)
        kept = [line for line in lines if line["step"] <= step or line["kind"] in _LASTING]
        with naming(self._path):
            if others:
                _append(self._path.with_name(UNUSABLE), others)
                number = f"{len(others)} {'line' if len(others) == 1 else 'lines'}"
                self.say(f"{self._path}: {number} cannot be used, and moved to {UNUSABLE}")
            write_synced(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(self._path, "a")  # noqa: SIM115 (as long as the session)

    def _close_log(self) -> None:
        # A line that could not be written is written once more, and was told then.
        with contextlib.suppress(OSError) if self._has_failed else naming(self._path):
            self._file.close()

    def advance(self, step: int) -> None:
        """An update has been done: `step` in all."""
        self._step = step
        self._pace.advance(step)
        self._show()

    def sync(self) -> None:
        """See that what was written is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def evaluating(self) -> None:
        """An evaluation begins."""
        self._latest = "evaluating  "
        self._show()

    def rewind(self, step: int) -> None:
        """The run goes back to `step` within a session: later lines are dropped, they will be written again."""
        if self._file is not None:
            self._close_log()
            self._open_log(step)
            self._write({"kind": "rollback", "step": step, "from_step": self._step})
        self._step = step
        self._pace.restart()
        self._show()

    def train(self, record: dict) -> None:
        """A line about the steps since the last one: step, epoch, loss, lr, images_per_s, input_wait, and any more."""
        self._write({"kind": "train", **record})
        speed = f"{record['images_per_s']:,.0f} images/s"
        self._latest = f"loss {record['loss']:.3f}  {speed}  {record['input_wait']:.0%} waiting  "
        self._show()
        if not self._console.is_terminal:
            where = f"epoch {record['epoch']} step {record['step']}/{self._total_steps}"
            wait = f"waiting for input {record['input_wait']:.0%}"
            left = f"{self._pace.left()} left"
            self.say(f"{where}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed}  {wait}  {left}")

    def evaluation(self, step: int, epoch: int, results: dict[str, dict[str, float]]) -> None:
        """A line about an evaluation."""
        self._write({"kind": "eval", "step": step, "epoch": epoch, **results})
        parts = (f"{name}: top-1 {r['top1']:.2f} % top-5 {r['top5']:.2f} %" for name, r in results.items())
        self.say(f"epoch {epoch} done, {next(iter(results.values()))['images']:,} images: {'; '.join(parts)}")

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._console.print(text, markup=False)

    def _show(self) -> None:
        """Renew the progress line."""
        epoch = max(self._step - 1, 0) // self._steps_per_epoch  # of the last update
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
            except Exception as error:  # a training of days does not end because somebody's server does not answer
                self._sinks = [other for other in self._sinks if other is not sink]
                self.say(f"run.loggers: {type(sink).__name__} gets no more numbers ({type(error).__name__}: {error})")


def _append(path: Path, lines: list[bytes]) -> None:
    """Add lines to a file; they are on the disk then."""
    with open(path, "ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
