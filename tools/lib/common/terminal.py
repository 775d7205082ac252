"""What commands print on a terminal: how wide it is, progress, and errors in one line."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, track
from rich.progress import Progress as ProgressBar

from tools.lib.common.units import human_bytes, human_seconds

T = TypeVar("T")
_LINE_EVERY_S = 30.0  # Where there is no terminal, a line is printed this often at the most.


def console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough for every table where the output is no terminal."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=160)


def tracked(items: Iterable[T], description: str, total: int | None = None, *, hidden: bool = False) -> Iterator[T]:
    """The same items, with a bar of progress on a terminal."""
    shown = Console(stderr=True)
    is_off = hidden or not shown.is_terminal
    return iter(track(items, description, total, console=shown, transient=True, disable=is_off))


@contextlib.contextmanager
def reporting_progress(first: str) -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is done now: in one place of a terminal, otherwise as a line every 30 seconds."""
    shown, line_s = Console(stderr=True), time.monotonic()

    def report(text: str) -> None:
        nonlocal line_s
        status.update(escape(text))
        if not shown.is_terminal and time.monotonic() - line_s >= _LINE_EVERY_S:
            line_s = time.monotonic()
            shown.print(text, markup=False, highlight=False, soft_wrap=True)

    with shown.status(first) as status:  # It shows nothing where there is no terminal.
        yield report


class Progress:
    """Shows progress: a bar on a terminal, otherwise a line every 30 seconds.

    It counts the steps and bytes of a process, and shows them inside `showing`.

    Attributes:
      num_steps: recorded by this process, those of the block in work included.
      num_bytes: written by this process.
      num_repeated: steps of this process that another one had written first.
      finding: is shown in front of the time left, unless it is "".

    Args:
      total_steps: that this process is to record, about; it may do the work of others, too.
      global_batch: images of a step.
      name: of this process, in front of each line.
    """

    def __init__(self, total_steps: int, global_batch: int, name: str):
        self.num_steps = 0
        self.num_bytes = 0
        self.num_repeated = 0
        self.finding = ""
        self._total_steps = total_steps
        self._global_batch = global_batch
        self._name = name
        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
        self._bar = ProgressBar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(name, total=total_steps, text="")
        self._lock = threading.Lock()  # The writing thread adds bytes.
        self._start_s = self._line_s = time.monotonic()

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Inside, progress is shown, and time counts."""
        self._start_s = self._line_s = time.monotonic()
        with self._bar:
            yield

    def add_step(self) -> None:
        """Count a step."""
        self.num_steps += 1
        self._bar.update(self._task, completed=self.num_steps, text=self._text())
        if self._bar.disable and time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            self.say(self._text())

    def add_bytes(self, num: int) -> None:
        """Count bytes that are on the disk."""
        with self._lock:
            self.num_bytes += num

    def add_repeated(self, num: int) -> None:
        """Count steps that another process had written first."""
        with self._lock:
            self.num_repeated += num

    def say(self, text: str) -> None:
        """Print a line beside the bar."""
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)

    def _text(self) -> str:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        total_steps = max(self._total_steps, self.num_steps)
        left_s = elapsed_s / self.num_steps * (total_steps - self.num_steps)
        return (
            f"{self.num_steps:,} of {total_steps:,} steps, "
            f"{self.num_steps * self._global_batch / elapsed_s:,.0f} images/s, {human_bytes(self.num_bytes)} written, "
            f"{self.finding}{', ' if self.finding else ''}{human_seconds(left_s)} left"
        )


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of an error that may fill pages, in one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]
