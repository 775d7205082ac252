"""`python tests/golden`: measures the golden files again, except the checkpoint, and writes them."""

import json
import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]
import pipelines  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests; before torch is imported
from golden import measure  # noqa: E402

found = {"where": measure.where(), "sha256": measure.bits()}
(measure.FOLDER / "bits.json").write_text(json.dumps(found, indent=1) + "\n")
(measure.FOLDER / "settings.yaml").write_text(measure.settings())
(measure.FOLDER / "options.json").write_text(json.dumps(measure.options(), indent=1) + "\n")
