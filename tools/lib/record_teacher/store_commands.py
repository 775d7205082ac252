"""The subcommands that look at stores, check them, and make new ones of them. None changes a file that was recorded."""

import argparse

from rich.markup import escape
from rich.table import Table

from pipelines.common.errors import UserError
from tools.lib.common.arguments import path_argument
from tools.lib.common.terminal import console
from tools.lib.record_teacher.merge import merge
from tools.lib.record_teacher.summary import summarize
from tools.lib.record_teacher.transcode import Loss, transcode
from trainer.targets.verify import verify

SUBCOMMANDS = {
    "info": "what a store holds",
    "verify": "find every file that is not as it was recorded",
    "merge": "add the pieces of other stores of the same plan, teacher, codec and precision",
    "transcode": "write a store again in a smaller codec, and say what that loses",
}


def parse_subcommand(arguments: list[str], prog: str) -> argparse.Namespace:
    """The options of a subcommand, which is the first of the arguments; `run` is the function that carries it out."""
    parser = argparse.ArgumentParser(prog=prog, description="Teacher stores.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {"info": _info, "verify": _verify, "merge": _merge, "transcode": _transcode}
    for name, meaning in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        command.add_argument("store", type=path_argument, metavar="STORE", help="folder of the store")
        command.set_defaults(run=runs[name])
    sources = "stores of the same plan, teacher, codec and precision; they stay unchanged"
    commands.choices["merge"].add_argument("sources", type=path_argument, nargs="+", metavar="SOURCE", help=sources)
    transcoding = commands.choices["transcode"]
    transcoding.add_argument("out", type=path_argument, metavar="OUT", help="folder of the new store")
    transcoding.add_argument("--codec", required=True, metavar="NAME", help="fp16, int8, compact, or topK as in top64")
    return parser.parse_args(arguments)


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
    for fault in faults:
        print(fault)
    print(f"{options.store}: pieces added: {added:,}")
    if faults:
        raise UserError(f"damaged pieces that were left out: {len(faults)}. Record the steps named above again")


def _transcode(options: argparse.Namespace) -> None:
    written, loss = transcode(options.store, options.out, options.codec)
    print(f"{options.out}: pieces written as {options.codec}: {written:,}")
    if loss.num:
        print(_lost(loss))


def _lost(loss: Loss) -> str:
    return (
        f"lost, over {loss.num:,} positions: KL {loss.kl:.2g} nats; gradient moved by {loss.uniform:.2%} (uniform "
        f"student) and {loss.noised:.2%} (the teacher with noise); best class the same in {loss.same_top1:.2%}"
    )
