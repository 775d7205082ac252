"""Started by conftest.run_ranks: forks the ranks of one run after the other, with everything imported once.

Of each line {"arguments", "ranks", "log"} on stdin it makes a run of trainer/run.py, whose ranks write into the log,
and answers with a line of their exit codes.
"""

import json
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]

from chaos.runs import start, wait  # noqa: E402

for line in sys.stdin:
    wanted = json.loads(line)
    print(json.dumps(wait(start(wanted["arguments"], Path(wanted["log"]), wanted["ranks"]))), flush=True)
