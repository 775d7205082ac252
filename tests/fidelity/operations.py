"""Each of the 15 RandAugment operations gives timm's pixels, at magnitudes 3, 7 and 10 and both signs.

The arguments are rounded to float32 on both sides, as a plan has them; what the rounding does is a row of its own.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from fidelity.old_timm import theirs
from fidelity.rows import Row, within
from pipelines.ops.pil_ops import apply_op
from tools.lib.common.photos import photographs
from tools.lib.parity.timm_reference import NAMES, planned_argument

SIZE, FILL = 224, (124, 116, 104)
MAGNITUDES, SIGNS = (3.0, 7.0, 10.0), (-1, 1)


def rows() -> Iterator[Row]:
    """Ten photographs of 224 px for each operation, magnitude and sign."""
    images = [image.convert("RGB").resize((SIZE, SIZE)) for _, image, _ in photographs()]
    found = theirs(
        "operations",
        names=np.array(list(NAMES.values())),
        magnitudes=np.array(MAGNITUDES),
        signs=np.array(SIGNS),
        images=np.stack([np.asarray(image) for image in images]),
        fill=np.array(FILL),
    )
    names = "apply_op", "AugmentOp"
    for (op, name), rounded in zip(NAMES.items(), found["rounded"], strict=True):
        ours = [[_applied(images, op, magnitude, sign) for sign in SIGNS] for magnitude in MAGNITUDES]
        yield within(name, names, np.array(ours), rounded)
    yield within(
        "all, their float64 arguments", ("AugmentOp, rounded", "AugmentOp"), found["rounded"], found["exact"], 1
    )


def _applied(images: list[Image.Image], op: int, magnitude: float, sign: int) -> np.ndarray:
    argument = float(planned_argument(op, magnitude, sign))
    return np.stack([np.asarray(apply_op(image, op, argument, FILL)) for image in images])
