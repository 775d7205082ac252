"""timm 0.5.4's RandAugment operations at given magnitudes and signs."""

from unittest import mock

import numpy as np
from PIL import Image
from timm.data.auto_augment import AugmentOp


def run(given: dict) -> dict:
    """Return rounded and exact, uint8 [ops, magnitudes, signs, images, S, S, 3].

    Args:
      given: names str [ops]; magnitudes float64; signs int64; images uint8 [n, S, S, 3]; fill int64 [3].
    Returns:
      rounded: with arguments that were rounded to float32, exact: with timm's own.
    """
    images = [Image.fromarray(image) for image in given["images"]]
    hparams = {"img_mean": tuple(given["fill"].tolist()), "interpolation": Image.BICUBIC}
    return {
        name: np.stack(
            [
                [
                    [_applied(op, m, sign, hparams, images, rounded) for sign in given["signs"]]
                    for m in given["magnitudes"]
                ]
                for op in given["names"]
            ]
        )
        for name, rounded in (("rounded", True), ("exact", False))
    }


def _applied(name: str, magnitude: float, sign: int, hparams: dict, images: list, rounded: bool) -> np.ndarray:
    op = AugmentOp(str(name), prob=1.0, magnitude=float(magnitude), hparams=hparams)
    level_fn = op.level_fn
    if rounded and level_fn is not None:
        op.level_fn = lambda *of: tuple(float(np.float32(x)) if isinstance(x, float) else x for x in level_fn(*of))
    # timm negates where its draw is above one half
    with mock.patch("timm.data.auto_augment.random.random", lambda: 1.0 if sign < 0 else 0.0):
        return np.stack([np.asarray(op(image)) for image in images])
