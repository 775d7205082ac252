"""Maps uniform draws to crops, flips, operations, erased boxes and mixes. Vectorised NumPy, no state.

Every function maps a row of uniforms to physical values (pixels, degrees, factors), so that all executors carry out the
same numbers. The distributions are those of timm's PIL transforms, which the recipe was published with.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.settings import Section, setting
from pipelines.plan import rng
from pipelines.plan.rng import Stream

CROP_TRIES = 10
CROP_DRAWS = 24  # uniforms a position: (area, aspect) for each try, top, left, flip, one spare
ERASE_TRIES = 10
ERASE_DRAWS = 24  # uniforms a position: whether, (area, aspect) for each try, top, left, one spare
MIX_DRAWS = 8  # uniforms a group: whether, which, lambda, centre row, centre column, three spare
_OP_DRAWS = 5  # uniforms an operation: which, gate, two for the normal magnitude, sign
MAX_MAGNITUDE = 10.0


@dataclasses.dataclass(frozen=True)
class AugmentConfig(Section):
    """What happens to a training image between decoding and the model. The defaults are the USI recipe.

    Attributes:
      repeats: repeated augmentation; an epoch covers 1/repeats of the images, each `repeats` times.
      crop_area: range of the crop's area as a fraction of the image's.
      crop_aspect: range of the crop's width / height, drawn log-uniformly.
      interpolation: filter of the resize after the crop: bicubic or bilinear, always antialiased.
      flip: probability of a horizontal flip.
      randaugment_ops: RandAugment operations an image, drawn with replacement; 0 switches it off.
      randaugment_prob: probability that a drawn operation is applied.
      randaugment_magnitude: mean magnitude, 0 to 10.
      randaugment_std: standard deviation of the magnitude.
      three_augment: one of grayscale, solarize and Gaussian blur for every image, after RandAugment (DeiT III).
      color_jitter: brightness, contrast and saturation change by factors of up to 1 +- this much, after the others.
      erase_prob: probability of random erasing: a box of 2 % to a third of the image becomes the fill colour.
      mixup_alpha: Beta parameter of mixup's lambda; 0 switches mixup off.
      cutmix_alpha: Beta parameter of CutMix's lambda; 0 switches CutMix off.
      mix_prob: probability that a group is mixed at all.
      cutmix_prob: probability of CutMix where both are on.
      mix_group: positions that share one mixing draw; also one batch of BatchNorm, unless micro-batches are larger.
      fill: red, green and blue, 0 to 255, of pixels that geometric operations and erasing leave empty; null is the
        student's mean colour. Students of different mean colours see the same pixels only if it is set.
      cycle_epochs: repeat the views of the first n epochs throughout the run, images and their order included; 0 never
        does. In a published comparison 50 stored views an image were as good as 400 where a run used each three times;
        no comparison of six uses or more is known for ImageNet.
    """

    key, on_resume = "augment", "refused"
    repeats: int = setting(3, at_least=1)
    crop_area: tuple[float, float] = setting((0.08, 1.0), above=0, at_most=1)
    crop_aspect: tuple[float, float] = setting((3 / 4, 4 / 3), above=0)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = setting(0.5, at_least=0, at_most=1)
    randaugment_ops: int = setting(2, at_least=0, at_most=100)
    randaugment_prob: float = setting(0.5, at_least=0, at_most=1)
    randaugment_magnitude: float = setting(7.0, at_least=0, at_most=MAX_MAGNITUDE)
    randaugment_std: float = setting(0.5, at_least=0)
    three_augment: bool = setting(False, in_old_plans=False)
    color_jitter: float = setting(0.0, at_least=0, in_old_plans=0.0)
    erase_prob: float = setting(0.0, at_least=0, at_most=1, in_old_plans=0.0)
    mixup_alpha: float = setting(0.8, at_least=0, at_most=1000)
    cutmix_alpha: float = setting(1.0, at_least=0, at_most=1000)
    mix_prob: float = setting(1.0, at_least=0, at_most=1)
    cutmix_prob: float = setting(0.5, at_least=0, at_most=1)
    mix_group: int = setting(128, at_least=1)
    fill: tuple[int, int, int] | None = setting(None, at_least=0, at_most=255, plan_field="fill")
    cycle_epochs: int = setting(0, at_least=0, in_old_plans=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"augment.{name} is ({low}, {high}); it must be a range of positive numbers")


def resized_crops(u: np.ndarray, heights: np.ndarray, widths: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Random resized crops: up to ten tries at a random area and aspect, then the largest centred one allowed.

    Args:
      u: uniforms [n, >= 22].
      heights, widths: of the source images, pixels [n].
    Returns:
      int32 [n, 4]: top, left, height, width in source pixels, inside the image, at least 1 x 1.
    Source: timm.data.transforms.RandomResizedCropAndInterpolation.get_params, with as many draws for every image.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    tries = u[:, : 2 * CROP_TRIES].reshape(-1, CROP_TRIES, 2)
    low, high = config.crop_area
    area = (low + (high - low) * tries[..., 0]) * (heights * widths)[:, None]
    low, high = np.log(config.crop_aspect)
    aspect = np.exp(low + (high - low) * tries[..., 1])
    # The shape is [n, tries]. Like Python's round, rint rounds half to even.
    width = np.maximum(np.rint(np.sqrt(area * aspect)), 1).astype(np.int64)
    height = np.maximum(np.rint(np.sqrt(area / aspect)), 1).astype(np.int64)
    fits = (width <= widths[:, None]) & (height <= heights[:, None])
    first = fits.argmax(axis=1)
    row = np.arange(len(u))
    found = fits[row, first]
    fallback_height, fallback_width = _largest_centred(heights, widths, config.crop_aspect)
    height = np.where(found, height[row, first], fallback_height)
    width = np.where(found, width[row, first], fallback_width)
    u_top, u_left = u[:, 2 * CROP_TRIES], u[:, 2 * CROP_TRIES + 1]
    top = np.where(found, (u_top * (heights - height + 1)).astype(np.int64), (heights - height) // 2)
    left = np.where(found, (u_left * (widths - width + 1)).astype(np.int64), (widths - width) // 2)
    return np.stack([top, left, height, width], axis=1).astype(np.int32)


def _largest_centred(
    heights: np.ndarray, widths: np.ndarray, aspect: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest crop of each image whose aspect is allowed: int64 [n] each."""
    ratio = widths / heights
    height = np.where(ratio < aspect[0], np.rint(widths / aspect[0]), heights)
    width = np.where(ratio > aspect[1], np.rint(heights * aspect[1]), widths)
    return np.maximum(height, 1).astype(np.int64), np.maximum(width, 1).astype(np.int64)


