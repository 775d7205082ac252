"""What a study shows while it runs: one live table on a terminal, and a line for each event."""

import time
from collections.abc import Iterable
from pathlib import Path

from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.common.files import read_json
from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from tools.lib.common.units import human_seconds
from tools.lib.study.stage import LOG, Stage
from trainer.monitor.run_files import SUMMARY

TOGETHER_LOG = "together.txt"  # Among the files of the first of the students that are trained together.
_STYLES = {"running": "bold", "failed": "red", "left out": "yellow", "waiting": "yellow", "to do": "dim"}


class Screen:
    """Shows the stages of a study: inside `live` as a table, of which a file gets the last state alone."""

    def __init__(self, stages: list[Stage]):
        self.stages = stages
        self._console = console()
        self._states: dict[Stage, str] = {}  # What is not on the disk.
        self._began_s: dict[Stage, float] = {}
        self.live = Live(console=self._console, get_renderable=self.table, refresh_per_second=2)

    def say(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def mark(self, stages: Iterable[Stage], state: str, why: str) -> None:
        """Say why stages are in another state than before."""
        for stage in stages:
            if self._states.get(stage) != state:
                self._states[stage] = state
                self.say(f"{stage.name}: {state}{why}")

    def leave_out(self, stages: Iterable[Stage]) -> None:
        """Stages cannot be carried out, because something that they need is not there."""
        for stage in stages:
            missing = ", ".join(need.name for need in stage.needs if not need.is_done)
            self.mark([stage], "left out", f", because there is no result of {missing}")

    def start(self, job: list[Stage]) -> None:
        """A job begins."""
        for stage in job:
            self._began_s[stage] = time.monotonic()
            resumes = f", resumes after step {stage.num_steps_saved}" if stage.num_steps_saved else ""
            self.mark([stage], "running", f" (log: {log_of(job)}){resumes}")

    def show_progress(self, job: list[Stage], line: str) -> None:
        """Print what a job has printed last, where there is no table."""
        if not self._console.is_terminal:
            self.say(f"{', '.join(stage.name for stage in job)}: {self._cell(job[0])}; {line}")

    def end(self, job: list[Stage]) -> None:
        """A job has ended; its stages say how."""
        for stage in job:
            del self._states[stage]
            reason = f", {stage.failure} (log: {stage.folder / LOG})" if stage.failure else accuracy_of(stage)
            self.say(f"{stage.name}: {self._cell(stage) if stage.is_done or stage.failure else 'stopped'}{reason}")
            for line in stage.warnings:
                self.say(f"{stage.name}: warning: {line}")

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
        state = self._states.get(stage, "failed" if stage.failure else "to do")
        if state == "running":
            return Text(f"running {human_seconds(time.monotonic() - self._began_s[stage])}", "bold")
        if stage.is_done:
            return Text(f"done in {human_seconds(stage.seconds)}", "green")
        return Text(state, _STYLES[state])


def log_of(job: list[Stage]) -> Path:
    """Where the output of a job goes."""
    return job[0].folder / (LOG if len(job) == 1 else TOGETHER_LOG)


def accuracy_of(stage: Stage) -> str:
    """The accuracies of a training, to end a line with; "" for other stages."""
    evaluation = read_json(stage.product / SUMMARY).get("evaluation", {}) if stage.is_done else {}
    return "".join(f", {weights} top-1 {result['top1']:.2f} %" for weights, result in evaluation.items())
