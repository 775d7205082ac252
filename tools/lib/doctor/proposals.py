"""Other settings for a run that tools/doctor.py tries: which, and how fast the whole is with each."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator

from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores
from tools.lib.doctor.input_stages import pipeline_of, plans_of_size
from tools.lib.doctor.stages import NOTHING, Rate, Stage, rates
from tools.lib.doctor.step_stages import WholeRun
from trainer.builder import Run, build
from trainer.cluster.memory import is_out_of_memory
from trainer.config.sections import Config
from trainer.feed import open_pipelines, rank_threads

REPEATS = 5  # A gain must show in every one of these timed runs.
_UNCHANGED = "unchanged"
_LOADS = (0.0, 0.5, 0.65, 0.9, 1.0)
Changes = dict[str, object]  # "section.key" -> value


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
      override: as on the command line.
      rate: the speed of the run with them; now: its speed unchanged, measured in turn with the other.
      gain: how much faster it is by the medians: 0.1 is 10 %.
      faster: whether every timed run with the settings was faster than every one without.
    """

    override: str
    rate: Rate
    now: Rate
    gain: float
    faster: bool


def input_candidates(run: Run) -> list[Changes]:
    """Other settings of the pipeline."""
    data, name = run.config.data, pipeline_of(run)
    cores = max(1, num_cores() // run.world.local_size)
    others = {max(1, cores // 2), cores, 2 * cores} - {rank_threads(data, run.world)}
    found: list[Changes] = [{"data.threads": threads} for threads in sorted(others)]
    found.append({"data.prefetch": 2 * data.prefetch})
    found.append({"data.pipeline": "torchvision" if name == "dali" else "dali"})
    if run.world.device.type == "cuda" and name == "dali":
        found.append({"data.decode": "full" if run.pipelines.decode["decode"] == "roi" else "roi"})
        for load in sorted({*_LOADS} - {data.hw_decoder_load}):
            found.append({"data.hw_decoder_load": load})
    return found


def step_candidates(run: Run) -> list[Changes]:
    """Other settings of the step."""
    now, alone = run.state.micro_batch, run.world.size == 1
    sizes = [now // 4 * 2, 2 * now] if alone else [now // 4 * 2]  # Without memory a rank would leave others waiting.
    divides = run.plan.division(run.world.size, now).all_sizes
    found: list[Changes] = [
        {"run.micro_batch": size}
        for size in sizes
        if size and run.plan.division(run.world.size, size).all_sizes != divides
    ]
    if run.world.device.type == "cuda":
        found.append({"run.compile": run.config.run.compile is False})
    return found


def with_changes(config: Config, changes: Changes) -> Config:
    """The configuration with other values."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def override(changes: Changes) -> str:
    """As on the command line."""
    return " ".join(f"--{key} {json.dumps(value).strip(chr(34))}" for key, value in changes.items())


def try_all(run: Run, size: int, candidates: list[Changes], seconds: float) -> list[Trial]:
    """Try each of the settings in turn with the unchanged run.

    Settings that are refused, or for which this machine lacks memory or DALI, are left out. Other errors are not about
    the setting, and may be one rank's alone, which must not leave the others waiting.

    Args:
      size: of the images, pixels.
      seconds: how long the timed runs of each take together.
    """
    measured = {_UNCHANGED: _whole_stage(run, size)}
    for changes in candidates:
        with _left_out_for_want_of_memory():
            try:
                other = changed(run, changes)
            except UserError:
                continue
            whole = _whole_stage(other, size)
            whole(1)
            measured[override(changes)] = whole
    found = rates(measured, run.plan.global_batch, seconds, run.world, REPEATS)
    now = found.pop(_UNCHANGED)
    return [trial(name, rate, now) for name, rate in found.items()]


def changed(run: Run, changes: Changes) -> Run:
    """The run with other settings; it has new weights where they concern the step."""
    config = with_changes(run.config, changes)
    if "data.decode" not in changes and "data.pipeline" not in changes:  # Otherwise the decoder is probed for each.
        config = with_changes(config, {"data.decode": run.pipelines.decode["decode"]})
    if any(key.startswith("run.") for key in changes):
        elsewhere = {"run.out": config.run.out / NOTHING, "run.micro_batch": run.state.micro_batch}
        return build(with_changes(with_changes(config, elsewhere), changes), run.world)
    return dataclasses.replace(
        run, config=config, pipelines=open_pipelines(config, {"train": run.plan.index}, run.world)
    )


def trial(name: str, rate: Rate, now: Rate) -> Trial:
    """Compare a measurement with that of the unchanged run."""
    return Trial(name, rate, now, rate.images_per_s / now.images_per_s - 1, rate.min > now.max)


def _whole_stage(run: Run, size: int) -> Stage:
    whole = WholeRun(run, plans_of_size(run, size))

    def stage(count: int) -> float:
        try:
            return whole(count)
        finally:
            run.pipelines.of["train"].forget()  # A GPU's memory need not hold the graphs of all at once.

    return stage


@contextlib.contextmanager
def _left_out_for_want_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
