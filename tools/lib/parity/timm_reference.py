"""The installed timm's own transforms, which draw from the plan's random numbers instead of Python's.

Nothing of timm is rewritten: its modules get another `random` while an image is transformed. So everything is compared,
from uniform numbers to pixels: which crop, which operations, which arguments, and how they are carried out. A plan
stores the arguments of operations in float32, timm computes them in float64. They are rounded here.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.mixup import FastCollateMixup

from pipelines.ops.pil_ops import resized_crop
from pipelines.plan import draws as augment
from pipelines.plan import rng
from pipelines.plan.draws import AugmentConfig, Op
from pipelines.plan.plan import TrainPlan
from pipelines.plan.rng import Stream

RANDAUGMENT = "rand-m7-mstd0.5-inc1"
# Our operation -> timm's name of it.
NAMES = {
    Op.AUTO_CONTRAST: "AutoContrast",
    Op.EQUALIZE: "Equalize",
    Op.INVERT: "Invert",
    Op.ROTATE: "Rotate",
    Op.POSTERIZE: "PosterizeIncreasing",
    Op.SOLARIZE: "SolarizeIncreasing",
    Op.SOLARIZE_ADD: "SolarizeAdd",
    Op.COLOR: "ColorIncreasing",
    Op.CONTRAST: "ContrastIncreasing",
    Op.BRIGHTNESS: "BrightnessIncreasing",
    Op.SHARPNESS: "SharpnessIncreasing",
    Op.SHEAR_X: "ShearX",
    Op.SHEAR_Y: "ShearY",
    Op.TRANSLATE_X: "TranslateXRel",
    Op.TRANSLATE_Y: "TranslateYRel",
}


# timm annotates the union of all that it may return, and floats and ints more narrowly than it takes them.
timm_transform: Any = create_transform
_AugmentOp: Any = AugmentOp


class TimmTraining:
    """timm's training transform, for the positions of a plan. The plan's RandAugment is the recipe's, or none.

    Args:
      our_resize: timm's own resize is replaced by the CPU pipeline's, so that everything else can be held to equality.
    """

    def __init__(self, plan: TrainPlan, *, our_resize: bool = False):
        self._plan = plan
        self._our_resize = our_resize
        self._transform = timm_transform(
            plan.image_size,
            is_training=True,
            auto_augment=RANDAUGMENT if plan.augment.randaugment_ops else None,
            color_jitter=None,
            hflip=1.0,  # The step must be there; each image sets its probability below.
            interpolation=plan.augment.interpolation,
            normalize=False,
        )
        if plan.augment.randaugment_ops:
            for timms in self._transform.transforms[2].ops:
                timms.level_fn = _in_float32(timms.level_fn)

    def __call__(self, image: Image.Image, position: int) -> np.ndarray:
        """The decoded image of a position, transformed: uint8 [S, S, 3]."""
        seed, config = self._plan.seed, self._plan.augment
        (crop,) = rng.uniforms(seed, Stream.CROP, position, position + 1, augment.CROP_DRAWS)
        draws = augment.randaugment_draws(config)
        (operations,) = rng.uniforms(seed, Stream.RANDAUGMENT, position, position + 1, draws)
        self._transform.transforms[1].p = float(augment.flips(crop[None], config)[0])
        resize = mock.patch("timm.data.transforms.F.resized_crop", self._resized_crop)
        with _PlannedRandom(crop, operations).installed(), resize if self._our_resize else contextlib.nullcontext():
            pixels = self._transform(image)
        return pixels.permute(1, 2, 0).numpy()

    def _resized_crop(self, image: Image.Image, top: int, left: int, height: int, width: int, size, _) -> Image.Image:
        box = top, left, height, width
        return Image.fromarray(resized_crop(np.asarray(image), box, size, self._plan.augment.interpolation))


class _PlannedRandom:
    """Stands in for Python's `random` and numpy's `choice` in timm while one image is transformed.

    The layout of the uniforms is that of `augment.resized_crops` and `augment.randaugment`.
    """

    def __init__(self, crop: Sequence[float], operations: Sequence[float]):
        self._tries = iter(crop[: 2 * augment.CROP_TRIES])
        self._corner = iter(crop[2 * augment.CROP_TRIES :])
        self._uniforms: Iterator[float] = iter(())  # The next draws of an operation: its gate, and its sign.
        self._normal = 0.0  # The draw for its magnitude.
        # [operations, 5]: which, gate, two for the normal magnitude, sign
        self._operations = np.reshape(operations[: len(operations) // 5 * 5], (-1, 5))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with (
            mock.patch("timm.data.transforms.random", self),
            mock.patch("timm.data.auto_augment.random", self),
            mock.patch("timm.data.auto_augment.np.random.choice", self.choice),
        ):
            yield

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._tries)

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self._corner) * (high - low + 1))

    def choice(self, operations: Sequence[AugmentOp], count: int, **_) -> list:
        return [self._drawn(operations, *self._operations[i]) for i in range(count)]

    def _drawn(self, operations: Sequence[AugmentOp], which: float, gate: float, one: float, two: float, sign: float):
        def apply(image: Image.Image) -> Image.Image:
            # timm negates where its draw is large, the plan where it is small.
            self._uniforms = iter([gate, 1.0 - sign])
            self._normal = math.sqrt(-2.0 * math.log1p(-one)) * math.cos(2.0 * math.pi * two)
            return operations[int(which * len(operations))](image)

        return apply

    def random(self) -> float:
        return next(self._uniforms)

    def gauss(self, mean: float, std: float) -> float:
        return mean + std * self._normal


def _in_float32(level_fn: Callable | None) -> Callable | None:
    """Timm's function from a level to arguments, its floats rounded as the plan stores them."""
    if level_fn is None:
        return None

    def rounded(level: float, hparams: dict) -> tuple:
        return tuple(float(np.float32(arg)) if isinstance(arg, float) else arg for arg in level_fn(level, hparams))

    return rounded


