"""What a run tells: metrics.jsonl, a progress line on a terminal, plain lines elsewhere."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.files import write_synced

T = TypeVar("T")
_TIME_LEFT = TimeRemainingColumn(compact=True)


class Stopwatch(Iterator[T]):
    """An iterator that adds up the time its user waited for it."""

    def __init__(self, items: Iterator[T]):
        self._items = items
        self.waited_s = 0.0

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.waited_s += time.perf_counter() - start


class Telemetry:
    """Everything that is written down about a run. On ranks other than 0 it writes nothing.

    Args:
      folder: of the run; None on ranks other than 0.
      step: the run goes on from here: later lines of metrics.jsonl are dropped, they will be written again.
      total_steps: of the whole run.
    """

    def __init__(self, folder: Path | None, step: int, total_steps: int):
        self._console = Console(quiet=folder is None, highlight=False, soft_wrap=True)
        columns = BarColumn(bar_width=12), TextColumn("{task.completed}/{task.total} {task.description}"), _TIME_LEFT
        self._progress = Progress(*columns, console=self._console, disable=folder is None)
        self._task = self._progress.add_task("steps", total=total_steps, completed=step)
        self._file = None if folder is None else _open_log(folder / "metrics.jsonl", step)

    @contextlib.contextmanager
    def live(self) -> Iterator["Telemetry"]:
        """Shows the progress line inside the block, where the output is a terminal."""
        show = self._console.is_terminal and self._file is not None
        with self._progress if show else contextlib.nullcontext():
            try:
                yield self
            finally:
                if self._file is not None:
                    self._file.close()

    def advance(self, step: int) -> None:
        """Move the progress line."""
        self._progress.update(self._task, completed=step)

    def train(self, record: dict) -> None:
        """A line about the steps since the last one: step, epoch, loss, lr, images_per_s, input_wait."""
        self._write({"kind": "train", **record})
        self._progress.update(
            self._task,
            description=f"loss {record['loss']:.3f}, {record['images_per_s']:,.0f} images/s, "
            f"{record['input_wait']:.0%} waiting",
        )
        text = (
            f"epoch {record['epoch']} step {record['step']}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['images_per_s']:,.0f} images/s  waiting for input {record['input_wait']:.0%}"
        )
        if not self._console.is_terminal:
            self.say(text)

    def evaluation(self, step: int, epoch: int, results: dict[str, dict[str, float]]) -> None:
        """A line about an evaluation."""
        self._write({"kind": "eval", "step": step, "epoch": epoch, **results})
        parts = (f"{name}: top-1 {r['top1']:.2f} % top-5 {r['top5']:.2f} %" for name, r in results.items())
        self.say(f"epoch {epoch} done, {next(iter(results.values()))['images']:,} images: {'; '.join(parts)}")

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._console.print(text, markup=False)

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: drop what was written about later ones."""
        self._progress.update(self._task, completed=step)
        if self._file is not None:
            self._file.close()
            self._file = _open_log(Path(self._file.name), step)

    def _write(self, record: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def _open_log(path: Path, step: int):
    """The log, open at its end, without what a later step had written before the run was set back to `step`."""
    kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
    write_synced(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return open(path, "a")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut off is left out."""
    *lines, last = [*path.read_text().split("\n")]  # a whole file ends in a newline, so the last part is empty
    with contextlib.suppress(json.JSONDecodeError):
        json.loads(last)
        lines.append(last)
    return [json.loads(line) for line in lines]
