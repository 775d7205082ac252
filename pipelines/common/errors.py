"""Errors that a user can fix, printed as one line, and the words that they are made of."""

import contextlib
import errno
import io
import os
import select
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pipelines.common.launcher import launched

_LONGEST_LINE = 600
ROOM = "Make room there, and run the same command again"
# What helps against errors of the operating system.
_ADVICE = {
    errno.ENOENT: "Look whether the path is spelled right",
    errno.EMFILE: "Allow more open files, with 'ulimit -n 4096' before the command",
    errno.EFBIG: "No file may become that large here: raise the limit ('ulimit -f'), or use another file system",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Change its permissions, or name another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ROOM),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "Look at the disk, or at the connection to it"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS), "Name another place"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "Name another place"),
}


class UserError(ValueError):
    """What a user did or has: the message names the file, key or sample, what was found, and what to do next.

    Attributes:
      argument: the name of the argument at fault, with which the message begins; "" where it is none. Who fills the
        argument from a setting puts the setting's name in its place with `naming_settings`.
      help_with: what a command of this program can do about it; `exit_on_user_error` adds the command.
    """

    def __init__(self, message: str, *, argument: str = "", help_with: Literal["", "making", "checking"] = ""):
        super().__init__(message)
        self.argument = argument
        self.help_with: Literal["", "making", "checking"] = help_with

    def in_command(self) -> str:
        """The message as a command prints it, with what another command can do about it."""
        return f"{self}{_COMMANDS[self.help_with]}"


# What commands print after an error with `help_with`. In a notebook there are no commands, so messages do not hold it.
_COMMANDS = {
    "": "",
    "making": ". Make one with 'python tools/shard_imagenet.py build IMAGE_FOLDER OUT', and give OUT",
    "checking": ". 'tools/shard_imagenet.py verify' checks all shards",
}


@contextlib.contextmanager
def naming_settings(**settings: str) -> Iterator[None]:
    """Errors about an argument name the setting that the argument is filled from.

    Args:
      settings: the setting of each argument, as SECTION.NAME.
    """
    try:
        yield
    except UserError as error:
        if error.argument not in settings:
            raise
        raise UserError(settings[error.argument] + str(error).removeprefix(error.argument)) from error


@contextlib.contextmanager
def naming(*where: object) -> Iterator[None]:
    """Errors begin with what is at fault, such as the file and the key."""
    try:
        yield
    except UserError as error:
        raise UserError(": ".join([*map(str, where), error.in_command()])) from error


def named(names: Iterable[object], most: int = 10) -> str:
    """The first `most` names with commas between them, and how many more there are: 'a, b and 3 more'."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def counted(num: float, noun: str) -> str:
    """A number with its noun: '1 step', '1,251 steps', '2.5 epochs'."""
    shown = f"{num:,}" if isinstance(num, int) else f"{num:.4g}"
    return f"{shown} {noun}" if shown == "1" else f"{shown} {noun}s"


def clipped(value: object, most: int = 60) -> str:
    """A value as text of at most `most` characters, for messages that must stay one short line."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason_of(error: BaseException, most: int = 120) -> str:
    """Return an error's message, clipped; without one the line that raised it, outside of torch, or its type."""
    if text := clipped(error, most):
        return text
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "/torch/" not in each.filename]
    for frame in frames[-1:]:
        return clipped(f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}", most)
    return type(error).__name__


def with_escaped_bytes(text: str) -> str:
    r"""Text that any file and picture can hold: bytes of a name that are no UTF-8 become escapes, such as \udcff."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def grouped(reasons: dict[str, list[str]], most: int = 10) -> str:
    """Names by their reason, 'a, b: why; c: why not', for at most three reasons.

    Args:
      most: names that are shown of a single reason; of several, two each.
      reasons: reason -> names; a reason says what is wrong and what helps.
    """
    each = most if len(reasons) == 1 else 2
    shown = [f"{named(map(clipped, names), each)}: {reason}" for reason, names in reasons.items()]
    return "; ".join(shown[:3]) + ("; and more for other reasons" if len(shown) > 3 else "")


def write_error_line(line: str) -> None:
    """Write a line to stderr in one piece. Other ranks write there, too, and print() may write the line's end apart."""
    with contextlib.suppress(OSError, AttributeError):  # Nobody reads it any more, or there is no stderr.
        sys.stderr.write(f"{line}\n")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Every command runs inside. What a user or the machine did wrong ends it with one line on stderr and exit code 1.

    These are UserErrors, and errors of the operating system. Other errors keep their traceback, for they are mistakes
    of this program; with USI_TRACEBACK=1 in the environment all of them do. A reader of the output that has seen
    enough, as `head` has, ends the program without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # Their encoding may lack a character of a name.
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # A full disk or a closed pipe is an error of the command, so it is raised here.
    except (UserError, OSError) as error:
        quiet = isinstance(error, BrokenPipeError) and _stdout_has_no_reader()
        _discard_broken_stdout()
        if os.environ.get("USI_TRACEBACK"):
            raise
        if not quiet:
            this = launched()
            rank = f"[rank {this.rank}] " if this.size > 1 else ""
            message = error.in_command() if isinstance(error, UserError) else system_error_text(error)
            message = " ".join(message.split())
            if len(message) > _LONGEST_LINE:  # The beginning and the advice at the end remain.
                message = f"{message[: _LONGEST_LINE // 2]} [...] {message[-_LONGEST_LINE // 2 :]}"
            write_error_line(f"{rank}error: {message}")
        sys.exit(1)


def system_error_text(error: OSError) -> str:
    """An error of the operating system as one line: the file, what happened, and what helps."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    what = error.strerror or str(error) or type(error).__name__
    advice = advice_against(error, "USI_TRACEBACK=1 in the environment shows where it happened")
    return f"{': '.join([' -> '.join(names), what]) if names else what}. {advice}"


def advice_against(error: Exception, otherwise: str) -> str:
    """Return what helps against an error of the operating system, or `otherwise` if that is not known."""
    return _ADVICE.get(getattr(error, "errno", None) or 0, otherwise)


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _discard_broken_stdout() -> None:
    """Discard output that cannot be written. Python would try to write it once more at its end, and fail again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
