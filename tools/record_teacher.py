"""Records what a teacher says of every position of a plan, once, for all students that are trained on the same plan.

    python tools/record_teacher.py STORE --config configs/usi.yaml --data.root OUT --codec int8 --epochs 100
    torchrun --nproc-per-node 8 tools/record_teacher.py STORE --config configs/usi.yaml --data.root OUT
    python tools/record_teacher.py info STORE                            what a store holds
    python tools/record_teacher.py verify STORE                          find every damaged file
    python tools/record_teacher.py merge STORE SOURCE                    add the pieces of other stores of the same kind
    python tools/record_teacher.py transcode STORE OUT --codec compact   write it again in a smaller codec

Start one process, or several with torchrun, srun or a job array of SLURM. Each records blocks of up to 64 steps that
STORE does not have yet, first its own and then what the others have not reached, and waits for nobody. Stop any of them
at any moment: the same command, with any number of processes, records what is missing.
"""

import os
import signal

# As long as there is nothing to save, while modules load, a signal ends the process without a traceback. 130 and 75 are
# INTERRUPTED and REQUEUE of trainer/cluster/preemption.py, which cannot be imported yet.
if __name__ == "__main__":
    for _number, _code in ((signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGTERM, 75)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

import argparse
import math
import sys
import time
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)

import torch
from rich.markup import escape
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error
from tools.lib.common.arguments import path_argument
from tools.lib.common.terminal import Progress, console
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.record_teacher.blocks import in_own_order, record_blocks, this_process
from tools.lib.record_teacher.merge import merge
from tools.lib.record_teacher.recording import build_recording
from tools.lib.record_teacher.summary import summarize
from tools.lib.record_teacher.transcode import transcode
from trainer.cluster.preemption import INTERRUPTED, REQUEUE, Preemption
from trainer.cluster.world import alone
from trainer.config.sections import parse
from trainer.micro_batch import reporting_out_of_memory
from trainer.targets.header import claim
from trainer.targets.store import Coverage, verify

_AGAIN = "Run the same command again to record the rest, the block in work included"


def main(arguments: list[str] | None = None) -> None:
    """The command line; a recording that a signal has stopped ends the process with its exit code."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with exit_on_user_error(), reporting_out_of_memory():
            stopped_by = options.run(options)
    except KeyboardInterrupt:
        print(f"interrupted. {_AGAIN}" if options.run is _record else "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if stopped_by:
        sys.exit(INTERRUPTED if stopped_by == signal.SIGINT else REQUEUE)


def _record(options: argparse.Namespace) -> int:
    """Record this process's blocks. Returns the number of the signal that stopped it, 0 for none."""
    config, store = parse(options.settings, prog="tools/record_teacher.py"), options.store
    this = this_process()
    num_gpus = torch.cuda.device_count() if config.run.device != "cpu" else 0
    # srun may show a task one GPU alone, and processes may outnumber the GPUs: a recording needs no GPU for each.
    world = alone(config.run.device, this.local_rank % max(num_gpus, 1), this.local_size)
    preemption = Preemption(world)
    with preemption.catching_signals():
        recording = build_recording(config, store, codec=options.codec, epochs=options.epochs, world=world)
        header = claim(store, recording.header)
        recording.pipelines.keep_decode(store)
        missing = Coverage(store, header).missing_blocks(0, recording.total_steps, recording.block_steps)
        blocks = in_own_order(missing, recording.block_steps, this.rank, this.size)
        num_missing = sum(stop - first for first, stop in blocks)
        num_steps, name = math.ceil(num_missing / this.size), f"process {this.rank + 1} of {this.size}"
        progress = Progress(num_steps, recording.plan.global_batch, name)
        for note in recording.teachers.notes:
            progress.say(note)
        now = recording.header.made_with
        if other := [f"{name} {value}, here {now[name]}" for name, value in header.made_otherwise(now).items()]:
            rows = "the rows of this process may differ a little from its first ones"
            progress.say(f"{store} was begun with {'; '.join(other)}: {rows}")
        progress.say(f"{num_missing:,} of the {recording.total_steps:,} steps of {store} are to be recorded")
        start_s = time.monotonic()
        with progress.showing():
            stopped_by = lambda: preemption.agree(False).signal  # noqa: E731
            number = record_blocks(recording, store, header, blocks, stopped_by=stopped_by, progress=progress)
        took = f"{human_bytes(progress.num_bytes)} recorded in {human_seconds(time.monotonic() - start_s)}"
        left = sum(stop - first for first, stop in Coverage(store, header).missing(0, recording.total_steps))
        progress.say(_ending(store, number, took, left, recording.total_steps))
        return number


