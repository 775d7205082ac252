"""What limits a run on this machine, what to change, and how long it will take: measured, in a minute or a few.

    python tools/doctor.py RUN-OR-CONFIG [--seconds S] [--no-trials] [--json FILE] [--section.key value ...]

RUN is a run folder: the doctor goes on from its newest checkpoint. Otherwise a YAML file, with overrides as
trainer/run.py takes them; under torchrun for several ranks. It measures how many images a second each stage could
handle on its own and how many the whole does, names what limits, tries other settings where that is, and says how long
the rest of the run takes. It writes nothing into the run folder.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

from rich import box
from rich.console import Console
from rich.table import Table

from pipelines import resolve_pipeline
from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.machine import num_cores
from tools.lib.common.arguments import path_argument
from tools.lib.common.timing import check_positive, check_result_file, console, machine
from tools.lib.doctor import proposals, stages
from tools.lib.doctor.diagnosis import Diagnosis, Remaining, diagnose, remaining, seconds_left
from tools.lib.doctor.proposals import Trial
from tools.lib.doctor.stages import Rate, Turn, WholeRun, feed_of, plans_of_size, rates
from tools.lib.shards.summary import human_seconds
from trainer.cluster.world import World, join_world
from trainer.config.sections import Config, parse
from trainer.feed import open_indices, rank_threads
from trainer.loop import Run
from trainer.micro_batch import reporting_out_of_memory
from trainer.run import build, facts_to_compare

_BAR = 24  # characters
_NEGLIGIBLE = 0.1  # share of the work: on that side little could be gained
_MATTERS = 10  # times the speed of the whole: how even a faster stage is makes no difference
_UNEVEN = 0.8  # of the fastest turn's speed; a stage with a slower one was not measured well


@dataclasses.dataclass(frozen=True)
class Measured:
    """The numbers about a run.

    Attributes:
      size: of the images that the stages were measured with, pixels.
      rates: of the stages by name (tools/lib/doctor/stages.py).
      whole: of the whole at each image size that is to come, images/s.
      input_wait: share of the time in which the whole waited for its next batch.
      evaluation_s: of one evaluation; 0 without a validation set.
      cached: whether all images fit into the memory beside what runs; otherwise the whole was measured from the disk.
    """

    size: int
    rates: dict[str, Rate]
    whole: dict[int, float]
    input_wait: float
    evaluation_s: float
    cached: bool


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options, overrides = _parse(arguments)
    try:
        with exit_on_user_error(), reporting_out_of_memory():
            check_options(options, overrides)
            config = configuration(options.target, overrides)
            agree = functools.partial(facts_to_compare, config)
            with join_world(config.run.device, agree, config.run.ready_s) as world:
                examine(config, world, options.seconds, options.json, trials=options.trials)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        usage="%(prog)s RUN-OR-CONFIG [--seconds S] [--no-trials] [--json FILE] [--section.key value ...]",
        epilog="trainer/run.py --help lists the sections' keys. Start it with torchrun to measure several ranks.",
        allow_abbrev=False,
    )
    parser.add_argument("target", type=path_argument, metavar="RUN-OR-CONFIG", help="run folder, or YAML configuration")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring for each stage (default 5)")
    parser.add_argument("--json", type=path_argument, help="write everything to this file, too")
    parser.add_argument("--no-trials", dest="trials", action="store_false", help="try no other settings")
    return parser.parse_known_args(arguments)


def check_options(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raise a UserError about what could only fail after minutes of measuring."""
    check_positive({"seconds": options.seconds})
    check_result_file(options.json)
    if "--config" in overrides:
        raise UserError("--config: the doctor takes the file, or a run's folder, first and without --config")


