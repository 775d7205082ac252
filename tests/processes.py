"""What the tests and the fault injection need to start processes of their own."""

import contextlib
import socket
import sys
import traceback
from collections.abc import Callable


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def exit_code_of(command: Callable[[], object]) -> int:
    """The exit code of a program that does this; the reason of its end is written to stderr, as python writes it."""
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            _complain(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        _complain(traceback.format_exc())
        return 1
    return 0


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, or its disk full
        print(text, file=sys.stderr)


def flush_streams() -> None:
    """Write what `print` has kept, where that is still possible."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
