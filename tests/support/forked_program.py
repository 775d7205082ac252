"""The program that `forked_python.executable` gives: it hands itself over to a fork, and stands for it until it ends.

python -IS tests/support/forked_program.py SOCKET ARGUMENTS. It imports little, for it is started hundreds of times.
"""

import contextlib
import json
import os
import signal
import socket
import sys

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def main(address: str, arguments: list[str]) -> None:
    """Let a fork do what python would do with the arguments, and end as it ends."""
    received, fork = [], [0]

    def forward(number: int, _frame) -> None:
        received.append(number)
        if fork[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(fork[0], received.pop())

    for number in _FORWARDED:
        signal.signal(number, forward)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        wanted = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}) + "\n"
        network = os.open("/proc/self/ns/net", os.O_RDONLY)
        socket.send_fds(connection, [b" "], [0, 1, 2, network])
        connection.sendall(wanted.encode())
        with connection.makefile("r") as answers:
            fork[0] = int(answers.readline())
            while received:
                forward(received.pop(), None)
            code = int(answers.readline())
    if code < 0:
        if -code in _FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
