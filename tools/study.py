"""A study: many students by one recipe, from a folder of images to their speed and accuracy in one report.

    python tools/study.py STUDY.yaml --out DIR [--dry-run] [--jobs N] [--report] [--slurm]

STUDY.yaml names a dataset, a recipe, a teacher and students (configs/study-demo.yaml is one). The study makes shards,
records the teacher once, trains each student from the recording, evaluates and exports it, measures speed and writes
DIR/index.html. Each stage is a command of this project with a folder of its own in DIR. Stop it anywhere: the same
command resumes it. A changed setting does again what depends on it, and nothing else.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import yaml

from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import locked
from tools.lib.common.arguments import path_argument, positive
from tools.lib.common.photos import write_digits
from tools.lib.common.terminal import console
from tools.lib.study.checks import check_study
from tools.lib.study.cluster import submit
from tools.lib.study.dry_run import remarks, show_stages
from tools.lib.study.graph import Graph, read_graph
from tools.lib.study.running import finish, run
from tools.lib.study.screen import Screen
from trainer.cluster.preemption import INTERRUPTED, REQUEUE


def main(arguments: list[str] | None = None) -> None:
    """The command line; exits with 1 if a stage has failed, and as a run if a signal has stopped the study."""
    options, code = _parse(arguments), 0
    with exit_on_user_error():
        try:
            graph = read_graph(options.study, options.out.resolve())
            lock = graph.out / ".lock", f"{graph.out}: another study is running there"
            if lock[0].exists() and not options.dry_run:
                with locked(*lock):
                    pass  # Otherwise this would be known only after the checks.
            if options.report and not any(stage.folder.exists() for stage in graph.stages):
                raise UserError(f"{graph.out}: has nothing of this study. Name its folder, or leave out --report")
            num_bytes = 0
            if not options.report:
                console().print("checking every training before anything runs")
                num_bytes = check_study(graph)
            if options.dry_run:
                show_stages(graph, options.seconds, num_bytes)
            else:
                graph.out.mkdir(parents=True, exist_ok=True)
                with locked(*lock):
                    code = carry_out(graph, options)
        except KeyboardInterrupt:  # The second Ctrl-C, or one before a stage began.
            code = INTERRUPTED
    if code in (INTERRUPTED, REQUEUE):
        print("stopped. Run the same command again to resume", file=sys.stderr)
    if code:
        sys.exit(code)


def carry_out(graph: Graph, options: argparse.Namespace) -> int:
    """Run, submit or report. Returns the exit code."""
    screen, stopped_by = Screen(graph.stages), 0
    if not options.report:
        num_done = sum(stage.is_done for stage in graph.stages)
        for line in [*remarks(graph), *([f"{num_done} of {len(graph.stages)} stages are done"] if num_done else [])]:
            screen.say(line)
        if graph.study.source == "digits":
            make_digits(graph.out / "digits")
        if options.slurm is not None:
            submit(graph, options.slurm, screen)
            return 0
    with screen.live:
        if not options.report:
            stopped_by = run(graph.stages, slots=options.jobs, together=graph.study.together, screen=screen)
        if stopped_by := stopped_by or finish(graph, screen):
            return INTERRUPTED if stopped_by == signal.SIGINT else REQUEUE
    screen.say("")  # Where there is no terminal, the table ends without a line break.
    return 0 if all(stage.is_done for stage in screen.stages) else 1


def make_digits(images: Path) -> None:
    """Write scikit-learn's digits, complete or not at all."""
    if not images.exists():
        partial = images.with_name(f"{images.name}.partial")
        write_digits(partial)
        os.sync()  # Otherwise a power cut might leave empty files under the final name.
        partial.rename(images)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add("study", type=path_argument, metavar="STUDY.yaml", help="what is compared, and how")
    add("--out", type=path_argument, required=True, metavar="DIR", help="folder of the study, new or to be completed")
    what = "print the stages, what is done and what the others would cost; run nothing"
    add("--dry-run", action="store_true", help=what)
    what = "how long --dry-run measures each stage of a training (default %(default)s); 0 measures nothing"
    add("--seconds", type=float, default=1.0, metavar="S", help=what)
    what = "stages at once, each with a GPU of its own or its part of the cores (default %(default)s)"
    add("--jobs", type=positive, default=1, metavar="N", help=what)
    add("--report", action="store_true", help="train nothing: measure speed and write the report of what is there")
    what = "submit to SLURM; parameters of submitit, such as timeout_min=600 gpus_per_node=1 slurm_partition=NAME"
    add("--slurm", nargs="*", type=_parameter, metavar="KEY=VALUE", help=what)
    options = parser.parse_args(arguments)
    options.slurm = None if options.slurm is None else dict(options.slurm)
    return options


def _parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, yaml.safe_load(value)


_parameter.__name__ = "parameter"  # argparse shows this name.


if __name__ == "__main__":
    main()