def configuration(target: Path, overrides: list[str]) -> Config:
    """The configuration of a run folder, which may have been moved, or of a YAML file; with overrides.

    Of a run, where an earlier session was to stop early does not count.

    Raises:
      UserError: there is no such run or file, or as trainer.config.sections.parse.
    """
    if not target.exists():
        raise UserError(f"{target}: not found. Give a run's folder or a YAML file, such as configs/usi.yaml")
    if not target.is_dir():
        return parse(["--config", str(target), *overrides], prog="tools/doctor.py")
    if not (target / "config.yaml").is_file():
        raise UserError(f"{target}: has no config.yaml, so it is no run's folder. Give one, or a YAML file")
    whole = ["--run.out", str(target), "--run.stop_after_steps", "0"]
    return parse(["--config", str(target / "config.yaml"), *whole, *overrides], prog="tools/doctor.py")


def examine(config: Config, world: World, seconds: float, json_path: Path | None, *, trials: bool = True) -> None:
    """Measure, diagnose, propose, predict and print. Every rank must call it."""
    shown = console() if world.is_main else Console(quiet=True)
    run = build(config, world)
    work = remaining(run)
    if not work.updates:
        more = "schedule.epochs" if run.stop == run.total_steps else "run.stop_after_steps"
        raise UserError(
            f"{config.run.out}: has done all its {run.stop} steps. Raise {more} to go on, or measure it as at its "
            f"start: give {config.run.out}/config.yaml and another --run.out"
        )
    for line in (_title(run), *input_settings(run), *run.notes):
        shown.print(line, markup=False, soft_wrap=True)
    with shown.status(f"measuring each stage for {seconds:g} s"):
        measured = measure(run, work, seconds)
    shared = world.device.type == "cpu"
    diagnosis = diagnose(measured.rates, shared_cores=shared, input_wait=measured.input_wait)
    shown.print(stage_table(measured))
    for line in (diagnosis.text, *spread_lines(measured.rates)):
        shown.print(line, markup=False, soft_wrap=True)
    with shown.status("trying other settings; --no-trials leaves that out"):
        tried = propose(run, measured.size, diagnosis, seconds) if trials else []
    for line in (*proposal_lines(tried), *duration_lines(work, measured, config.run.global_batch, tried)):
        shown.print(line, markup=False, soft_wrap=True)
    if json_path and world.is_main:
        found = _as_json(run, measured, diagnosis, tried, work)
        day = datetime.date.today().isoformat()
        json_path.write_text(json.dumps({"date": day, "seconds": seconds, **found}, indent=1) + "\n")


# --- measuring ---


def measure(run: Run, work: Remaining, seconds: float) -> Measured:
    """All stages at the image size that most of the updates to come have, and the whole at the other ones, too.

    Args:
      seconds: of measuring for each stage.
    """
    size = max(work.updates, key=work.updates.get)
    cached = run.world.broadcast_object(run.config.data.root is None or _dataset_bytes(run) < _available_bytes())
    whole = {each: _whole(run, each, cached) for each in work.updates}
    turns = {**_input_turns(run, size), **_step_turns(run, size), stages.WHOLE: whole[size]}
    turns |= {f"{stages.WHOLE}, {each} px": turn for each, turn in whole.items() if each != size}
    found = rates(turns, run.plan.global_batch, seconds, run.world)
    found.setdefault(stages.STUDENT, found[stages.STEP])  # without a teacher there is nothing else in it
    speeds = {each: found[stages.WHOLE if each == size else f"{stages.WHOLE}, {each} px"] for each in whole}
    return Measured(
        size=size,
        rates=found,
        whole={each: rate.images_per_s for each, rate in speeds.items()},
        input_wait=statistics.median(whole[size].waits[2:]),  # behind the warm-up
        evaluation_s=_evaluation_seconds(run, seconds) if work.evaluations else 0.0,
        cached=cached,
    )


def _whole(run: Run, size: int, cached: bool) -> WholeRun:
    return WholeRun(run, feed_of(run, plans_of_size(run, size, again=cached)), cold=not cached)


def _input_turns(run: Run, size: int) -> dict[str, Turn]:
    if _is_synthetic(run):
        return {}
    feed = feed_of(run, plans_of_size(run, size))
    on_gpu = run.world.device.type == "cuda"
    return {**stages.input_stages(feed), **({stages.TO_DEVICE: stages.to_device(feed)} if on_gpu else {})}


