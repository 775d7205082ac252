"""What commands print on a terminal: how wide it is, progress, and errors in one line."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough for every table where the output is no terminal."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=160)


def tracked(items: Iterable[T], description: str, total: int | None = None, *, hidden: bool = False) -> Iterator[T]:
    """The same items, with a bar of progress on a terminal."""
    shown = Console(stderr=True)
    is_off = hidden or not shown.is_terminal
    return iter(track(items, description, total, console=shown, transient=True, disable=is_off))


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of an error that may fill pages, in one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]
