"""What a study shows while it runs: one live table on a terminal, a line for each event elsewhere."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.live import Live
from rich.table import Table
from rich.text import Text

from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from tools.lib.common.units import human_seconds
from tools.lib.study.stage import Stage


class Screen:
    """Shows the stages.

    Args:
      stages: all of a study, in their order; `add` takes one more.
    """

    def __init__(self, stages: list[Stage]):
        self._console = console()
        self._stages = list(stages)
        self._running: dict[str, float] = {}  # stage -> when it began
        self._skipped: set[str] = set()
        self._live: Live | None = None
        self._refreshed_s = 0.0

    def add(self, stage: Stage) -> None:
        """Show one more stage."""
        self._stages.append(stage)

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Inside, the table is live where there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self.table, auto_refresh=False) as self._live:
            yield

    def refresh(self) -> None:
        """Show how long the running stages have taken, twice a second."""
        if self._live is not None and time.monotonic() - self._refreshed_s > 0.5:
            self._refreshed_s = time.monotonic()
            self._live.refresh()

    def started(self, job: list[Stage], command: str) -> None:
        """A job has begun."""
        for stage in job:
            self._running[stage.name] = time.monotonic()
        self.say(f"{', '.join(stage.name for stage in job)}: $ {command}")

    def ended(self, job: list[Stage], log: Path) -> None:
        """A job has ended; its stages say how."""
        for stage in job:
            self._running.pop(stage.name, None)
            if stage.is_done:
                self.say(f"{stage.name}: done in {human_seconds(stage.seconds)}")
            elif stage.failure:
                self.say(f"{stage.name}: failed, {stage.failure} (log: {log})", style="red")
            else:
                self.say(f"{stage.name}: stopped")

    def skipped(self, stages: Iterable[Stage]) -> None:
        """Stages cannot be carried out, because something that they need is not there."""
        for stage in stages:
            self._skipped.add(stage.name)
            missing = ", ".join(need.name for need in stage.needs if not need.is_done)
            self.say(f"{stage.name}: left out, because there is no result of {missing}")

    def say(self, text: str, style: str = "") -> None:
        """Print a line, above the table where there is one."""
        self._console.print(Text(text, style), soft_wrap=True)

    def table(self) -> Table:
        """A row for each student and for each stage of the whole study, a column for each kind of stage."""
        kinds = [*dict.fromkeys(stage.kind for stage in self._stages if stage.subject)]
        rows: dict[str, dict[str, Text]] = {}
        for stage in self._stages:
            kind = stage.kind if stage.subject else kinds[0]
            rows.setdefault(stage.subject or stage.kind, {})[kind] = self._cell(stage)
        cells = [[name, *(row.get(kind, Text()) for kind in kinds)] for name, row in rows.items()]
        return terminal_table(["", *kinds], cells, text=range(len(kinds) + 1))

    def _cell(self, stage: Stage) -> Text:
        if (began := self._running.get(stage.name)) is not None:
            return Text(f"running {human_seconds(time.monotonic() - began)}", "bold")
        if stage.is_done:
            return Text(f"done {human_seconds(stage.seconds)}", "green")
        if stage.failure:
            return Text("failed", "red")
        return Text("left out", "yellow") if stage.name in self._skipped else Text("to do", "dim")