def _step_turns(run: Run, size: int) -> dict[str, Turn]:
    plans = plans_of_size(run, size)
    step = {stages.STEP: stages.step_turn(run, plans)}
    if run.world.size > 1:
        step[stages.ALL_REDUCE] = stages.all_reduce_turn(run)
    if run.config.teacher.name is None:
        return step
    alone = stages.without_teacher(run)
    return {stages.TEACHER: stages.teacher_turn(run, plans), stages.STUDENT: stages.step_turn(alone, plans), **step}


def _is_synthetic(run: Run) -> bool:
    return resolve_pipeline(run.config.data.pipeline, run.world.device) == "synthetic"


def _dataset_bytes(run: Run) -> int:
    return sum(path.stat().st_size for path in run.plan.index.paths)


def _available_bytes() -> int:
    """Memory that the system could use for its cache of files; a container may have less than the machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return available if allowed == "max" else min(available, int(allowed))


def _evaluation_seconds(run: Run, seconds: float) -> float:
    _, val_index = open_indices(run.config.data)
    return stages.evaluation_seconds(run, len(val_index), seconds)


def propose(run: Run, size: int, diagnosis: Diagnosis, seconds: float) -> list[Trial]:
    """Other settings where the limit is, tried; on a CPU also where a good part of the work is."""
    found, feed = [], feed_of(run, plans_of_size(run, size))
    worth_it = diagnosis.input_share > _NEGLIGIBLE
    if worth_it:
        found += proposals.input_candidates(run.config, feed, max(1, num_cores() // run.world.local_size))
    if 1 - diagnosis.input_share > _NEGLIGIBLE:
        found += proposals.step_candidates(run)
    trials = proposals.try_all(run, size, found, seconds)
    if worth_it and (short := proposals.shrinking_helps(run.plan.index, size)):
        trials.append(proposals.try_shrunken(run, size, short, seconds))
    return trials


# --- printing ---


def _title(run: Run) -> str:
    config, world = run.config, run.world
    teacher = f"from {config.teacher.title}" if config.teacher.title else "without a teacher"
    pipeline = resolve_pipeline(config.data.pipeline, world.device)
    return (
        f"{config.student.name} {teacher}: {len(run.plan.index):,} images, {pipeline} pipeline, updates of "
        f"{config.run.global_batch} in micro-batches of {run.state.micro_batch} on {world.size} x {world.device_name}, "
        f"after step {run.state.step} of {run.total_steps}"
    )


def input_settings(run: Run) -> Iterator[str]:
    """What the input is set to, which is what other settings are compared with: after auto has been decided."""
    if _is_synthetic(run):
        return
    data, world = run.config.data, run.world
    values: dict[str, object] = {"threads": rank_threads(data, world), "prefetch": data.prefetch}
    if world.device.type == "cuda" and resolve_pipeline(data.pipeline, world.device) == "dali":
        values |= {"decode": run.pipelines.decode["decode"], "hw_decoder_load": data.hw_decoder_load}
    yield "With " + ", ".join(f"data.{name} {value}" for name, value in values.items())


def stage_table(measured: Measured) -> Table:
    """The stages with bars as long as an image takes in them: the longest is what the others wait for."""
    table = Table(title=f"Images/s at {measured.size} px", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("stage", "images/s", "min", "max", "ms an image", ""):
        table.add_column(name, justify="left" if name in ("stage", "") else "right")
    longest_s = max(1 / rate.images_per_s for rate in measured.rates.values())
    for name in (*stages.ORDER, *(set(measured.rates) - set(stages.ORDER))):
        rate = measured.rates.get(name)
        if rate is None:
            table.add_row(name, "-")
            continue
        seconds = 1 / rate.images_per_s
        numbers = (f"{value:,.0f}" for value in dataclasses.astuple(rate))
        table.add_row(name, *numbers, f"{1000 * seconds:.3f}", "\u2588" * max(1, round(_BAR * seconds / longest_s)))
    return table


def spread_lines(rates: dict[str, Rate]) -> Iterator[str]:
    """A warning, where the turns of a stage that matters are not alike as they should be."""
    matters = _MATTERS * rates[stages.WHOLE].images_per_s
    slow = {name: rate for name, rate in rates.items() if rate.images_per_s < matters}
    if uneven := [name for name, rate in slow.items() if rate.min < _UNEVEN * rate.max]:
        yield (
            f"Not to be relied on: turns of what takes the time differ by more than a quarter ({', '.join(uneven)}). "
            "Measure longer, with a larger --seconds, or on a machine that is not busy with something else"
        )


def faster_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The settings that were faster in every turn, the best first."""
    return sorted((trial for trial in trials if trial.faster), key=lambda trial: -trial.gain)


