"""Training batches: our pipelines against DALI's own reader, timm's loader, webdataset and FFCV, on the same images.

What makes the rows comparable:

- Every row ends in batches of `SIZE_PX` pixels: uint8 in main memory, or on the GPU if there is one (timm's loader
  normalises there; without a GPU its batches are taken before that).
- Our pipelines keep a decoded image that comes again within the batches they look ahead, which is what "repeats 3"
  shows. There are more images than are timed, so that no run reaches a second epoch and no other row gains by it.
- Every row has as many threads or worker processes as there are cores, and reads from the page cache.
- Starting up does not count: a timed run opens its loader, takes some batches, and then times the next ones. Loaders
  are endless, so no queue runs dry in between, and batches are counted in multiples of the workers, which deliver
  theirs together.
- The others run in their fastest form: torchvision's decoder and transforms on tensors, DALI's decoder by default.

docs/performance.md says how RandAugment differs between them, and what FFCV does otherwise.
"""

import dataclasses
import functools
import importlib
import itertools
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines import PipelineConfig, open_pipeline, resolve_decode
from pipelines.common.machine import num_cores
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import ShardIndex
from tools.lib.benchmark.photographs import photograph_index
from tools.lib.benchmark.results import Measured, Row
from tools.lib.common.hardware import first_device
from tools.lib.common.process_pool import forkserver_context
from tools.lib.common.terminal import one_line
from tools.lib.common.timing import interleaved, ratio, speeds, synchronize
from trainer.feed import batches_of

