"""Started as `python tests/chaos`: finds the packages from the repository and does what chaos.command says."""

import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]
import pipelines  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

os.environ["OMP_NUM_THREADS"] = (
    "1"  # This must precede the import of torch: a process without threads of its own can be forked.
)
from chaos.command import main  # noqa: E402

main()
