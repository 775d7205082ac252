"""Started by tests/trainer/cluster/test_elastic_agents.py: trainer/run.py with updates that take their time.

python tests/support/slow_trainer.py SECONDS NOTES ARGUMENTS...: each update takes SECONDS longer, and what it was given
is noted in NOTES.
"""

import os
import sys
import time
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]

import support.tiny_model  # noqa: E402, F401  (It registers tiny_cnn.)
from support.elastic_runs import noting_batches  # noqa: E402
from trainer.run import main  # noqa: E402
from trainer.update.step import TrainStep  # noqa: E402


def slow_down(seconds: float) -> None:
    """Make every update take this much longer."""
    update = TrainStep.__call__

    def slow(self, batches, number):
        time.sleep(seconds)
        return update(self, batches, number)

    TrainStep.__call__ = slow


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    noting_batches(Path(sys.argv[2]))
    print(f"pid {os.getpid()} of {os.environ['WORLD_SIZE']} ranks", flush=True)
    main(sys.argv[3:])
