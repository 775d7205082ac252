"""The pixels of validation equal those of timm's transform, within the tolerance of docs/parity.md for the resize."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fidelity.old_timm import theirs
from fidelity.rows import Row
from pipelines.plan.plan import EvalPlan
from support.processes import without_workers
from tools.lib.parity.stages import CROP_PCT, INTERPOLATIONS, RESIZE_TORCH, executors, open_photos

SIZES = (224, 299)  # the recipe's, and the size of inception_v3, which the authors' code takes from the model


def rows() -> Iterator[Row]:
    """Ten photographs, both filters."""
    with tempfile.TemporaryDirectory() as folder:
        with without_workers():
            photos = open_photos(Path(folder))
        by_name = {path.stem: str(path) for path in Path(folder, "src").rglob("*.jpg")}
        files = np.array([by_name[name] for name in photos.names])
        for size in SIZES:
            for interpolation in INTERPOLATIONS:
                plan = EvalPlan(photos.index, size, CROP_PCT, interpolation).rows(0, len(photos))
                ours = executors()[0].pixels(photos, plan)
                given = {"files": files, "size": np.array(size), "interpolation": np.array(interpolation)}
                yield _row(f"{size} px, {interpolation}", ours, theirs("evaluation", **given)["pixels"])


def _row(what: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    off = np.abs(ours.astype(np.int16) - theirs)
    largest, mean = int(off.max()), float(off.mean(axis=(1, 2, 3)).max())
    ok = largest <= RESIZE_TORCH.max and mean <= RESIZE_TORCH.mean
    names = "EvalPlan, torchvision", "create_transform"
    return Row(what, *names, off.size, f"{largest}, mean {mean:.2g}", str(RESIZE_TORCH), ok)