def proposal_lines(trials: Sequence[Trial]) -> Iterator[str]:
    """What to change: the settings that were faster; and what was tried in vain."""
    faster = faster_trials(trials)
    if faster:
        yield f"Faster, in each of {proposals.REPEATS} turns than in any as it is:"
    for trial in faster:
        speeds = f"{trial.rate.images_per_s:,.0f} images/s, {trial.now.images_per_s:,.0f} as it is in the same turns"
        yield f"  {trial.override}: {trial.gain:+.0%} ({speeds})"
        if "data.pipeline" in trial.override:
            yield "    (its pixels are a little different: docs/parity.md)"
        if "micro_batch" in trial.override:
            yield "    (BatchNorm sees a micro-batch at a time: with it this changes the result a little)"
    vain = ", ".join(f"{trial.override} ({trial.gain:+.0%})" for trial in trials if not trial.faster)
    if vain:
        yield f"{'Not' if faster else 'Nothing is'} faster in its every turn than in any as it is: {vain}"


def duration_lines(work: Remaining, measured: Measured, global_batch: int, trials: Sequence[Trial]) -> Iterator[str]:
    """How long the rest takes, of what that is made, and how long it would with the best of the settings tried."""
    left_s = functools.partial(_left_s, work, measured, global_batch)
    parts = [
        f"{count:,} updates of {global_batch:,} images at {measured.whole[size]:,.0f} images/s ({size} px)"
        for size, count in work.updates.items()
    ]
    if work.evaluations:
        parts.append(f"{work.evaluations:,} evaluations of {human_seconds(measured.evaluation_s)}")
    what = "The rest of the run" if work.to_the_end else "The run up to run.stop_after_steps"
    yield f"{what} takes {human_seconds(left_s())}: {', '.join(parts)}"
    if faster := faster_trials(trials):
        best = faster[0]
        yield f"With {best.override}, if it gains as much throughout: {human_seconds(left_s(best.gain))}"
    cold = measured.rates.get(stages.READING_COLD)
    if not measured.cached:
        yield "The dataset is larger than the memory that is free: the whole was measured with images read from storage"
    elif cold is not None and cold.images_per_s < 1.2 * measured.whole[measured.size]:
        yield f"The first epoch is slower: read for the first time, images come at {cold.images_per_s:,.0f} a second"


def _left_s(work: Remaining, measured: Measured, global_batch: int, gain: float = 0.0) -> float:
    """Duration of the rest, with settings that make the updates faster: a gain of 0.1 by 10 %."""
    speeds = {size: images_per_s * (1 + gain) for size, images_per_s in measured.whole.items()}
    return seconds_left(work, speeds, global_batch, measured.evaluation_s)


def _as_json(run: Run, measured: Measured, diagnosis: Diagnosis, trials: list[Trial], work: Remaining) -> dict:
    return {
        "machine": machine(),
        "run": _title(run),
        "measured": dataclasses.asdict(measured),
        "diagnosis": dataclasses.asdict(diagnosis),
        "warnings": list(spread_lines(measured.rates)),
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "remaining": dataclasses.asdict(work),
        "images_per_s": measured.whole[measured.size],
        "seconds_left": _left_s(work, measured, run.plan.global_batch),
    }


if __name__ == "__main__":
    main()
