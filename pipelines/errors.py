"""Errors that a user can mend, told in one line."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """What a user did or has: the message names the file, key or sample, what was found, and what to do next."""


def named(names: Iterable[object], most: int = 10) -> str:
    """The first `most` names with commas between them, and how many more there are: 'a, b and 3 more'."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def clipped(value: object, most: int = 60) -> str:
    """A value as text of at most `most` characters, for messages that must stay one short line."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def write_error_line(line: str) -> None:
    """Write a line to stderr in one piece: other ranks write there, too, and print() may write the line's end apart."""
    sys.stderr.write(f"{line}\n")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program with a UserError's message on stderr and exit code 1; every other error keeps its traceback.

    With USI_TRACEBACK=1 in the environment a UserError keeps it, too.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("USI_TRACEBACK"):
            raise
        rank = f"[rank {os.environ.get('RANK')}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        write_error_line(f"{rank}error: {' '.join(str(error).split())}")
        sys.exit(1)
