"""Groups mixed by timm 0.5.4's FastCollateMixup with given draws."""

from unittest import mock

import arguments
import numpy as np
from timm.data.mixup import FastCollateMixup


def run(given: dict) -> dict:
    """Return pixels uint8 [groups, B, C, S, S] and targets float32 [groups, B, classes].

    Args:
      given: images uint8 [groups or 1, B, C, S, S]; labels int64 [groups or 1, B]; classes; lam float64 [groups]; box
        int64 [groups, 4], top, left, height, width, empty for mixup.
    """
    num_groups = len(given["lam"])
    images, labels = (np.broadcast_to(given[x], (num_groups, *given[x].shape[1:])) for x in ("images", "labels"))
    groups = [
        mixed(*group, int(given["classes"]))
        for group in zip(images, labels, given["lam"].tolist(), given["box"].tolist(), strict=True)
    ]
    return {
        name: np.stack(column) for name, column in zip(("pixels", "targets"), zip(*groups, strict=True), strict=True)
    }


def mixed(images: np.ndarray, labels: np.ndarray, lam: float, box: list, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Mix one group."""
    top, left, height, width = box
    collate = FastCollateMixup(**arguments.mixing(), num_classes=classes)
    drawn = (top, top + height, left, left + width), lam
    with (
        mock.patch.object(collate, "_params_per_batch", lambda: (lam, height * width > 0)),
        mock.patch("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: drawn),
    ):
        pixels, targets = collate(list(zip(images, labels.tolist(), strict=True)))
    return pixels.numpy(), targets.numpy()
