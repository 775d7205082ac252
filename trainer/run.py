"""Trains a student: parse, join, build, train, exit code. Start it plainly, or with torchrun for several ranks.

python trainer/run.py --config configs/usi.yaml --data.root OUT --run.out RUN
torchrun --nproc-per-node 8 trainer/run.py --config configs/usi.yaml --data.root OUT --run.out RUN
"""

import os
import signal

# As long as there is nothing to save, while modules load and ranks meet, a signal ends the process without a traceback.
# 130 and 75 are INTERRUPTED and REQUEUE of trainer/cluster/preemption.py, which cannot be imported yet.
if __name__ == "__main__":
    for _number, _code in ((signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGTERM, 75)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # As a script: find the packages in the repository, and not this folder's files.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # Its warnings of a lost rank would bury the line that names it.

from pipelines.common.errors import exit_on_user_error
from trainer.builder import build, facts_to_compare
from trainer.cluster.preemption import INTERRUPTED, REQUEUE, Preemption
from trainer.cluster.watchdog import Watchdog
from trainer.cluster.world import join_world
from trainer.config.recipe import audit_table
from trainer.config.sections import parse
from trainer.loop import train
from trainer.micro_batch import reporting_out_of_memory
from trainer.models.checks import reporting_one_value_per_channel
from trainer.targets.replay import open_stores, provenances, with_recorded_settings


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a run that a signal has stopped ends the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with reporting_errors():
        config = parse(arguments, prog="trainer/run.py")
        if "--audit" in arguments:
            stores = open_stores(config.teacher)
            print(audit_table(with_recorded_settings(config, stores), provenances(stores)))
            return
        agree = functools.partial(facts_to_compare, config)
        with (
            join_world(config.run.device, agree, config.run.ready_s) as joined,
            Watchdog(joined, config.run.watchdog_s) as world,
        ):
            preemption = Preemption(world)
            with preemption.catching_signals():  # A signal during build() stops the run before its first update.
                summary = train(build(config, world, preemption))
    if stopped_by := summary["session"].get("stopped_by"):
        sys.exit(INTERRUPTED if stopped_by == signal.SIGINT.name else REQUEUE)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Inside, an error that the user can fix ends the process with one line, and Ctrl-C with another."""
    try:
        with exit_on_user_error(), reporting_out_of_memory(), reporting_one_value_per_channel():
            yield
    except KeyboardInterrupt:
        message = "interrupted. Run the same command again: it resumes from the newest checkpoint, if there is one"
        print(message, file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