def flips(u: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Horizontal flips: bool [n], from the same rows of uniforms as `resized_crops`."""
    return u[:, 2 * CROP_TRIES + 2] < config.flip


class Op(enum.IntEnum):
    """An operation on a cropped image: timm's increasing RandAugment and more; NONE where the gate left it out."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    ROTATE = 4  # argument: degrees, counter-clockwise
    POSTERIZE = 5  # argument: bits to keep
    SOLARIZE = 6  # argument: values from here on are inverted
    SOLARIZE_ADD = 7  # argument: added to values below 128
    COLOR = 8  # argument, here and in the next three: factor, 1 is the unchanged image
    CONTRAST = 9
    BRIGHTNESS = 10
    SHARPNESS = 11
    SHEAR_X = 12  # argument: source x grows by this much a row
    SHEAR_Y = 13
    TRANSLATE_X = 14  # argument: fraction of the width
    TRANSLATE_Y = 15
    GAUSSIAN_BLUR = 16  # argument: radius, the standard deviation in pixels; not one of RandAugment's


NUM_OPS = 15  # RandAugment's: AUTO_CONTRAST to TRANSLATE_Y
_Argument = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _enhance(m: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1.0 + sign * (m / 10.0) * 0.9)


def _signed(full_scale: float) -> _Argument:
    return lambda m, sign: sign * (m / 10.0) * full_scale


# These functions give an operation's argument, where it has one, at magnitude m (0 to 10) and sign (+1 or -1).
# Source: LEVEL_TO_ARG in timm.data.auto_augment.
_ARGUMENTS: dict[Op, _Argument] = {
    Op.ROTATE: _signed(30.0),
    Op.POSTERIZE: lambda m, sign: 4 - np.trunc((m / 10.0) * 4),
    Op.SOLARIZE: lambda m, sign: 256 - np.minimum(256, np.trunc((m / 10.0) * 256)),
    Op.SOLARIZE_ADD: lambda m, sign: np.minimum(128, np.trunc((m / 10.0) * 110)),
    Op.COLOR: _enhance,
    Op.CONTRAST: _enhance,
    Op.BRIGHTNESS: _enhance,
    Op.SHARPNESS: _enhance,
    Op.SHEAR_X: _signed(0.3),
    Op.SHEAR_Y: _signed(0.3),
    Op.TRANSLATE_X: _signed(0.45),
    Op.TRANSLATE_Y: _signed(0.45),
}


def randaugment_draws(config: AugmentConfig) -> int:
    """Uniforms a position that `randaugment` takes, a multiple of 4."""
    return max(4, -(-config.randaugment_ops * _OP_DRAWS // 4) * 4)


def randaugment(u: np.ndarray, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draw the operations of each image, and their arguments.

    Args:
      u: uniforms [n, randaugment_draws(config)].
    Returns:
      ops: uint8 [n, randaugment_ops], values of `Op`, applied from left to right.
      args: float32 [n, randaugment_ops], the argument of each as `Op` describes it.
    Source: timm.data.auto_augment, 'rand-m7-mstd0.5-inc1' and its like.
    """
    # The shape is [n, ops, 5].
    draws = u[:, : config.randaugment_ops * _OP_DRAWS].reshape(len(u), config.randaugment_ops, _OP_DRAWS)
    ops = 1 + (draws[..., 0] * NUM_OPS).astype(np.uint8)
    ops[draws[..., 1] >= config.randaugment_prob] = Op.NONE
    # This is Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
    normal = np.sqrt(-2.0 * np.log1p(-draws[..., 2])) * np.cos(2.0 * np.pi * draws[..., 3])
    magnitude = np.clip(config.randaugment_magnitude + config.randaugment_std * normal, 0.0, MAX_MAGNITUDE)
    sign = np.where(draws[..., 4] < 0.5, -1.0, 1.0)
    args = np.zeros(ops.shape, dtype=np.float32)
    for op, argument in _ARGUMENTS.items():
        chosen = ops == op
        args[chosen] = argument(magnitude[chosen], sign[chosen])
    return ops, args


def three_augments(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grayscale, solarize or Gaussian blur, each with probability 1/3.

    Args:
      u: uniforms [n, >= 2].
    Returns:
      ops: uint8 [n, 1]: COLOR with factor 0, SOLARIZE from 128 on, or GAUSSIAN_BLUR with a radius of 0.1 to 2 pixels.
      args: float32 [n, 1].
    Source: DeiT III (arXiv 2204.07118), section 3; PIL's ImageOps.solarize has the same threshold as its default.
    """
    ops = np.array([Op.COLOR, Op.SOLARIZE, Op.GAUSSIAN_BLUR], dtype=np.uint8)[(u[:, 0] * 3).astype(np.int64)]
    args = np.select([ops == Op.COLOR, ops == Op.SOLARIZE], [0.0, 128.0], 0.1 + (2.0 - 0.1) * u[:, 1])
    return ops[:, None], args[:, None].astype(np.float32)


_JITTERS = np.array(list(itertools.permutations((Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR))), dtype=np.uint8)


def color_jitters(u: np.ndarray, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, contrast and saturation, in random order.

    Args:
      u: uniforms [n, >= 4].
    Returns:
      ops: uint8 [n, 3]: BRIGHTNESS, CONTRAST and COLOR in one of their six orders.
      args: float32 [n, 3], their factors, uniform in [max(0, 1 - color_jitter), 1 + color_jitter].
    Source: torchvision.transforms.ColorJitter(x, x, x), as timm uses it; no hue.
    """
    low, high = max(0.0, 1.0 - config.color_jitter), 1.0 + config.color_jitter
    ops = _JITTERS[(u[:, 0] * len(_JITTERS)).astype(np.int64)]
    return ops, (low + (high - low) * u[:, 1:4]).astype(np.float32)


def operations(seed: int, start: int, stop: int, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """All operations of positions [start, stop): RandAugment's, then 3-augment's, then colour jitter's.

    Returns:
      ops: uint8 [stop - start, L], values of `Op`, applied from left to right. L depends on `config` alone.
      args: float32 [stop - start, L], the argument of each as `Op` describes it.
    """
    uniforms = functools.partial(rng.uniforms, seed, start=start, stop=stop)
    drawn = [(np.zeros((stop - start, 0), dtype=np.uint8), np.zeros((stop - start, 0), dtype=np.float32))]
    if config.randaugment_ops:
        drawn.append(randaugment(uniforms(Stream.RANDAUGMENT, k=randaugment_draws(config)), config))
    if config.three_augment:
        drawn.append(three_augments(uniforms(Stream.THREE_AUGMENT, k=4)))
    if config.color_jitter:
        drawn.append(color_jitters(uniforms(Stream.COLOR_JITTER, k=4), config))
    ops, args = zip(*drawn, strict=True)
    return np.concatenate(ops, axis=1), np.concatenate(args, axis=1)


def erasures(u: np.ndarray, image_size: int, config: AugmentConfig) -> np.ndarray:
    """Random erasing: up to ten tries at a box of random area and aspect, smaller than the image.

    Args:
      u: uniforms [n, ERASE_DRAWS].
      image_size: side of the square image, pixels.
    Returns:
      int32 [n, 4]: top, left, height, width of the box to erase; zeros where nothing is erased.
    Source: timm.data.random_erasing.RandomErasing with its defaults: one box of 0.02 to 1/3 of the area, height / width
      log-uniform in 0.3 to 1 / 0.3.
    """
    tries = u[:, 1 : 1 + 2 * ERASE_TRIES].reshape(-1, ERASE_TRIES, 2)
    area = (0.02 + (1 / 3 - 0.02) * tries[..., 0]) * image_size**2
    aspect = np.exp(np.log(0.3) * (1.0 - 2.0 * tries[..., 1]))
    # The shape is [n, tries]. Like Python's round, rint rounds half to even.
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (height < image_size) & (width < image_size)
    row, first = np.arange(len(u)), fits.argmax(axis=1)
    height, width = height[row, first], width[row, first]
    u_top, u_left = u[:, 1 + 2 * ERASE_TRIES], u[:, 2 + 2 * ERASE_TRIES]
    top, left = np.floor(u_top * (image_size - height + 1)), np.floor(u_left * (image_size - width + 1))
    box = np.stack([top, left, height, width], axis=1).astype(np.int32)
    erased = (u[:, 0] < config.erase_prob) & fits[row, first] & (height * width > 0)
    box[~erased] = 0
    return box


def mixes(u: np.ndarray, image_size: int, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mixup or CutMix for each group.

    Args:
      u: uniforms [n, MIX_DRAWS].
      image_size: side of the square image, pixels.
    Returns:
      lam: float32 [n], the weight of the image's own label. For CutMix 1 - (area of the clipped box) / (image area).
      box: int32 [n, 4], top, left, height, width of the part that comes from the partner; empty means mixup with lam
        (no mixing at all is mixup with lam 1).
    Source: timm.data.mixup.Mixup, mode 'batch', correct_lam.
    """
    both = config.mixup_alpha > 0 and config.cutmix_alpha > 0
    cutmix = (u[:, 1] < config.cutmix_prob) if both else np.full(len(u), config.cutmix_alpha > 0)
    mixed = (u[:, 0] < config.mix_prob) & (config.mixup_alpha > 0 or config.cutmix_alpha > 0)
    lam = np.ones(len(u))
    for chosen, alpha in ((mixed & ~cutmix, config.mixup_alpha), (mixed & cutmix, config.cutmix_alpha)):
        if alpha > 0:
            lam[chosen] = beta_quantile(u[chosen, 2], alpha)
    # Half of the box's side lies on each side of the centre, cut off at the border.
    half = (image_size * np.sqrt(1.0 - lam)).astype(np.int64) // 2
    half[~(mixed & cutmix)] = 0
    row, column = ((u[:, i] * image_size).astype(np.int64) for i in (3, 4))
    top, bottom = np.clip(row - half, 0, image_size), np.clip(row + half, 0, image_size)
    left, right = np.clip(column - half, 0, image_size), np.clip(column + half, 0, image_size)
    box = np.stack([top, left, bottom - top, right - left], axis=1)
    box[box[:, 2] * box[:, 3] == 0] = 0
    lam = np.where(mixed & cutmix, 1.0 - box[:, 2] * box[:, 3] / image_size**2, lam)
    return lam.astype(np.float32), box.astype(np.int32)


def beta_quantile(u: np.ndarray, alpha: float) -> np.ndarray:
    """Quantiles of the symmetric Beta(alpha, alpha) distribution, so one uniform gives one draw.

    Args:
      u: float64 in [0, 1).
    Returns:
      float64 in [0, 1], within 1e-6 of the exact quantile.
    Source: with s = x**alpha the density x**(alpha-1) (1-x)**(alpha-1) dx becomes (1-x)**(alpha-1) ds / alpha, which is
      finite up to x = 1/2 for every alpha; it is integrated there, inverted, and mirrored.
    """
    s, cdf = _half_beta_table(alpha)
    low = np.interp(np.minimum(u, 1.0 - u), cdf, s) ** (1.0 / alpha)
    return np.where(u < 0.5, low, 1.0 - low)


@functools.lru_cache
def _half_beta_table(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(0.0, 0.5, 1 << 14)
    s, density = x**alpha, (1.0 - x) ** (alpha - 1.0)
    cdf = np.concatenate([[0.0], np.cumsum(np.diff(s) * (density[1:] + density[:-1]) / 2)])
    return s, cdf * (0.5 / cdf[-1])
