"""Calls of the authors' side, each in a process of its own that has timm 0.5.4 in place of the installed timm."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError
from support.processes import REPOSITORY

VERSION = "0.5.4"
FOLDER = REPOSITORY / ".fidelity"  # where `make fidelity` installs it
AUTHORS = "AUTHORS"  # the variable that names a clone of the authors' repository
_THEIRS = Path(__file__).parent / "theirs"


def check_installed() -> None:
    """Raise a UserError if timm 0.5.4 is not installed, or AUTHORS names something else than their repository."""
    if not (FOLDER / f"timm-{VERSION}.dist-info").is_dir():
        raise UserError(f"{FOLDER}: timm {VERSION} is not there. Install it with make fidelity")
    if (clone := authors()) and not (clone / "train.py").is_file():
        raise UserError(f"{AUTHORS} is {clone}, which has no train.py. Give a clone of Alibaba-MIIL/Solving_ImageNet")


def authors() -> Path | None:
    """The clone of the authors' repository, where one is given."""
    return Path(os.environ[AUTHORS]).resolve() if os.environ.get(AUTHORS) else None


def models_of() -> str:
    """Return whose models the other side builds."""
    return "the authors' models" if authors() else f"timm {VERSION}"


def theirs(oracle: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Call `run` of the module theirs/ORACLE.py.

    Args:
      inputs: its arrays; no objects, since nothing is pickled.
    Returns:
      the arrays it returns, by name.
    Raises:
      UserError: the process failed; the end of what it printed says why.
    """
    with tempfile.TemporaryDirectory(prefix="fidelity-") as folder:
        given, returned = Path(folder, "given.npz"), Path(folder, "returned.npz")
        np.savez(given, **inputs)
        found_first = [str(path) for path in (authors(), FOLDER) if path]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(_THEIRS), oracle, str(given), str(returned)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(found_first)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"timm {VERSION}, {oracle}: {done.stderr.strip()[-2000:]}")
        with np.load(returned, allow_pickle=False) as arrays:
            return dict(arrays)
