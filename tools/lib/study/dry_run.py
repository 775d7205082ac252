"""Lists the stages of a study before it runs, with their costs, and names what has changed since its latest start."""

import subprocess
import tempfile
from pathlib import Path

from pipelines.common.errors import named
from pipelines.common.files import read_json
from pipelines.shards.manifest import MANIFEST
from tools.lib.common.terminal import console
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.study.checks import to_be_trained
from tools.lib.study.graph import Graph
from tools.lib.study.running import jobs_of
from tools.lib.study.screen import shortened
from tools.lib.study.stage import STATE, Stage, command_of
from trainer.config.natures import flat
from trainer.config.sections import Config, to_yaml


def show_stages(graph: Graph, seconds: float, num_bytes: int) -> None:
    """Print a line for each stage: how far it is, what it costs, and what it needs that is not there.

    Args:
      num_bytes: that the study still needs on the disk, as far as they are known.
      seconds: how long tools/doctor.py measures each stage of a training; 0 measures nothing.
    """
    graph, screen = graph.with_speed(), console()
    with screen.status("measuring the trainings; --seconds 0 leaves that out"):
        costs, lines = costs_of(graph, seconds), []
    lines += [f"{stage.name}: {stage.state}" for stage in graph.stages if stage.is_done]
    for job in jobs_of(graph.stages, graph.study.together):
        for stage in job:
            parts = [stage.state, shortened(stage.failure), costs.get(stage)]
            parts += [f"needs {stage.missing}"] if stage.missing else []
            parts += [f"together with {named([each.name for each in job if each is not stage], 4)}"] if job[1:] else []
            lines.append(f"{stage.name}: {'; '.join(filter(None, parts))}")
    num_left = sum(not stage.is_done for stage in graph.stages)
    lines += [*remarks(graph), f"to be done: {num_left} of {len(graph.stages)} stages, and the report"]
    lines.append(f"it needs about {human_bytes(num_bytes)} more on the disk")
    if graph.study.speed is not None and "speed" not in graph.common:
        lines.append("speed is measured before the report, as soon as students are exported")
    if not (graph.dataset / MANIFEST).is_file():
        lines.append("costs, and the room for the store, are known as soon as there are shards")
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def remarks(graph: Graph) -> list[str]:
    """Sentences before the study runs: which stages are repeated, and which students learn from the live teacher."""
    live = named(graph.learning_live, 4)
    return redone(graph) + ([f"{live}: from the live teacher, because no recording fits the settings"] if live else [])


def redone(graph: Graph) -> list[str]:
    """A line for each setting that has changed since the latest start of a stage, which is done again for it."""
    notes = sorted(graph.out.glob(f"*/*/{STATE}"), key=lambda path: path.stat().st_mtime_ns)
    before = {noted.get("name"): noted.get("inputs", {}) for noted in map(read_json, notes)}
    defaults, causes, found = flat(Config()), {}, {}
    for stage in graph.stages:
        old, new = before.get(stage.name, stage.inputs), stage.inputs
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        own = [f"{key} {old.get(key, defaults.get(key))} -> {new.get(key, defaults.get(key))}" for key in changed]
        causes[stage] = [*dict.fromkeys([*own, *(cause for need in stage.needs for cause in causes[need])])]
        if stage.name in before and not stage.is_done:
            for cause in causes[stage]:
                found.setdefault(cause, []).append(stage.name)
    num = len(graph.stages)
    return [f"{cause}: does {len(names)} of {num} stages again: {named(names, 4)}" for cause, names in found.items()]


def costs_of(graph: Graph, seconds: float) -> dict[Stage, str]:
    """How long trainings will take, as measured for `seconds`, and other stages have taken with another seed."""
    alike = {stage: (stage.kind, stage.subject.rpartition("-s")[0]) for stage in graph.stages}
    taken = {alike[stage]: human_seconds(stage.seconds) for stage in graph.stages if stage.is_done}
    costs = {s: f"took {taken[key]} with another seed" for s, key in alike.items() if key in taken and not s.is_done}
    if seconds and (graph.dataset / MANIFEST).is_file():
        for trainings in (each for each in to_be_trained(graph).values() if each[0] not in costs):
            costs |= dict.fromkeys(trainings, f"takes {estimate(trainings[0], seconds)}")
    return costs


def estimate(training: Stage, seconds: float) -> str:
    """How long a training would take, by tools/doctor.py.

    It is measured without a teacher, because the store may not be there yet, and reading it costs little.
    """
    assert training.config is not None
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.yaml", Path(folder) / "doctor.json"
        settings.write_text(to_yaml(training.config))
        without_teacher = [f"--teacher.{name}=null" for name in ("name", "store", "checkpoint", "classes")]
        without_teacher += ["--teacher.image_size=0", "--distill.label_weight=1"]
        words = ["--run.out", f"{folder}/run", "--seconds", str(seconds), "--no-trials", "--json", str(result)]
        command = command_of("tools/doctor.py", settings, *without_teacher, *words)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        left = read_json(result).get("seconds_left")
        return human_seconds(left) if isinstance(left, int | float) else "unknown"
