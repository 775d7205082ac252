"""What limits a run on this machine, what to change, and how long it will take: measured, in a minute or a few.

    python tools/doctor.py RUN-OR-CONFIG [--seconds S] [--no-trials] [--json FILE] [--section.key value ...]

RUN is a run folder: the doctor resumes from its newest checkpoint. Otherwise give a YAML file, with overrides as
trainer/run.py takes them; start it with torchrun to measure several ranks. It measures how many images a second each
stage could handle on its own and how many the complete run does, names what limits, tries other settings there, and
predicts how long the rest of the run takes. It writes nothing into the run folder.
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import write_synced
from tools.lib.common.arguments import path_argument
from tools.lib.common.terminal import console
from tools.lib.common.timing import check_positive, check_result_file
from tools.lib.doctor import input_stages, proposals, stages, step_stages
from tools.lib.doctor.diagnosis import Diagnosis, Remaining, diagnose, remaining
from tools.lib.doctor.input_stages import pipeline_of, plans_of_size
from tools.lib.doctor.output import (
    Measured,
    duration_lines,
    input_settings,
    proposal_lines,
    spread_lines,
    stage_table,
    title,
    to_json,
)
from tools.lib.doctor.proposals import Trial
from tools.lib.doctor.stages import Stage, rates
from tools.lib.doctor.step_stages import WholeRun
from trainer.builder import Run, build, facts_to_compare
from trainer.cluster.world import World, join_world
from trainer.config.sections import Config, parse
from trainer.micro_batch import reporting_out_of_memory

_NEGLIGIBLE = 0.1  # Little can be gained on a side that does less than this fraction of the work.


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
        description=str(__doc__).split("\n\n")[0],
        usage="%(prog)s RUN-OR-CONFIG [--seconds S] [--no-trials] [--json FILE] [--section.key value ...]",
        epilog="trainer/run.py --help lists the sections' keys. Start it with torchrun to measure several ranks.",
        allow_abbrev=False,
    )
    parser.add_argument("target", type=path_argument, metavar="RUN-OR-CONFIG", help="run folder, or YAML configuration")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each stage is measured (default 5)")
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

    A run is measured to its end, even if an earlier session was to stop before.

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
            f"{config.run.out}: has done all its {run.stop} steps. Raise {more} to resume it, or measure it from "
            f"its start: give {config.run.out}/config.yaml and another --run.out"
        )
    for line in (title(run), *input_settings(run), *run.notes):
        shown.print(line, markup=False, soft_wrap=True)
    with shown.status(f"measuring each stage for {seconds:g} s"):
        measured = measure(run, work, seconds)
    shared = world.device.type == "cpu"
    diagnosis = diagnose(measured.rates, shared_cores=shared, input_wait=measured.input_wait)

    def write(tried: list[Trial]) -> None:
        """The file comes before the tables, because rich ends the process where nobody reads what it prints."""
        if json_path and world.is_main:
            found = to_json(run, seconds, measured, diagnosis, tried, work)
            write_synced(json_path, (json.dumps(found, indent=1) + "\n").encode())

    write([])
    shown.print(stage_table(measured))
    for line in (diagnosis.text, *spread_lines(measured.rates)):
        shown.print(line, markup=False, soft_wrap=True)
    with shown.status("trying other settings; --no-trials leaves that out"):
        tried = propose(run, measured.size, diagnosis, seconds) if trials else []
    if tried:
        write(tried)
    for line in (*proposal_lines(tried), *duration_lines(work, measured, config.run.global_batch, tried)):
        shown.print(line, markup=False, soft_wrap=True)


# --- measuring ---


def measure(run: Run, work: Remaining, seconds: float) -> Measured:
    """Measure all stages at the image size of most updates to come, and the complete run at the other sizes, too.

    Args:
      seconds: how long each stage is measured.
    """
    size = max(work.updates, key=lambda each: work.updates[each])
    dataset_bytes = 0 if run.config.data.root is None else sum(path.stat().st_size for path in run.plan.index.paths)
    cached = run.world.broadcast_object(dataset_bytes < _available_bytes())
    whole = {each: WholeRun(run, plans_of_size(run, each, again=cached), cold=not cached) for each in work.updates}
    names = {each: stages.WHOLE if each == size else f"{stages.WHOLE}, {each} px" for each in whole}
    measured = _stages(run, size) | {names[each]: stage for each, stage in whole.items()}
    found = rates(measured, run.plan.global_batch, seconds, run.world)
    found.setdefault(stages.STUDENT, found[stages.STEP])  # Without a teacher the step is the student's.
    return Measured(
        size=size,
        rates=found,
        whole={each: found[name].images_per_s for each, name in names.items()},
        input_wait=statistics.median(whole[size].waits[2:]),  # The first two runs warm up.
        evaluation_s=step_stages.evaluation_seconds(run, seconds) if work.evaluations else 0.0,
        cached=cached,
    )


def _stages(run: Run, size: int) -> dict[str, Stage]:
    plans, found = plans_of_size(run, size), {}
    if pipeline_of(run) != "synthetic":
        found |= input_stages.input_stages(run, plans)
        if run.world.device.type == "cuda":
            found[stages.TO_DEVICE] = input_stages.to_device(run, plans)
    if run.replay is not None:
        found[stages.STORE] = step_stages.store_stage(run, plans)
    if any(teacher.store is None for _, teacher in run.config.teacher.members):
        found[stages.TEACHER] = step_stages.teacher_stage(run, plans)
        found[stages.STUDENT] = step_stages.step_stage(step_stages.without_teacher(run), plans)
    found[stages.STEP] = step_stages.step_stage(run, plans)
    if run.world.size > 1:
        found[stages.ALL_REDUCE] = step_stages.all_reduce_stage(run)
    return found


def _available_bytes() -> int:
    """Memory that the system could use as page cache; a container may have less than the machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return available if allowed == "max" else min(available, int(allowed))


def propose(run: Run, size: int, diagnosis: Diagnosis, seconds: float) -> list[Trial]:
    """Try other settings on the side that limits; on a CPU on both sides, if they do a good part of the work."""
    found = []
    if diagnosis.input_fraction > _NEGLIGIBLE:
        found += proposals.input_candidates(run)
    if 1 - diagnosis.input_fraction > _NEGLIGIBLE:
        found += proposals.step_candidates(run)
    return proposals.try_all(run, size, found, seconds)


if __name__ == "__main__":
    main()
