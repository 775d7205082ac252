"""What a study shows while it runs: one live table on a terminal, and a line for each event."""

import time
from collections.abc import Iterable

from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.common.files import read_json
from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from tools.lib.common.units import human_seconds
from tools.lib.study.stage import LOG, Stage
from trainer.monitor.run_files import SUMMARY


class Screen:
    """Shows the stages of a study: inside `live` as a table, of which a file gets the last state alone."""

    def __init__(self, stages: list[Stage]):
        self.stages = stages
        self._console = console()
        self._running: dict[Stage, float] = {}  # stage -> when it began
        self._left_out: set[Stage] = set()
        self._held: set[Stage] = set()
        self.live = Live(console=self._console, get_renderable=self.table, refresh_per_second=2)

    def started(self, job: list[Stage], command: str) -> None:
        """A job has begun."""
        self._running |= dict.fromkeys(job, time.monotonic())
        self.say(f"{', '.join(stage.name for stage in job)}: $ {command}\n  its output: {job[0].folder / LOG}")

    def held(self, stages: Iterable[Stage]) -> bool:
        """Whether there are any of these stages, on which the process of a killed study still works."""
        found = set(stages)
        for stage in found - self._held:
            self.say(f"{stage.name}: waiting until the process of an earlier study has saved and ended")
        self._held |= found
        return bool(found)

    def ended(self, job: list[Stage]) -> None:
        """A job has ended; its stages say how."""
        for stage in job:
            del self._running[stage]
            reason = f", {stage.failure} (log: {stage.folder / LOG})" if stage.failure else accuracy_of(stage)
            self.say(f"{stage.name}: {self._cell(stage) if stage.is_done or stage.failure else 'stopped'}{reason}")

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


def accuracy_of(stage: Stage) -> str:
    """What a training has reached, as the end of a line; "" for other stages."""
    evaluation = read_json(stage.product / SUMMARY).get("evaluation", {}) if stage.is_done else {}
    return "".join(f", {weights} top-1 {result['top1']:.2f} %" for weights, result in evaluation.items())
