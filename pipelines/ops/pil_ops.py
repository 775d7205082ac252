"""The reference: libjpeg, torch's resize and timm's own PIL operations, one image at a time.

The other forms of the operations, and DALI's decoder, must equal these pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import auto_augment as timm_ops
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.plan.draws import Op
from pipelines.plan.plan import BatchPlan
from pipelines.shards.damage import CheckedReader, decode_with_pil


def decode(encoded: np.ndarray) -> np.ndarray:
    """RGB pixels as stored, uint8 [height, width, 3]: EXIF orientation is not applied.

    torchvision's decoder of JPEGs gives PIL's pixels and leaves other threads alone meanwhile; PIL decodes the rest.

    Raises:
      Exception: nearly any, if the bytes are no image.
    """
    try:
        # torch wants memory that it may write to, so it gets a copy.
        pixels = decode_jpeg(torch.from_numpy(encoded.copy()), ImageReadMode.RGB)
    except RuntimeError:  # It is no JPEG, or a damaged one, which PIL distinguishes.
        return np.asarray(decode_with_pil(encoded))
    assert isinstance(pixels, torch.Tensor)  # A list of images would give a list.
    return pixels.permute(1, 2, 0).numpy()


def decode_checked(reader: CheckedReader, sample: int) -> np.ndarray:
    """RGB pixels of a sample; one that cannot be decoded is rejected, and its replacement decoded."""
    # This is asked first, because another thread may reject the sample while this one reads it.
    was_replaced = reader.is_replaced(sample)
    (encoded,) = reader.read(np.array([sample]))
    try:
        return decode(encoded)
    except Exception as error:  # Damaged bytes bring decoders to raise nearly anything. The reader reports it.
        if was_replaced:
            raise
        reader.reject(sample, f"cannot be decoded ({error})")
    return decode_checked(reader, sample)


def transform(image: np.ndarray, plan: BatchPlan, row: int) -> np.ndarray:
    """One row of a plan carried out on a decoded image: crop, resize, window, flip, operations, erasing.

    Args:
      image: uint8 [height, width, 3].
    Returns:
      uint8 [image_size, image_size, 3].
    """
    pixels = crop_resize(image, plan, row)
    return augmented(pixels[:, ::-1] if plan.flip[row] else pixels, plan, row)


def crop_resize(image: np.ndarray, plan: BatchPlan, row: int) -> np.ndarray:
    """Cut out the crop, resize it, and cut out the window: uint8 [image_size, image_size, 3]."""
    resized = resized_crop(image, plan.crop[row].tolist(), plan.resize[row].tolist(), plan.interpolation)
    top, left = plan.window[row].tolist()
    return resized[top : top + plan.image_size, left : left + plan.image_size]


def resized_crop(image: np.ndarray, box: Sequence[int], size: Sequence[int], interpolation: str) -> np.ndarray:
    """A box (top, left, height, width) of an image, resized with antialiasing: uint8 [*size, 3].

    Torch's resize of uint8 pixels is PIL's with filter weights of 16 instead of 22 bits: one or, rarely, two levels of
    difference (docs/parity.md), and four to eight times as fast.
    """
    top, left, height, width = box
    # Without this copy torch makes one itself, in threads that get into each other's way.
    crop = torch.from_numpy(image[None, top : top + height, left : left + width].copy())
    # The shape is [1, 3, height, width] between the two permutations; in memory the channels are last throughout.
    resized = torch.nn.functional.interpolate(crop.permute(0, 3, 1, 2), list(size), mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def augmented(pixels: np.ndarray, plan: BatchPlan, row: int) -> np.ndarray:
    """Carry out a plan's operations and erasing on a cropped, resized and flipped image: uint8 [S, S, 3]."""
    if plan.ops[row].any():
        image = Image.fromarray(np.ascontiguousarray(pixels))
        for op, arg in zip(plan.ops[row].tolist(), plan.args[row].tolist(), strict=True):
            image = apply_op(image, Op(op), arg, plan.fill)
        pixels = np.asarray(image)
    top, left, height, width = plan.erase[row].tolist()
    if height * width:
        pixels = pixels.copy()
        pixels[top : top + height, left : left + width] = plan.fill
    return pixels


# Each operation is timm's own function, or PIL's for the blur, of an image and an argument. The geometric ones also
# take the fill colour and the filter.
_PIL_OPS: dict[Op, Callable[..., Image.Image]] = {
    Op.AUTO_CONTRAST: lambda image, _, **how: timm_ops.auto_contrast(image, **how),
    Op.EQUALIZE: lambda image, _, **how: timm_ops.equalize(image, **how),
    Op.INVERT: lambda image, _, **how: timm_ops.invert(image, **how),
    Op.ROTATE: timm_ops.rotate,
    Op.POSTERIZE: lambda image, bits, **_: timm_ops.posterize(image, int(bits)),
    Op.SOLARIZE: lambda image, threshold, **_: timm_ops.solarize(image, int(threshold)),
    Op.SOLARIZE_ADD: lambda image, add, **_: timm_ops.solarize_add(image, int(add)),
    Op.COLOR: timm_ops.color,
    Op.CONTRAST: timm_ops.contrast,
    Op.BRIGHTNESS: timm_ops.brightness,
    Op.SHARPNESS: timm_ops.sharpness,
    Op.SHEAR_X: timm_ops.shear_x,
    Op.SHEAR_Y: timm_ops.shear_y,
    Op.TRANSLATE_X: timm_ops.translate_x_rel,
    Op.TRANSLATE_Y: timm_ops.translate_y_rel,
    Op.GAUSSIAN_BLUR: lambda image, radius, **_: image.filter(ImageFilter.GaussianBlur(radius)),
}


def apply_op(image: Image.Image, op: Op, arg: float, fill: tuple[int, int, int]) -> Image.Image:
    """One operation through timm's own PIL function, bicubic where it is geometric."""
    if op == Op.NONE:
        return image
    return _PIL_OPS[op](image, arg, fillcolor=fill, resample=Image.Resampling.BICUBIC)
