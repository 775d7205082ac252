"""Measures the golden files again, except the checkpoint, and writes them.

`python tests/golden` replaces all of them. `python tests/golden --add` adds the bits of another processor or other
software, while those of the machines before stay; do that at a commit that holds on one of these.
"""

import json
import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]
import pipelines  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests; before torch is imported
from golden import measure  # noqa: E402

here, is_added = measure.where(), sys.argv[1:] == ["--add"]
others = [found for found in measure.recorded() if found["where"] != here] if is_added else []
found = [*others, {"where": here, "sha256": {"resumed": measure.resumed_weights(), **measure.bits()}}]
(measure.FOLDER / "bits.json").write_text(json.dumps(found, indent=1) + "\n")
if not is_added:
    (measure.FOLDER / "settings.yaml").write_text(measure.settings())
    (measure.FOLDER / "options.json").write_text(json.dumps(measure.options(), indent=1) + "\n")