def operation(op: Op, magnitude: float, sign: int, fill: tuple[int, int, int]):
    """One of timm's operations at a magnitude from 0 to 10 and with a sign, as a function of a PIL image."""
    hparams = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    timms = _AugmentOp(NAMES[op], prob=1.0, magnitude=magnitude, hparams=hparams)
    timms.level_fn = _in_float32(timms.level_fn)

    def apply(image: Image.Image) -> Image.Image:
        with mock.patch("timm.data.auto_augment.random.random", lambda: 1.0 if sign < 0 else 0.0):
            return timms(image)

    return apply


def planned_argument(op: Op, magnitude: float, sign: int) -> np.float32:
    """The plan's argument for an operation at the same magnitude and sign."""
    config = AugmentConfig(
        randaugment_ops=1, randaugment_prob=1.0, randaugment_magnitude=magnitude, randaugment_std=0.0
    )
    draws = np.zeros((1, augment.randaugment_draws(config)))
    draws[0, 0] = (op - 0.5) / augment.NUM_OPS
    draws[0, 4] = 0.25 if sign < 0 else 0.75
    ops, args = augment.randaugment(draws, config)
    assert ops[0, 0] == op
    return args[0, 0]


def mixed(images: np.ndarray, lam: float, box: Sequence[int]) -> np.ndarray:
    """One group mixed by timm's FastCollateMixup with this lambda and box (top, left, height, width; empty: mixup).

    Args:
      images: uint8 [B, S, S, 3].
    Returns:
      uint8 [B, S, S, 3].
    """
    top, left, height, width = box
    collate = FastCollateMixup(num_classes=2)
    drawn = ((top, top + height, left, left + width), lam)
    with (
        mock.patch.object(collate, "_params_per_batch", lambda: (lam, height * width > 0)),
        mock.patch("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: drawn),
    ):
        pixels, _ = collate([(image.transpose(2, 0, 1), 0) for image in images])
    return pixels.permute(0, 2, 3, 1).numpy()