SIZE_PX = 224
Images = Generator[torch.Tensor, None, None]  # Closing it ends the loader's threads and processes.
BARE, RECIPE, EVERY_OP = "crop + flip", "RandAugment", "RandAugment, every op"
_RANDAUGMENT = {
    BARE: AugmentConfig(randaugment_ops=0),
    RECIPE: AugmentConfig(),
    EVERY_OP: AugmentConfig(randaugment_prob=1.0),
}
_TIMM = {BARE: None, RECIPE: "rand-m7-mstd0.5-inc1", EVERY_OP: "rand-m7-p1.0-mstd0.5-inc1"}
_GROUPS = 8  # A global batch has this many batches, as in the recipe: the copies of an image are in different ones.
_AHEAD = 16  # A pipeline may look this many batches ahead.
_NUM_OPS, _MAGNITUDE, _BINS = 2, 7, 11  # These are the arguments of DALI's and torchvision's RandAugment.
_FILL = (124, 116, 104)  # ImageNet's mean colour
_JPEG_QUALITY = 92  # FFCV encodes the images again, in the quality of tools/lib/common/photos.py.
# Workers that are forked from a process with DALI's and our threads sometimes end by SIGSEGV.
_CLEAN_PROCESSES = "forkserver"
# A worker runs the file of the command once more, so the process that forks it has imported that.
_PRELOADED = ("tools.benchmark", "timm.data", "torchvision.transforms.v2", "webdataset")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
      folder: of the images as files; index: the same images as shards.
      batch: images a batch.
      workers: threads or processes.
      decode: DALI's decode path in our pipeline.
    """

    folder: Path
    index: ShardIndex
    batch: int
    workers: int
    device: torch.device
    decode: Literal["roi", "full"]


def loader(images: int, repeats: int, batch: int) -> Iterator[Row]:
    """The rows of the benchmark.

    Args:
      images: about how many a timed run takes; it takes full batches.
      batch: images a batch, at most `images`.
    """
    forkserver_context(*_PRELOADED)
    with tempfile.TemporaryDirectory() as scratch:
        workers, device = num_cores(), first_device()
        batch, lead = min(batch, images), 2 * workers
        num_batches = -(-images // (batch * workers)) * workers
        num_images = -(-(lead + num_batches + _AHEAD) // _GROUPS) * _GROUPS * batch
        index = photograph_index(Path(scratch), num_images, -(-num_images // (4 * workers)))
        decode, _ = resolve_decode(PipelineConfig(), index, device)
        setting = Setting(Path(scratch) / "src" / "train", index, batch, workers, device, decode)
        for augmentation in _RANDAUGMENT:
            yield from _rows(setting, augmentation, repeats, lead, num_batches)


def _rows(setting: Setting, augmentation: str, repeats: int, lead: int, num_batches: int) -> list[Row]:
    """A table: all loaders with the same augmentation, in turn. Ratios are over ours, on DALI if that can run."""
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], float]] = {}
    for what, open_batches in loaders(setting, augmentation).items():
        rows[what] = {"what": what, "augmentation": augmentation}
        if reason := failure(open_batches):
            rows[what]["note"] = reason
        else:
            runs[what] = functools.partial(batch_seconds, open_batches, lead, num_batches)
    seconds = interleaved(runs, repeats, warm_up=False)  # Each run has a warm-up of its own.
    ours = next((what for what in seconds if what.startswith("ours")), None)
    for what, times in seconds.items():
        compared: Measured = {"ratio": ratio(seconds[ours], times), "of": ours} if ours else {}
        rows[what] = {**rows[what], **speeds(num_batches * setting.batch, times), **compared}
    return list(rows.values())


def loaders(setting: Setting, augmentation: str) -> dict[str, Callable[[], Images]]:
    """Every loader that has the augmentation, by its name: a function that opens its endless batches of images."""
    dali = functools.partial(_ours, pipeline="dali")
    torchvision = functools.partial(_ours, pipeline="torchvision")
    found: dict[str, Callable[[Setting, str], Images]] = {"ours on DALI": dali, "ours on torchvision": torchvision}
    if augmentation != EVERY_OP:
        found["ours on DALI, repeats 3"] = functools.partial(dali, repeats=3)
        found["ours on torchvision, repeats 3"] = functools.partial(torchvision, repeats=3)
    if augmentation != RECIPE:
        found |= {"DALI's own reader": _dali, "webdataset + torchvision": _webdataset}
    found["timm"] = _timm
    if augmentation == BARE:
        found["FFCV"] = _ffcv
    return {what: functools.partial(open_batches, setting, augmentation) for what, open_batches in found.items()}


def failure(open_batches: Callable[[], Images]) -> str:
    """Why a loader cannot run here, "" if it gives a batch."""
    try:
        with closing(open_batches()) as batches:
            next(batches)
    except ImportError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # A foreign loader may raise anything; the other rows are still wanted.
        return f"failed, {type(error).__name__}: {one_line(error)}"
    return ""


def batch_seconds(open_batches: Callable[[], Images], lead: int, count: int) -> float:
    """Seconds for `count` batches after the first `lead`; the loader runs evenly by then."""
    with closing(open_batches()) as batches:
        for _ in range(lead):
            next(batches)
        synchronize()
        start_s = time.perf_counter()
        for _ in range(count):
            next(batches)
        synchronize()
        return time.perf_counter() - start_s


# --- the loaders: endless batches of images; closing the iterator ends their threads and processes ---


def _ours(setting: Setting, augmentation: str, *, pipeline: Literal["dali", "torchvision"], repeats: int = 1) -> Images:
    augment = dataclasses.replace(_RANDAUGMENT[augmentation], mix_group=setting.batch, repeats=repeats)
    plan = TrainPlan(setting.index, augment, 0, _GROUPS * setting.batch, SIZE_PX, fill=_FILL)
    plans = (plan.rows(start, start + setting.batch) for start in itertools.count(0, setting.batch))
    config = PipelineConfig(pipeline=pipeline, threads=setting.workers, decode=setting.decode)
    with closing(batches_of(open_pipeline(setting.index, config, device=setting.device), plans)) as batches:
        for batch in batches:
            yield batch.images


def _dali(setting: Setting, augmentation: str) -> Images:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import types as dali_types
    from nvidia.dali.auto_aug.rand_augment import rand_augment
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    on_gpu = setting.device.type == "cuda"
    types: Any = dali_types  # DALI adds most names when it is imported, so its type stubs lack them.
    operations: Any = fn

    @pipeline_def(enable_conditionals=True)
    def graph():
        jpeg, _ = operations.readers.webdataset(
            paths=[str(path) for path in setting.index.paths],
            index_paths=[str(path.with_suffix(".idx")) for path in setting.index.paths],
            ext=["jpg", "cls"],
            random_shuffle=True,
        )
        images = fn.decoders.image_random_crop(
            jpeg,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
            num_attempts=10,
        )
        images = fn.resize(images, size=[SIZE_PX, SIZE_PX], interp_type=types.INTERP_CUBIC, antialias=True)
        images = operations.flip(images, horizontal=fn.random.coin_flip())
        if augmentation != BARE:
            images = rand_augment(images, _NUM_OPS, _MAGNITUDE, num_magnitude_bins=_BINS, shape=(SIZE_PX, SIZE_PX))
        return images

    # DALI's RandAugment uses what DALI calls deprecated, and warns past any filter.
    with warnings.catch_warnings(record=True):
        pipeline = graph(batch_size=setting.batch, num_threads=setting.workers, device_id=0 if on_gpu else None)
        batches = DALIGenericIterator([pipeline], ["images"])  # Without a size it is endless.
    for outputs in batches:
        yield outputs[0]["images"]


def _timm(setting: Setting, augmentation: str) -> Images:
    from timm import data

    timm_data: Any = data  # Its annotations leave out what it accepts and returns here.
    batches = timm_data.create_loader(
        timm_data.create_dataset("", str(setting.folder)),
        input_size=(3, SIZE_PX, SIZE_PX),
        batch_size=setting.batch,
        is_training=True,
        auto_augment=_TIMM[augmentation],
        color_jitter=None,
        interpolation="bicubic",
        num_workers=setting.workers,
        pin_memory=setting.device.type == "cuda",
        device=setting.device,
    )
    batches.loader.multiprocessing_context = _CLEAN_PROCESSES
    if setting.device.type == "cpu":
        batches = batches.loader  # It yields uint8, before the normalisation that is meant for a GPU.
    while True:
        for images, _ in batches:
            yield images


def _webdataset(setting: Setting, augmentation: str) -> Images:
    webdataset: Any = importlib.import_module("webdataset")  # It adds its names at run time.

    shards = [str(path) for path in setting.index.paths]
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, handler=webdataset.reraise_exception)
        .shuffle(1000)
        .to_tuple("jpg")
        .map_tuple(_TensorTransform(augmentation != BARE))
        .batched(setting.batch, partial=False)
    )
    batches = webdataset.WebLoader(
        dataset,
        batch_size=None,
        num_workers=setting.workers,
        pin_memory=setting.device.type == "cuda",
        multiprocessing_context=_CLEAN_PROCESSES,
    )
    for (images,) in batches:
        yield images.to(setting.device, non_blocking=True)


class _TensorTransform:
    """JPEG bytes -> uint8 [3, SIZE_PX, SIZE_PX] through torchvision's decoder and v2 transforms.

    RandAugment runs on PIL images, where it is faster.
    """

    def __init__(self, randaugment: bool):
        from torchvision.transforms import InterpolationMode, v2

        stages = [
            v2.RandomResizedCrop(SIZE_PX, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
        if randaugment:
            operations = v2.RandAugment(_NUM_OPS, _MAGNITUDE, _BINS, interpolation=InterpolationMode.BICUBIC)
            stages += [v2.ToPILImage(), operations, v2.PILToTensor()]
        self._transform = v2.Compose(stages)

    def __call__(self, jpeg: bytes) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg

        return self._transform(decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB))


def _ffcv(setting: Setting, augmentation: str) -> Images:
    threads = torch.get_num_threads()  # FFCV changes torch's threads in this process, even by being imported.
    try:
        batches = _open_ffcv(_beton(setting), setting.batch, setting.workers, setting.device)
        while True:
            epoch: Any = iter(batches)  # FFCV has no types.
            try:
                for (images,) in epoch:
                    yield images
            finally:  # FFCV's own close() leaves its thread running during the next row.
                epoch.terminate_event.set()
                epoch.join()
                epoch.close()
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _open_ffcv(beton: Path, batch: int, workers: int, device: torch.device) -> Iterable[tuple[torch.Tensor]]:
    """FFCV's loader, an epoch each time it is iterated. It is compiled once a process, which takes seconds."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    stages = [RandomResizedCropRGBImageDecoder((SIZE_PX, SIZE_PX)), RandomHorizontalFlip(), ToTensor()]
    if device.type == "cuda":
        stages.append(ToDevice(device, non_blocking=True))
    return Loader(
        str(beton),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": [*stages, ToTorchImage()], "label": None},
    )


def _beton(setting: Setting) -> Path:
    """The images as FFCV's file, beside their folder. A process of its own, which FFCV can fork, writes it once."""
    import ffcv  # noqa: F401  (A missing FFCV is noticed here.)

    path = setting.folder.parent / "train.beton"
    if not path.exists():
        with ProcessPoolExecutor(1, multiprocessing.get_context(_CLEAN_PROCESSES)) as pool:
            pool.submit(_write_beton, setting.folder, path, setting.workers).result()
    return path


def _write_beton(folder: Path, path: Path, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    multiprocessing.set_start_method("fork", force=True)  # FFCV expects it, and this process has no threads.
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=_JPEG_QUALITY), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(ImageFolder(str(folder)))
