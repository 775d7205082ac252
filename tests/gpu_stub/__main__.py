"""`python tests/gpu_stub [PYTEST ARGUMENTS]`: all tests on the stand-in, the long ones included."""

import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: find the tests from there
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu_stub.build import build, missing, run_tests

if lacks := missing():
    sys.exit(f"the stand-in for CUDA cannot be built: {lacks} is missing. Install it and start again")
with tempfile.TemporaryDirectory(prefix="gpu-stub-") as folder:
    sys.exit(run_tests(build(Path(folder)), ["-m", "", *sys.argv[1:]]).returncode)
