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
- RandAugment differs between the loaders. The recipe's applies each of two operations with probability 0.5;
  torchvision and DALI always apply both, so their rows compare with "every op" of ours and timm's. Their magnitude is 7
  of bins 0 to 10, timm's scale.
- The others run in their fastest form: torchvision's decoder and transforms on tensors, DALI's decoder by default.
- FFCV reads a file of its own, into which it encodes the same images as JPEGs of the same quality, at full size. It
  has no RandAugment, resizes with OpenCV's area filter where the others are bicubic, and decodes with libjpeg's less
  exact, faster DCT.
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
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines import PipelineConfig, open_pipeline, resolve_decode
from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores, use_short_socket_names
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import ShardIndex
from tools.lib.benchmark.photographs import endless, photograph_index, recipe_plan
from tools.lib.benchmark.results import SPEED_COLUMNS, Measured, Row
from tools.lib.common.hardware import first_device
from tools.lib.common.terminal import one_line
from tools.lib.common.timing import interleaved, ratio, speeds, synchronize
from trainer.feed import batches_of

SIZE_PX = 224
Images = Generator[torch.Tensor, None, None]  # Closing it ends the loader's threads and processes.
COLUMNS = SPEED_COLUMNS
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
_JPEG_QUALITY = 92  # FFCV encodes the images again, in the quality of tools/lib/common/photos.py.
# Workers that are forked from a process with DALI's and our threads sometimes end by SIGSEGV.
_CLEAN_PROCESSES = "forkserver"
_OURS: dict[Literal["dali", "torchvision"], str] = {"dali": "ours on DALI", "torchvision": "ours on torchvision"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
      folder: of the images as files; index: the same images as shards.
      batch: images a batch.
      workers: threads or processes.
      config: of our pipelines.
    """

    folder: Path
    index: ShardIndex
    batch: int
    workers: int
    device: torch.device
    config: PipelineConfig


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row: the loader's name, its augmentation, and how to open its endless batches of images."""

    what: str
    augmentation: str
    open: Callable[[], Images]


def loader(images: int, repeats: int, batch: int) -> Iterator[Row]:
    """The rows of the benchmark.

    Args:
      images: about how many a timed run takes; it takes full batches.
      batch: images a batch, at most `images`.
    """
    _start_clean_process()
    with tempfile.TemporaryDirectory() as scratch:
        workers = num_cores()
        batch, lead = min(batch, images), 2 * workers
        num_batches = -(-images // (batch * workers)) * workers
        num_images = -(-(lead + num_batches + _AHEAD) // _GROUPS) * _GROUPS * batch
        index = photograph_index(Path(scratch), num_images, samples_per_shard=-(-num_images // (4 * workers)))
        device = first_device()
        decode, _ = resolve_decode(PipelineConfig(), index, device)
        config = PipelineConfig(threads=workers, decode=decode)
        setting = Setting(Path(scratch) / "src" / "train", index, batch, workers, device, config)
        for _, group in itertools.groupby(candidates(setting), lambda candidate: candidate.augmentation):
            yield from _rows(list(group), setting, repeats, lead, num_batches)


def _rows(group: list[Candidate], setting: Setting, repeats: int, lead: int, num_batches: int) -> list[Row]:
    """A table: all loaders with the same augmentation, in turn."""
    rows: dict[str, Row] = {each.what: {"what": each.what, "augmentation": each.augmentation} for each in group}
    runs = {}
    for each in group:
        if reason := missing(each, setting):
            rows[each.what]["note"] = reason
        else:
            runs[each.what] = functools.partial(batch_seconds, each.open, lead, num_batches)
    seconds = interleaved(runs, repeats, warm_up=False)  # Each run has a warm-up of its own.
    for what, times in seconds.items():
        rows[what] = {**rows[what], **speeds(num_batches * setting.batch, times), **_compared(what, seconds)}
    return list(rows.values())


def candidates(setting: Setting) -> list[Candidate]:
    """Every loader with every augmentation it has."""
    found = []

    def add(what: str, augmentation: str, open_batches: Callable[..., Images], *arguments) -> None:
        found.append(Candidate(what, augmentation, functools.partial(open_batches, setting, *arguments)))

    for augmentation in _RANDAUGMENT:
        for name, ours in _OURS.items():
            add(ours, augmentation, _ours, name, augmentation, 1)
            if augmentation != EVERY_OP:
                add(f"{ours}, repeats 3", augmentation, _ours, name, augmentation, 3)
        if augmentation != RECIPE:
            add("DALI's own reader", augmentation, _dali, augmentation == EVERY_OP)
            add("webdataset + torchvision", augmentation, _webdataset, augmentation == EVERY_OP)
        add("timm", augmentation, _timm, augmentation)
        if augmentation == BARE:
            add("FFCV", augmentation, _ffcv)
    return found


def missing(candidate: Candidate, setting: Setting) -> str | None:
    """Why a candidate cannot run here, or None. It takes one batch and looks at its shape."""
    try:
        with closing(candidate.open()) as batches:
            shape = tuple(next(batches).shape)
    except ImportError as error:
        return f"not installed ({error.name})"
    except UserError as error:
        return str(error)
    except Exception as error:  # A foreign loader may raise anything; the other rows are still wanted.
        return f"failed, {type(error).__name__}: {one_line(error)}"
    channels_last = (setting.batch, SIZE_PX, SIZE_PX, 3)
    assert shape in (channels_last, (setting.batch, 3, SIZE_PX, SIZE_PX)), (candidate, shape)
    return None


def _compared(what: str, seconds: dict[str, list[float]]) -> Measured:
    """A row's speed over ours with the same augmentation: on DALI, or on torchvision where DALI cannot run."""
    ours = next((name for name in _OURS.values() if name in seconds), None)
    return {"ratio": ratio(seconds[ours], seconds[what]), "of": ours} if ours else {}


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


def _start_clean_process() -> None:
    """Start the process that workers are forked from and let it import what they need, so that they start at once."""
    # Each worker runs the file of this command once more, which is why the command itself is imported first.
    use_short_socket_names()
    multiprocessing.set_forkserver_preload(["tools.benchmark", "timm.data", "torchvision.transforms.v2", "webdataset"])
    forkserver.ensure_running()


# --- the loaders: endless batches of images; closing the iterator ends their threads and processes ---


def _ours(setting: Setting, name: Literal["dali", "torchvision"], augmentation: str, repeats: int) -> Images:
    augment = dataclasses.replace(_RANDAUGMENT[augmentation], mix_group=setting.batch, repeats=repeats)
    size = _GROUPS * setting.batch
    plan: TrainPlan = recipe_plan(setting.index, setting.batch, SIZE_PX, augment=augment, global_batch=size)
    config = dataclasses.replace(setting.config, pipeline=name)
    pipeline = open_pipeline(setting.index, config, device=setting.device)
    with closing(batches_of(pipeline, endless(plan, setting.batch))) as batches:
        for batch in batches:
            yield batch.images


def _dali(setting: Setting, randaugment: bool) -> Images:
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
        if randaugment:
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


def _webdataset(setting: Setting, randaugment: bool) -> Images:
    webdataset: Any = importlib.import_module("webdataset")  # It adds its names at run time.

    shards = [str(path) for path in setting.index.paths]
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, handler=webdataset.reraise_exception)
        .shuffle(1000)
        .to_tuple("jpg")
        .map_tuple(_TensorTransform(randaugment))
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


def _ffcv(setting: Setting) -> Images:
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
        arguments = (setting.folder, path, setting.workers)
        writer = multiprocessing.get_context(_CLEAN_PROCESSES).Process(target=_write_beton, args=arguments)
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"FFCV cannot write its file (exit code {writer.exitcode}). Its own error stands above")
    return path


def _write_beton(folder: Path, path: Path, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    multiprocessing.set_start_method("fork", force=True)  # FFCV expects it, and this process has no threads.
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=_JPEG_QUALITY), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(ImageFolder(str(folder)))
