"""What --dry-run prints: each stage, whether it is done or why it is done again, what it would cost, its command."""

import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipelines.common.files import read_json
from pipelines.shards.manifest import MANIFEST
from tools.lib.common.tables import terminal_table
from tools.lib.common.units import human_seconds
from tools.lib.study.graph import Graph, StudentStages
from tools.lib.study.running import REPOSITORY, command_of, jobs_of, shown
from tools.lib.study.stage import Stage


def plan_table(stages: list[Stage], estimates: dict[str, str]) -> Table:
    """The stages as a table; `estimates` is what a stage would cost, by its name."""
    costs = ["" if stage.is_done else estimates.get(stage.name, "unknown") for stage in stages]
    cells = [[stage.name, Text(state_of(stage)), cost] for stage, cost in zip(stages, costs, strict=True)]
    return terminal_table(["stage", "state", "cost"], cells, text=(0, 1, 2))


def command_lines(stages: list[Stage], together: int) -> list[str]:
    """The commands that are to be run, in their order."""
    return [shown(command_of(job)) for job in jobs_of(stages, together)]


def state_of(stage: Stage) -> str:
    """Whether a stage is done, and what its next start is for."""
    if stage.is_done:
        return f"done in {human_seconds(stage.seconds)}"
    if reason := stage.reason_to_redo():
        return f"again: {reason}"
    if stage.failure:
        return f"again, after it failed: {stage.failure}"
    return "to be resumed" if stage.folder.exists() else "to do"


def estimates_of(graph: Graph, seconds: float) -> dict[str, str]:
    """How long trainings would take, by their names: tools/doctor.py measures each distinct student.

    A student is measured without a teacher, because the store may not be there yet, and reading it costs little.
    """
    found, known = {}, {}
    if (graph.dataset / MANIFEST).is_file():
        for each in graph.students:
            if not each.train.is_done:
                key = f"{each.student.name} {each.student.kwargs} {each.student.overrides}"
                known[key] = known.get(key) or _estimate(each, seconds)
                found[each.train.name] = known[key]
    return found


def _estimate(each: StudentStages, seconds: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.yaml", Path(folder) / "doctor.json"
        settings.write_text(each.train.settings)
        without_teacher = [f"--teacher.{name}=null" for name in ("name", "store", "checkpoint")]
        words = ["--run.out", f"{folder}/run", "--seconds", str(seconds), "--no-trials", "--json", str(result)]
        command = [sys.executable, "tools/doctor.py", str(settings), *without_teacher, *words]
        subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        left = read_json(result).get("seconds_left")
        return human_seconds(left) if isinstance(left, int | float) else "unknown"
