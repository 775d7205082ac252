"""Trains several students of one plan in one process: each batch is loaded once, and shown to the teacher once.

python trainer/together.py A.yaml B.yaml C.yaml
torchrun --nproc-per-node 8 trainer/together.py A.yaml B.yaml C.yaml

A file has the settings of one student, as the configuration of a run; what it leaves out has its default. Each
student has its own run.out, and ends as it would alone. The same command resumes, and so does trainer/run.py with the
file of one student.
"""

import os
import signal

# As in trainer/run.py: a signal ends the process without a traceback as long as there is nothing to save.
if __name__ == "__main__":
    for _number, _code in ((signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGTERM, 75)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

import argparse
import contextlib
import gc
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

if not __package__:  # As a script: find the packages in the repository, and not this folder's files.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)

import torch

from pipelines.common.errors import UserError, write_error_line
from trainer.builder import Run, build, facts_to_compare
from trainer.cluster.preemption import INTERRUPTED, REQUEUE, Preemption
from trainer.cluster.watchdog import Watchdog
from trainer.cluster.world import World, join_world
from trainer.config.sections import Config, parse
from trainer.loop import training
from trainer.micro_batch import reporting_out_of_memory
from trainer.models.checks import reporting_one_value_per_channel
from trainer.monitor.monitor import NonFiniteError
from trainer.monitor.run_files import Summary
from trainer.run import reporting_errors
from trainer.sharing import check_configs, check_runs, use_shared_batches


class Student:
    """A run among others, whose training stands between two updates.

    Attributes:
      out: the run's folder.
      run: None as soon as it has ended, so that its memory is free for the others.
      summary: of its session, None before its end.
      failure: why it has failed; "" if it has not.
    """

    def __init__(self, run: Run):
        self.out = run.config.run.out
        self.run: Run | None = run
        self.summary: Summary | None = None
        self.failure = ""
        self.loop = self._training(run)

    def _training(self, run: Run) -> Generator[None, None, None]:
        self.summary = yield from training(run)

    def advance(self, ends_alone: type[UserError] | tuple[()]) -> None:
        """Make an update, after what is due before it. An error of the type `ends_alone` ends this student alone."""
        try:
            with reporting_out_of_memory(), reporting_one_value_per_channel():
                next(self.loop, None)
        except ends_alone as error:
            self.failure = str(error)
            write_error_line(f"error: {self.out}: {self.failure}")
        if self.failure or self.summary is not None:
            self.run = None
            gc.collect()
            torch.cuda.empty_cache()


def train_together(configs: Sequence[Config], world: World) -> list[Student]:
    """Train a student of each configuration, from its newest checkpoint on. Every rank must call it.

    The student that has done the fewest updates makes the next one, so all of them soon are at the same batch.

    Raises:
      UserError: before anything is trained, if a student cannot begin, or if they do not fit together.
    """
    # Other errors than of a loss may come on one rank alone, for which the others would wait.
    ends_alone = NonFiniteError if world.size > 1 else UserError
    preemption = Preemption(world)
    with preemption.catching_signals(), contextlib.ExitStack() as closing:
        runs = build_together(configs, world, preemption)
        closing.callback(use_shared_batches(runs).close)
        students = [Student(run) for run in runs]
        del runs
        for student in students:
            closing.callback(student.loop.close)
            student.advance(())  # It takes its folder.
        while going := [(student.run.state.step, i) for i, student in enumerate(students) if student.run]:
            students[min(going)[1]].advance(ends_alone)
    return students


def build_together(configs: Sequence[Config], world: World, preemption: Preemption) -> list[Run]:
    """A run of each configuration, all with the same teachers; `use_shared_batches` gives them the same batches."""
    check_configs(configs)
    first = build(configs[0], world, preemption)
    runs = [first]
    for config in configs[1:]:
        runs.append(build(config, world, preemption.another(), first))
        check_runs(first, runs[-1])
    if len(runs) > 1:
        for run in runs:
            run.title = str(run.config.run.out)
    return runs


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. The exit code is that of a run, and 1 if a student has failed and no signal came."""
    with reporting_errors():
        configs = [parse(["--config", str(path)]) for path in _parse(arguments).configs]
        check_configs(configs)  # Before the ranks meet.

        def facts(device: torch.device) -> dict:
            of_each = [facts_to_compare(config, device).items() for config in configs]
            return {f"{name} of student {i}": value for i, each in enumerate(of_each, 1) for name, value in each}

        with (
            join_world(configs[0].run.device, facts, configs[0].run.ready_s) as joined,
            Watchdog(joined, configs[0].run.watchdog_s) as world,
        ):
            students = train_together(configs, world)
    signals = {student.summary["session"].get("stopped_by") for student in students if student.summary} - {None}
    if signals:
        sys.exit(INTERRUPTED if signal.SIGINT.name in signals else REQUEUE)
    if any(student.failure for student in students):
        sys.exit(1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer/together.py", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="the settings of a student, as YAML")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
