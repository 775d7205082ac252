"""What a study shows while it runs: one live table on a terminal, and a line for each event."""

import time

from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.common.errors import named
from pipelines.common.files import read_json
from tools.lib.common.tables import terminal_table
from tools.lib.common.terminal import console
from tools.lib.common.units import human_seconds
from tools.lib.study.stage import TRAININGS, Stage
from trainer.monitor.run_files import SUMMARY

_STYLES = {"running": "bold", "done": "green", "failed": "red", "left": "yellow"}  # By the first word of a state.


class Screen:
    """Shows the stages of a study: inside `live` as a table, of which a file gets the last state alone."""

    def __init__(self, stages: list[Stage]):
        self.stages = stages
        self._console = console()
        self._began_s: dict[Stage, float] = {}  # Of those that are running.
        self._left_out: set[Stage] = set()
        self.live = Live(console=self._console, get_renderable=self.table, refresh_per_second=2)

    def say(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def leave_out(self, stages: list[Stage]) -> None:
        """These stages miss what they need."""
        self._left_out.update(stages)
        for stage in stages:
            self.say(f"{stage.name}: left out, because there is no result of {stage.missing}")

    def begin(self, job: list[Stage]) -> None:
        """The stages of a job begin."""
        for stage in job:
            self._began_s[stage] = time.monotonic()
            resumes = f", resumes after step {stage.num_steps_saved}" if stage.num_steps_saved else ""
            if stage.kind in TRAININGS and stage.product.exists() and not resumes:
                resumes = ", from its first step, for it has saved no checkpoint"
            self.say(f"{stage.name}: running in {stage.folder}{resumes}")

    def show_progress(self, job: list[Stage], line: str) -> None:
        """Print what a job has printed last, where there is no table."""
        if not self._console.is_terminal:
            self.say(f"{named([stage.name for stage in job], 2)}: {self._cell(job[0])}; {line}")

    def end(self, job: list[Stage]) -> None:
        """A job has ended; its stages say how."""
        for stage in job:
            del self._began_s[stage]
            reason = (
                f", {shortened(stage.failure)}; its folder is {stage.folder}" if stage.failure else accuracy_of(stage)
            )
            self.say(f"{stage.name}: {self._cell(stage)}{reason}")
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
        state = "left out" if stage in self._left_out else stage.state
        if stage in self._began_s:
            state = f"running {human_seconds(time.monotonic() - self._began_s[stage])}"
        return Text(state, _STYLES.get(state.split()[0], "dim"))


def shortened(failure: str) -> str:
    """Why a stage has failed, as a terminal shows it: the beginning, and the end, where the advice is."""
    return failure if len(failure) <= 300 else f"{failure[:180]} ... {failure[-115:]}"


def accuracy_of(stage: Stage) -> str:
    """The accuracies of a training, to end a line with; "" for other stages."""
    summary = read_json(stage.product / SUMMARY) if stage.is_done else {}
    if best := summary.get("best") if stage.kind == "teacher" else None:
        return f", {best['weights']} top-1 {best['top1']:.2f} % in best.pt, which students learn from"
    results = summary.get("evaluation", {}).items()
    return "".join(f", {weights} top-1 {result['top1']:.2f} %" for weights, result in results)