def _ending(store: Path, number: int, took: str, left: int, total_steps: int) -> str:
    """What the last line of a recording says, which the signal of a number ended, or nothing where it is 0."""
    ended = f"{signal.Signals(number).name}: stopped" if number else "done"
    has = f"lacks {left:,} steps. {_AGAIN}" if left else f"has all {total_steps:,} steps"
    return f"{ended}, {took}; {store} {has}"


def _info(options: argparse.Namespace) -> None:
    table = Table(show_header=False, box=None)
    for label, text in summarize(options.store).items():
        table.add_row(f"[bold]{label}[/bold]", escape(text))
    console().print(table)


def _verify(options: argparse.Namespace) -> None:
    num_faults = 0
    for fault in verify(options.store):
        print(fault)
        num_faults += 1
    if num_faults:
        raise UserError(f"{options.store}: not as it should be; faults named above: {num_faults}. Each says what to do")
    print(f"{options.store}: no damage found")


def _merge(options: argparse.Namespace) -> None:
    added, faults = merge(options.store, options.sources)
    print("\n".join([*faults, f"{options.store}: pieces added: {added:,}"]))
    if faults:
        raise UserError(f"damaged pieces: {len(faults)}. Each line above says what to do")


def _transcode(options: argparse.Namespace) -> None:
    written, lost = transcode(options.store, options.out, options.codec)
    print(f"{options.out}: pieces written as {options.codec}: {written:,}")
    if lost:
        print(lost)


SUBCOMMANDS = {
    "info": (_info, "what a store holds"),
    "verify": (_verify, "find every file that is not as it was recorded"),
    "merge": (_merge, "add the pieces of other stores of the same plan, teacher, codec and precision"),
    "transcode": (_transcode, "write a store again in a smaller codec, and say what that loses"),
}
_EPILOG = (
    "Other uses: "
    + "; ".join(f"'{name} STORE': {meaning}" for name, (_, meaning) in SUBCOMMANDS.items())
    + ". Settings are those of the training (trainer/run.py --help lists them), whose plan and teacher are "
    "recorded. Each process takes blocks of up to 64 steps: first its own, by torchrun's, srun's or a job array's "
    "numbers, then those that the others have not recorded yet. So the rest records what a lost one has left. If all "
    "were lost, start again, with any number of processes, and they share what is missing. "
    "teacher.precision auto is fp16 on a GPU and fp32 on a CPU here, "
    "because bf16 moves the outputs of some teachers far more than int8 does. "
    "Set augment.fill if students of different mean colours are to use the store."
)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options and the function that carries them out, `run`. Without a subcommand they are those of a recording.

    A recording has `settings`, too, which trainer.config.sections.parse reads.
    """
    if arguments[:1] and arguments[0] in SUBCOMMANDS:
        return _subcommands().parse_args(arguments)
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0],
        usage="%(prog)s STORE --config FILE [--codec NAME] [--epochs N] [--section.key value ...]",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("store", type=path_argument, metavar="STORE", help="folder of the store, new or to be completed")
    codec = (
        "how a row is stored: int8 (default of a new store, one byte a class), compact (less than half of that), "
        "fp16 or fp32; topK, as in top64, only for more than 4,096 classes. A store that is there keeps its codec"
    )
    add("--codec", default="", metavar="NAME", help=codec)
    epochs = "record the first N epochs (default: augment.cycle_epochs if it is set, else the whole schedule)"
    add("--epochs", type=_positive, default=0, metavar="N", help=epochs)
    if arguments[:1] and arguments[0].startswith("--") and arguments[0] != "--help":
        parser.error(f"STORE comes first, in front of {arguments[0]}")  # The value of an option would be taken for it.
    parser.set_defaults(run=_record)
    options, options.settings = parser.parse_known_args(arguments)
    return options


def _subcommands() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="record_teacher.py", description="Teacher stores.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    add = {}
    for name, (run, meaning) in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        command.set_defaults(run=run)
        add[name] = command.add_argument
        add[name]("store", type=path_argument, metavar="STORE", help="folder of the store")
    sources = "stores of the same plan, teacher, codec and precision; they stay unchanged"
    add["merge"]("sources", type=path_argument, nargs="+", metavar="SOURCE", help=sources)
    add["transcode"]("out", type=path_argument, metavar="OUT", help="folder of the new store")
    add["transcode"]("--codec", required=True, metavar="NAME", help="fp16, int8, compact, or topK as in top64")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10**6:
        raise argparse.ArgumentTypeError(f"{number} is not a number from 1 to a million")
    return number


_positive.__name__ = "positive number"  # argparse shows this name.


if __name__ == "__main__":
    main()
