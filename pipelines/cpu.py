"""The reference pipeline: PIL, torchvision and timm's own PIL operations in a thread pool."""

import collections
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment as timm_ops
from torchvision.transforms.v2 import functional as F

from pipelines.augment import Op
from pipelines.batch import Batch, BatchMaker
from pipelines.errors import UserError
from pipelines.index import ShardIndex
from pipelines.plan import BatchPlan
from pipelines.reader import ShardReader, read_ahead

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_BATCHES_IN_FLIGHT = 2  # the pool works on the next batch while the last images of this one are finished


class TorchvisionPipeline:
    """Carries plans out on the CPU, every stage as timm does it.

    Args:
      index: where the samples lie.
      device: where the batches go.
      threads: of the pool; PIL works outside Python's lock.
      prefetch: finished batches that wait for the training step.
    """

    def __init__(self, index: ShardIndex, *, device: torch.device, threads: int, prefetch: int):
        self._index = index
        self._maker = BatchMaker(index, device)
        self._threads = threads
        self._prefetch = prefetch
        self._reader = ShardReader(index)

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order, made ahead in the background.

        Raises:
          UserError: a sample cannot be read or decoded; the message names it.
        """
        return read_ahead(self._batches(plans), self._prefetch)

    def _batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        in_flight: collections.deque[tuple[BatchPlan, np.ndarray, list[Future]]] = collections.deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="augment") as pool:
            try:
                for plan in plans:
                    in_flight.append(self._submit(pool, plan))
                    if len(in_flight) == _BATCHES_IN_FLIGHT:
                        yield self._finish(*in_flight.popleft())
                while in_flight:
                    yield self._finish(*in_flight.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, plan: BatchPlan) -> tuple[BatchPlan, np.ndarray, list[Future]]:
        self._reader.will_need(plan.sample)
        images = np.empty((len(plan), plan.image_size, plan.image_size, 3), dtype=np.uint8)
        return plan, images, [pool.submit(self._fill, images, plan, row) for row in range(len(plan))]

    def _finish(self, plan: BatchPlan, images: np.ndarray, rows: list[Future]) -> Batch:
        for row in rows:
            row.result()
        return self._maker.make(torch.from_numpy(images), plan)

    def _fill(self, images: np.ndarray, plan: BatchPlan, row: int) -> None:
        sample = int(plan.sample[row])
        jpeg = self._reader.read(plan.sample[row : row + 1])[0]
        images[row] = np.asarray(transform(try_decode(jpeg, self._index, sample), plan, row))


def decode(jpeg: np.ndarray | bytes) -> Image.Image:
    """RGB pixels as stored: EXIF orientation is not applied."""
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def try_decode(jpeg: np.ndarray | bytes, index: ShardIndex, sample: int) -> Image.Image:
    """As `decode`; raises a UserError that names the sample."""
    try:
        return decode(jpeg)
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on some damaged headers
        raise UserError(
            f"{index.name(sample)}: cannot be decoded ({error}). The shard was damaged after it was made: restore it"
        ) from error


def transform(image: Image.Image, plan: BatchPlan, row: int) -> Image.Image:
    """One row of a plan carried out on a decoded image: crop, resize, window, flip, operations, erasing."""
    image = crop_resize(image, plan, row)
    if plan.flip[row]:
        image = ImageOps.mirror(image)
    for op, arg in zip(plan.ops[row].tolist(), plan.args[row].tolist(), strict=True):
        image = apply_op(image, Op(op), arg, plan.fill)
    top, left, height, width = plan.erase[row].tolist()
    if height * width:
        image = image.copy()
        image.paste(plan.fill, (left, top, left + width, top + height))
    return image


def crop_resize(image: Image.Image, plan: BatchPlan, row: int) -> Image.Image:
    """The crop, resized, and of that the window: RGB [image_size, image_size]."""
    resample = _RESAMPLE[plan.interpolation]
    resized = F.resized_crop(image, *plan.crop[row].tolist(), plan.resize[row].tolist(), resample, antialias=True)
    size = plan.image_size
    if resized.size == (size, size):
        return resized
    top, left = plan.window[row].tolist()
    return F.crop(resized, top, left, size, size)


# op -> timm's own function, PIL's for the blur, and whether it takes the argument; the geometric ones also take fill
# and filter.
_PIL_OPS = {
    Op.AUTO_CONTRAST: (timm_ops.auto_contrast, False),
    Op.EQUALIZE: (timm_ops.equalize, False),
    Op.INVERT: (timm_ops.invert, False),
    Op.ROTATE: (timm_ops.rotate, True),
    Op.POSTERIZE: (lambda image, bits, **_: timm_ops.posterize(image, int(bits)), True),
    Op.SOLARIZE: (lambda image, threshold, **_: timm_ops.solarize(image, int(threshold)), True),
    Op.SOLARIZE_ADD: (lambda image, add, **_: timm_ops.solarize_add(image, int(add)), True),
    Op.COLOR: (timm_ops.color, True),
    Op.CONTRAST: (timm_ops.contrast, True),
    Op.BRIGHTNESS: (timm_ops.brightness, True),
    Op.SHARPNESS: (timm_ops.sharpness, True),
    Op.SHEAR_X: (timm_ops.shear_x, True),
    Op.SHEAR_Y: (timm_ops.shear_y, True),
    Op.TRANSLATE_X: (timm_ops.translate_x_rel, True),
    Op.TRANSLATE_Y: (timm_ops.translate_y_rel, True),
    Op.GAUSSIAN_BLUR: (lambda image, radius, **_: image.filter(ImageFilter.GaussianBlur(radius)), True),
}


def apply_op(image: Image.Image, op: Op, arg: float, fill: tuple[int, int, int]) -> Image.Image:
    """One operation through timm's own PIL function, bicubic where it is geometric."""
    if op == Op.NONE:
        return image
    function, takes_argument = _PIL_OPS[op]
    arguments = (arg,) if takes_argument else ()
    return function(image, *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC)
