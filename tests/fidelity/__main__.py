"""Started as `python tests/fidelity`: finds the packages from the repository and does what fidelity.command says."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]
import pipelines  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)
from fidelity.command import main  # noqa: E402

main()
