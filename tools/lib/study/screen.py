"""What a study shows while it runs: one live table on a terminal, and a line for each event."""

import time
from collections.abc import Iterable

from rich.live import Live
from rich.table import Table
from rich.text import Text

from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from tools.lib.common.units import human_seconds
from tools.lib.study.stage import LOG, Stage


class Screen:
    """Shows the stages of a study: inside `live` as a table, of which a file gets the last state alone."""

    def __init__(self, stages: list[Stage]):
        self.stages = stages
        self._console = console()
        self._running: dict[Stage, float] = {}  # stage -> when it began
        self._left_out: set[Stage] = set()
        self.live = Live(console=self._console, get_renderable=self.table, refresh_per_second=2)

    def started(self, job: list[Stage], command: str) -> None:
        """A job has begun."""
        self._running |= dict.fromkeys(job, time.monotonic())
        self.say(f"{', '.join(stage.name for stage in job)}: $ {command}")

    def ended(self, job: list[Stage]) -> None:
        """A job has ended; its stages say how."""
        for stage in job:
            del self._running[stage]
            reason = f", {stage.failure} (log: {stage.folder / LOG})" if stage.failure else ""
            self.say(f"{stage.name}: {self._cell(stage) if stage.is_done or reason else 'stopped'}{reason}")

    def left_out(self, stages: Iterable[Stage]) -> None:
        """Stages cannot be carried out, because something that they need is not there."""
        for stage in stages:
            self._left_out.add(stage)
            missing = ", ".join(need.name for need in stage.needs if not need.is_done)
            self.say(f"{stage.name}: left out, because there is no result of {missing}")

    def say(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def table(self) -> Table:
        """A row for each student and for each stage of the whole study, a column for each kind of stage."""
        kinds = [*dict.fromkeys(stage.kind for stage in self.stages if stage.subject)] or [""]
        rows: dict[str, dict[str, Text]] = {}
        for stage in self.stages:
            kind = stage.kind if stage.subject else kinds[0]
            rows.setdefault(stage.subject or stage.kind, {})[kind] = self._cell(stage)
        cells = [[name, *(row.get(kind, Text()) for kind in kinds)] for name, row in rows.items()]
        return terminal_table(["", *kinds], cells, text=range(len(kinds) + 1))

    def _cell(self, stage: Stage) -> Text:
        if (began := self._running.get(stage)) is not None:
            return Text(f"running {human_seconds(time.monotonic() - began)}", "bold")
        if stage.is_done:
            return Text(f"done in {human_seconds(stage.seconds)}", "green")
        if stage.failure:
            return Text("failed", "red")
        return Text("left out", "yellow") if stage in self._left_out else Text("to do", "dim")
