"""Records what a teacher says of every position of a plan, once, for all students that are trained on the same plan.

    python tools/record_teacher.py STORE --config configs/usi.yaml --data.root OUT --codec int8 --epochs 100
    torchrun --nproc-per-node 8 tools/record_teacher.py STORE --config configs/usi.yaml --data.root OUT
    python tools/record_teacher.py info STORE                            what a store holds
    python tools/record_teacher.py verify STORE                          find every damaged file
    python tools/record_teacher.py merge STORE SOURCE                    add the pieces of other stores of the same kind
    python tools/record_teacher.py transcode STORE OUT --codec compact   write it again in a smaller codec

Start one process, or several with torchrun, srun or a job array of SLURM. Each takes blocks of 64 steps of its own that
STORE does not have yet, and needs none of the others. Stop any of them at any moment: the same command, with any number
of processes, records what is missing.
"""

import os
import signal

# As long as there is nothing to save, while modules load, a signal ends the process without a traceback. 130 and 75 are
# INTERRUPTED and REQUEUE of trainer/cluster/preemption.py, which cannot be imported yet.
if __name__ == "__main__":
    for _number, _code in ((signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGTERM, 75)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)

from pipelines.common.errors import exit_on_user_error
from tools.lib.common.arguments import path_argument
from tools.lib.common.terminal import Progress
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.record_teacher.blocks import record_blocks
from tools.lib.record_teacher.part import Part, part_of_this_process
from tools.lib.record_teacher.recording import Recording, build_recording
from tools.lib.record_teacher.store_commands import SUBCOMMANDS, parse_subcommand
from trainer.cluster.preemption import INTERRUPTED, REQUEUE, Preemption
from trainer.config.sections import parse
from trainer.micro_batch import reporting_out_of_memory
from trainer.targets.header import StoreHeader, claim
from trainer.targets.pieces import Coverage

_AGAIN = "Run the same command again to record the rest, the block in work included"


def main(arguments: list[str] | None = None) -> None:
    """The command line; a recording that a signal has stopped ends the process with its exit code."""
    options, settings = _parse(arguments)
    try:
        with exit_on_user_error(), reporting_out_of_memory():
            stopped_by = _record(options, settings) if options.command == "record" else options.run(options)
    except KeyboardInterrupt:
        print(f"interrupted. {_AGAIN}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if stopped_by:
        sys.exit(INTERRUPTED if stopped_by == signal.SIGINT else REQUEUE)


def _record(options: argparse.Namespace, settings: list[str]) -> int:
    """Record this process's part. Returns the number of the signal that stopped it, 0 for none."""
    config = parse(settings, prog="tools/record_teacher.py")
    part = part_of_this_process()
    world = part.world(config.run.device)
    preemption = Preemption(world)
    with preemption.catching_signals():
        recording = build_recording(
            config,
            options.store,
            codec=options.codec,
            epochs=options.epochs,
            world=world,
        )
        header = claim(options.store, recording.header)
        return _record_part(recording, options.store, header, part, lambda: preemption.agree(False).signal)


def _record_part(recording: Recording, store: Path, header: StoreHeader, part: Part, stopped_by) -> int:
    """Record into an existing store."""
    missing = Coverage(store, header).missing_blocks(0, recording.total_steps, recording.block_steps)
    blocks = part.own(missing, recording.block_steps)
    num_steps = sum(stop - first for first, stop in blocks)
    progress = Progress(num_steps, recording.plan.global_batch, str(part))
    for note in recording.teachers.notes:
        progress.say(note)
    progress.say(f"{num_steps:,} of the {recording.total_steps:,} steps of {store} are to be recorded here")
    start_s = time.monotonic()
    with progress.showing():
        number = record_blocks(recording, store, header, blocks, stopped_by=stopped_by, progress=progress)
    took = f"{human_bytes(progress.num_bytes)} recorded in {human_seconds(time.monotonic() - start_s)}"
    left = sum(stop - first for first, stop in Coverage(store, header).missing_blocks(0, recording.total_steps))
    if number:
        name = signal.Signals(number).name
        progress.say(f"{name}: stopped, {took}; {store} lacks {left:,} steps. {_AGAIN}")
    elif left:
        others = "which other processes may be recording. If they have ended, run the same command again"
        progress.say(f"done, {took}; {store} lacks {left:,} steps, {others}")
    else:
        progress.say(f"done, {took}; {store} has all {recording.total_steps:,} steps")
    return number


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings, which trainer.config.sections.parse reads. Subcommands have none of these."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in SUBCOMMANDS:
        return parse_subcommand(arguments, "record_teacher.py"), []
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0],
        usage="%(prog)s STORE --config FILE [--codec NAME] [--epochs N] [--section.key value ...]",
        epilog="Other uses: "
        + "; ".join(f"'{name} STORE': {meaning}" for name, meaning in SUBCOMMANDS.items())
        + ". Settings are those of the training (trainer/run.py --help lists them), whose plan and teacher are "
        "recorded. Each process takes blocks of 64 steps of its own by torchrun's, srun's or a job array's numbers. It "
        "does not wait for others, nor do their part: where one was lost, start again, with any number of processes, "
        "and what is missing is recorded. teacher.precision auto is fp16 on a GPU and fp32 on a CPU here, "
        "because bf16 moves the outputs of some teachers far more than int8 does. "
        "Set augment.fill if students of different mean colours are to use the store.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "store", type=path_argument, metavar="STORE", help="folder of the store, new or to be completed"
    )
    parser.add_argument(
        "--codec",
        default="int8",
        metavar="NAME",
        help="how a row is stored: int8 (default, one byte a class), compact (less than half of that), fp16 or fp32; "
        "topK, as in top64, only for more than 4,096 classes",
    )
    parser.add_argument(
        "--epochs",
        type=_positive,
        default=0,
        metavar="N",
        help="record the first N epochs (default: augment.cycle_epochs if it is set, else the whole schedule)",
    )
    parser.set_defaults(command="record")
    if arguments[:1] and arguments[0].startswith("--") and arguments[0] != "--help":
        parser.error(f"STORE comes first, in front of {arguments[0]}")  # The value of an option would be taken for it.
    return parser.parse_known_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10**6:
        raise argparse.ArgumentTypeError(f"{number} is not a number from 1 to a million")
    return number


_positive.__name__ = "positive number"  # argparse shows this name.


if __name__ == "__main__":
    main()
