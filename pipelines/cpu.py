"""The reference pipeline: libjpeg, torch's resize and timm's own PIL operations in a thread pool."""

import collections
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.data import auto_augment as timm_ops
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.batch import Batch, BatchMaker
from pipelines.plan.draws import Op
from pipelines.plan.plan import BatchPlan
from pipelines.shards.damage import CheckedReader, decode_with_pil
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import PLANS_AHEAD, look_ahead, read_ahead

_BATCHES_IN_FLIGHT = 2  # the pool works on the next batch while the last images of this one are finished
_KEPT_BYTES = 512 << 20  # decoded images at a time: a global batch of ImageNet has 192 MB of different ones


class TorchvisionPipeline:
    """Carries plans out on the CPU, with the pixels of timm's transforms.

    Args:
      index: where the samples lie.
      device: where the batches go.
      threads: of the pool; what they do is done outside Python's lock.
      prefetch: finished batches that wait for the training step.
      on_bad: told (sample, error) once for each sample that is replaced (CheckedReader).
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        device: torch.device,
        threads: int,
        prefetch: int,
        on_bad: Callable[[int, str], None],
    ):
        self._index = index
        self._maker = BatchMaker(index, device)
        self._threads = threads
        self._prefetch = prefetch
        self._reader = CheckedReader(index, on_bad)

    def forget(self) -> None:
        """Nothing is kept."""

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order, made ahead in the background.

        Raises:
          UserError: a shard is missing or shorter than the index says.
        """
        return read_ahead(self._batches(plans), self._prefetch)

    def _batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        self._maker.use_device()
        in_flight: collections.deque[tuple[BatchPlan, np.ndarray, list[Future]]] = collections.deque()
        images = _RepeatedImages(self._index, functools.partial(decode_checked, self._reader))

        def announce(plan: BatchPlan) -> None:
            self._reader.will_need(plan.sample)
            images.announce(plan.sample)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="augment") as pool:
            try:
                for plan in look_ahead(plans, PLANS_AHEAD, announce):
                    in_flight.append(self._submit(pool, plan, images))
                    if len(in_flight) == _BATCHES_IN_FLIGHT:
                        yield self._finish(*in_flight.popleft())
                while in_flight:
                    yield self._finish(*in_flight.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _submit(
        pool: ThreadPoolExecutor, plan: BatchPlan, images: "_RepeatedImages"
    ) -> tuple[BatchPlan, np.ndarray, list[Future]]:
        pixels = np.empty((len(plan), plan.image_size, plan.image_size, 3), dtype=np.uint8)

        def fill(row: int, image: Callable[[], np.ndarray]) -> None:
            pixels[row] = transform(image(), plan, row)

        rows = [pool.submit(fill, row, images.take(sample)) for row, sample in enumerate(plan.sample.tolist())]
        return plan, pixels, rows

    def _finish(self, plan: BatchPlan, pixels: np.ndarray, rows: list[Future]) -> Batch:
        for row in rows:
            row.result()
        return self._maker.make(torch.from_numpy(pixels), plan)


class _RepeatedImages:
    """Decoded images; one that upcoming plans show again is kept from its first use to its last.

    Repeated augmentation shows an image several times within a global batch: it is decoded once then. What is kept
    changes no pixel.
    """

    def __init__(self, index: ShardIndex, decode: Callable[[int], np.ndarray]):
        self._index = index
        self._decode = decode
        self._uses: collections.Counter[int] = collections.Counter()  # announced and not yet taken
        self._kept: dict[int, _Once] = {}
        self._kept_bytes = 0

    def announce(self, samples: np.ndarray) -> None:
        """The samples will be taken, once for each time they are announced."""
        self._uses.update(samples.tolist())

    def take(self, sample: int) -> Callable[[], np.ndarray]:
        """What gives the decoded image; it is decoded where it is first called, in one of the pool's threads."""
        self._uses[sample] -= 1
        image = self._kept.get(sample) or _Once(functools.partial(self._decode, sample))
        if self._uses[sample] == 0:
            del self._uses[sample]
            if self._kept.pop(sample, None):
                self._kept_bytes -= self._nbytes(sample)
        elif sample not in self._kept and self._kept_bytes + self._nbytes(sample) <= _KEPT_BYTES:
            self._kept[sample] = image
            self._kept_bytes += self._nbytes(sample)
        return image

    def _nbytes(self, sample: int) -> int:
        row = self._index.samples[sample]
        return 3 * int(row["height"]) * int(row["width"])


class _Once:
    """Calls a function the first time it is called itself, and gives that result ever after, in any thread."""

    def __init__(self, function: Callable[[], np.ndarray]):
        self._function = function
        self._lock = threading.Lock()
        self._result: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        with self._lock:
            if self._result is None:
                self._result = self._function()
            return self._result


def decode(encoded: np.ndarray) -> np.ndarray:
    """RGB pixels as stored, uint8 [height, width, 3]: EXIF orientation is not applied.

    torchvision's decoder of JPEGs gives PIL's pixels and leaves other threads alone meanwhile; PIL decodes the rest.

    Raises:
      Exception: nearly any, if the bytes are no image.
    """
    try:
        # a copy: torch wants memory that it may write to
        return decode_jpeg(torch.from_numpy(encoded.copy()), ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except RuntimeError:  # no JPEG, or a damaged one; PIL can tell which
        return np.asarray(decode_with_pil(encoded))


def decode_checked(reader: CheckedReader, sample: int) -> np.ndarray:
    """RGB pixels of a sample; one that cannot be decoded is rejected, and its replacement decoded."""
    was_replaced = reader.is_replaced(sample)  # before it is read: another thread may reject it meanwhile
    (encoded,) = reader.read(np.array([sample]))
    try:
        return decode(encoded)
    except Exception as error:  # damaged bytes bring decoders to raise nearly anything; the reader tells about it
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
    """The crop, resized, and of that the window: uint8 [image_size, image_size, 3]."""
    resized = resized_crop(image, plan.crop[row].tolist(), plan.resize[row].tolist(), plan.interpolation)
    top, left = plan.window[row].tolist()
    return resized[top : top + plan.image_size, left : left + plan.image_size]


def resized_crop(image: np.ndarray, box: Sequence[int], size: Sequence[int], interpolation: str) -> np.ndarray:
    """A box (top, left, height, width) of an image, resized with antialiasing: uint8 [*size, 3].

    Torch's resize of uint8 pixels is PIL's with filter weights of 16 instead of 22 bits: one or, rarely, two levels of
    difference (docs/parity.md), and four to eight times as fast.
    """
    top, left, height, width = box
    # a copy: torch would make one itself, in threads that get into each other's way
    crop = torch.from_numpy(image[None, top : top + height, left : left + width].copy())
    # [1, 3, height, width] and back, channels last in memory throughout
    resized = F.interpolate(crop.permute(0, 3, 1, 2), tuple(size), mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def augmented(pixels: np.ndarray, plan: BatchPlan, row: int) -> np.ndarray:
    """What a plan does to an image after it was cropped, resized and flipped: uint8 [S, S, 3], like `pixels`."""
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
