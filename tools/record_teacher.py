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
import difflib
import re
import sys
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)

from rich.markup import escape
from rich.table import Table

from pipelines.common.errors import UserError, exit_on_user_error
from tools.lib.common.arguments import path_argument
from tools.lib.common.terminal import console


def main(arguments: list[str] | None = None) -> None:
    """The command line; a recording that a signal has stopped ends the process with its exit code."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with exit_on_user_error():
            code = options.run(options)
    except KeyboardInterrupt:
        print("interrupted. Run the same command again to do the rest", file=sys.stderr)
        code = 130
    if code:
        sys.exit(code)


# A recording imports PyTorch, timm and the trainer, which takes seconds. The subcommands need less, and --help nothing.
def _record(options: argparse.Namespace) -> int:
    from tools.lib.record_teacher.session import record

    return record(options.store, options.settings, codec=options.codec or "", epochs=options.epochs)


def _info(options: argparse.Namespace) -> None:
    from tools.lib.record_teacher.summary import summarize

    table = Table(show_header=False, box=None)
    for label, text in summarize(options.store).items():
        table.add_row(f"[bold]{label}[/bold]", escape(text))
    console().print(table)


def _verify(options: argparse.Namespace) -> None:
    from tools.lib.record_teacher.summary import hole, recorded_steps
    from trainer.targets.store import TeacherStore, verify

    num_faults = 0
    for fault in verify(options.store):
        print(fault)
        num_faults += 1
    if num_faults:
        raise UserError(f"{options.store}: not as it should be; faults named above: {num_faults}. Each says what to do")
    store = TeacherStore(options.store)
    if warning := hole(store):
        print(f"warning: {warning}")
    print(f"{options.store}: no damage found; steps: {recorded_steps(store)}")


def _merge(options: argparse.Namespace) -> None:
    from tools.lib.record_teacher.merge import merge

    added, faults = merge(options.store, options.sources)
    print("\n".join([*faults, f"{options.store}: pieces added: {added:,}"]))
    if faults:
        raise UserError(f"damaged pieces: {len(faults)}. Each line above says what to do")


def _transcode(options: argparse.Namespace) -> None:
    from tools.lib.record_teacher.transcode import transcode

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
    add("--codec", type=_codec, metavar="NAME", help=codec)
    epochs = "record the first N epochs (default: augment.cycle_epochs if it is set, else the whole schedule)"
    add("--epochs", type=_positive, default=0, metavar="N", help=epochs)
    if arguments[:1] and arguments[0].startswith("--") and arguments[0] != "--help":
        parser.error(f"STORE comes first, in front of {arguments[0]}")  # The value of an option would be taken for it.
    parser.set_defaults(run=_record)
    options, options.settings = parser.parse_known_args(arguments)
    _check_spelling(parser, arguments[0], options.settings)
    return options


def _check_spelling(parser: argparse.ArgumentParser, first: str, others: list[str]) -> None:
    """End with a usage error if a subcommand or an option of a recording seems to be misspelled.

    Args:
      first: the word that was taken for STORE.
      others: the words that the parser does not know, which should be settings.
    """
    if others[:1] and not others[0].startswith("-"):
        near = difflib.get_close_matches(first, SUBCOMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the subcommands are {', '.join(SUBCOMMANDS)}"
        parser.error(f"'{first}' would be STORE, and '{others[0]}' follows it; {hint}")
    for name in (word.partition("=")[0] for word in others if word.startswith("--")):
        near = difflib.get_close_matches(name, ("--codec", "--epochs", "--config"), n=1, cutoff=0.8)
        if near and name not in near:
            parser.error(f"unknown option '{name}'; did you mean '{near[0]}'?")


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
    codecs = "fp16, int8, compact, or topK as in top64"
    add["transcode"]("--codec", type=_codec, required=True, metavar="NAME", help=codecs)
    return parser


def _codec(name: str) -> str:
    """Check the name of a codec, before anything is imported that opens one (trainer/targets/codec.py)."""
    if not re.fullmatch(r"int8|compact|fp16|fp32|top[1-9]\d{0,4}", name):
        raise argparse.ArgumentTypeError(f"'{name}' is none of int8, compact, fp16, fp32, topK (as in top64)")
    return name


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10**6:
        raise argparse.ArgumentTypeError(f"{number} is not a number from 1 to a million")
    return number


_positive.__name__ = "positive number"  # argparse shows this name.


if __name__ == "__main__":
    main()
