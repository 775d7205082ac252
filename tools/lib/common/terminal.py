"""What commands print on a terminal: how wide it is, and errors in one line."""

from rich.console import Console


def console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough for every table where the output is no terminal."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=160)


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of an error that may fill pages, in one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]
