"""Training batches: our pipelines against DALI's own reader, timm's loader, webdataset and FFCV, on the same pictures.

What makes the rows comparable:

- Every row ends in batches of `SIZE_PX` pixels: uint8 in main memory, or on the GPU if there is one (timm's loader
  normalises there; without a GPU its batches are taken before that).
- Our pipelines keep a decoded picture that comes again within the batches they look ahead, which is what "repeats 3"
  shows. There are more pictures than are timed, so that no run reaches a second epoch and no other row gains by it.
- Every row has as many threads or worker processes as there are cores, and reads from the page cache.
- Starting up does not count: a run opens its loader, takes some batches, and then times the next ones. Loaders are
  endless, so nobody's queue runs dry in between, and batches are counted in multiples of the workers, which deliver
  theirs together.
- RandAugment is a different one everywhere. The recipe's applies each of two operations with probability 0.5;
  torchvision and DALI always apply both, so what their rows compare with is "every op" of ours and timm's. Their
  magnitude is 7 of bins 0 to 10, timm's scale.
- "Per stage" are our two pipelines with one thing more in each row, RandAugment as in the recipe; the last row is the
  pipeline whole.
- The others run as they are fastest: torchvision's decoder and transforms on tensors, DALI's default decoder settings.
- FFCV reads a file of its own, into which it encodes the same pictures as JPEGs of the same quality, at full size. It
  has no RandAugment, resizes with OpenCV's area filter where the others are bicubic, and decodes with libjpeg's less
  exact, faster DCT.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path

import torch

from pipelines import Pipeline
from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores, use_short_socket_names
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from tools.lib.common.opening import decode_path, first_device, opened
from tools.lib.common.photos import write_common_photographs
from tools.lib.common.timing import SPEED_COLUMNS, interleaved, ratio, speeds, synchronize
from tools.lib.doctor import stages
from tools.lib.shards.build import BuildOptions, build
from trainer.config.sections import DataConfig

SIZE_PX = 224
COLUMNS = SPEED_COLUMNS
BARE, RECIPE, EVERY_OP = "crop + flip", "RandAugment", "RandAugment, every op"
_RANDAUGMENT = {BARE: {"randaugment_ops": 0}, RECIPE: {}, EVERY_OP: {"randaugment_prob": 1.0}}
_TIMM = {BARE: None, RECIPE: "rand-m7-mstd0.5-inc1", EVERY_OP: "rand-m7-p1.0-mstd0.5-inc1"}
_GROUPS = 8  # batches in a global batch, as in the recipe: the copies of an image are in different ones
_AHEAD = 16  # batches a pipeline may look ahead
_NUM_OPS, _MAGNITUDE, _BINS = 2, 7, 11  # of DALI's and torchvision's RandAugment
_JPEG_QUALITY = 92  # of tools/lib/common/photos.py, for FFCV, which encodes them again
_CLEAN_PROCESSES = "forkserver"  # workers forked from a process with DALI's and our threads end by SIGSEGV at times


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows share: the pictures as a folder and as shards, images a batch, threads or processes, device; and
    our decode path.
    """

    folder: Path
    index: ShardIndex
    batch: int
    workers: int
    device: torch.device
    decode: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row: who, with which augmentation, and how to open its endless batches of images."""

    what: str
    augmentation: str
    open: Callable[[], Iterator[torch.Tensor]]


def loader(images: int, repeats: int, batch: int) -> Iterator[dict]:
    """The rows of the benchmark; a run times `images` images or some more, in batches of `batch` or of all of them."""
    _start_clean_process()
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "src", Path(scratch) / "out"
        workers = num_cores()
        batch, lead = min(batch, images), 2 * workers
        num_batches = -(-images // (batch * workers)) * workers
        num_pictures = -(-(lead + num_batches + _AHEAD) // _GROUPS) * _GROUPS * batch
        write_common_photographs(folder, num_pictures)
        build(folder, out, BuildOptions(samples_per_shard=-(-num_pictures // (4 * workers))), workers=workers)
        index, device = read_index(out, "train"), first_device()
        decode, _ = decode_path(index, device)
        setting = Setting(folder / "train", index, batch, workers, device, decode)
        for _, group in itertools.groupby(candidates(setting), lambda candidate: candidate.augmentation):
            yield from _rows(list(group), setting, repeats, lead, num_batches)
        yield from stages.input_rows(_feeds(setting), images, repeats)


def _rows(group: list[Candidate], setting: Setting, repeats: int, lead: int, num_batches: int) -> list[dict]:
    """A table: all that have the same augmentation, in turn."""
    rows = {each.what: {"what": each.what, "augmentation": each.augmentation} for each in group}
    runs = {}
    for each in group:
        if reason := missing(each, setting):
            rows[each.what]["note"] = reason
        else:
            runs[each.what] = functools.partial(batch_seconds, each.open, lead, num_batches)
    seconds = interleaved(runs, repeats, warm_up=False)  # each run has its own
    for what, times in seconds.items():
        rows[what] |= speeds(num_batches * setting.batch, times) | _compared(what, seconds)
    return list(rows.values())


def _feeds(setting: Setting) -> dict[str, stages.Feed]:
    """Our pipelines that can run here, by what their rows are called, on the recipe without repeats."""
    plan = _plan(setting, RECIPE, repeats=1)
    size, prefetch = plan.global_batch, DataConfig().prefetch
    per_epoch = [plan.rows(start, start + size) for start in range(0, plan.steps_per_epoch * size, size)]

    def plans(count: int) -> Iterator[BatchPlan]:
        return (
            part for whole in itertools.islice(itertools.cycle(per_epoch), count) for part in whole.split(setting.batch)
        )

    feeds = {}
    for name in ("dali", "torchvision"):
        with contextlib.suppress(UserError):
            pipeline = _opened(setting, name)
            how = (setting.device, plans, _GROUPS, prefetch, setting.workers, setting.decode)
            feeds[_ours_name(name)] = stages.Feed(name, setting.index, pipeline, *how, DataConfig().hw_decoder_load)
    return feeds


def candidates(setting: Setting) -> list[Candidate]:
    """Every loader with every augmentation it has."""
    found = []
    for augmentation in _RANDAUGMENT:
        for name in ("dali", "torchvision"):
            for repeats in (1, 3) if augmentation != EVERY_OP else (1,):
                what = _ours_name(name) + ("" if repeats == 1 else f", repeats {repeats}")
                found.append((what, augmentation, functools.partial(_ours, setting, name, augmentation, repeats)))
        if augmentation != RECIPE:
            randaugment = augmentation == EVERY_OP
            found += [
                ("DALI's own reader", augmentation, functools.partial(_dali, setting, randaugment)),
                ("webdataset + torchvision", augmentation, functools.partial(_webdataset, setting, randaugment)),
            ]
        found.append(("timm", augmentation, functools.partial(_timm, setting, augmentation)))
        if augmentation == BARE:
            found.append(("FFCV", augmentation, functools.partial(_ffcv, setting)))
    return [Candidate(*fields) for fields in found]


def missing(candidate: Candidate, setting: Setting) -> str | None:
    """Why a candidate cannot run here, or None. Takes one batch and looks at its shape."""
    try:
        with closing(candidate.open()) as batches:
            shape = tuple(next(batches).shape)
    except ImportError as error:
        return f"not installed ({error.name})"
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever others raise where they do not work; the rows of the rest are wanted
        return " ".join(f"failed, {type(error).__name__}: {error}".split())[:300]
    channels_last = (setting.batch, SIZE_PX, SIZE_PX, 3)
    assert shape in (channels_last, (setting.batch, 3, SIZE_PX, SIZE_PX)), (candidate, shape)
    return None


def _ours_name(pipeline: str) -> str:
    return {"dali": "ours on DALI", "torchvision": "ours on torchvision"}[pipeline]


def _compared(what: str, seconds: dict[str, list[float]]) -> dict:
    """A row's speed over ours with the same augmentation: on DALI, or on torchvision where DALI cannot run."""
    ours = next((name for name in map(_ours_name, ("dali", "torchvision")) if name in seconds), None)
    return {"ratio": ratio(seconds[ours], seconds[what]), "of": ours} if ours else {}


def batch_seconds(open_batches: Callable[[], Iterator[torch.Tensor]], lead: int, count: int) -> float:
    """Seconds for `count` batches after the first `lead`, by when the loader is running evenly."""
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
    """Start the process that workers are forked from, with what they import: they are there at once then."""
    # the first of them for what the program that was started imports: each worker runs its file once more
    use_short_socket_names()
    multiprocessing.set_forkserver_preload(["tools.benchmark", "timm.data", "torchvision.transforms.v2", "webdataset"])
    forkserver.ensure_running()


# --- the loaders: endless batches of images; closing the iterator ends their threads and processes ---


def _ours(setting: Setting, name: str, augmentation: str, repeats: int) -> Iterator[torch.Tensor]:
    plan, pipeline = _plan(setting, augmentation, repeats), _opened(setting, name)
    plans = (plan.rows(start, start + setting.batch) for start in itertools.count(0, setting.batch))
    with closing(pipeline.batches(plans)) as batches:
        for batch in batches:
            yield batch.images


def _plan(setting: Setting, augmentation: str, repeats: int) -> TrainPlan:
    augment = AugmentConfig(mix_group=setting.batch, repeats=repeats, **_RANDAUGMENT[augmentation])
    return TrainPlan(setting.index, augment, 0, _GROUPS * setting.batch, SIZE_PX, fill=(124, 116, 104))


def _opened(setting: Setting, name: str) -> Pipeline:
    return opened(name, setting.index, device=setting.device, threads=setting.workers, decode=setting.decode)


def _dali(setting: Setting, randaugment: bool) -> Iterator[torch.Tensor]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    on_gpu = setting.device.type == "cuda"

    @pipeline_def(enable_conditionals=True)
    def graph():
        jpeg, _ = fn.readers.webdataset(
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
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        if randaugment:
            images = rand_augment(images, _NUM_OPS, _MAGNITUDE, num_magnitude_bins=_BINS, shape=[SIZE_PX, SIZE_PX])
        return images

    with warnings.catch_warnings(record=True):  # DALI's RandAugment uses what DALI calls deprecated, past any filter
        pipeline = graph(batch_size=setting.batch, num_threads=setting.workers, device_id=0 if on_gpu else None)
        batches = DALIGenericIterator([pipeline], ["images"])  # of unknown size: without end
    for outputs in batches:
        yield outputs[0]["images"]


def _timm(setting: Setting, augmentation: str) -> Iterator[torch.Tensor]:
    from timm.data import create_dataset, create_loader

    batches = create_loader(
        create_dataset("", str(setting.folder)),
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
        batches = batches.loader  # uint8, before the normalisation that is meant for a GPU
    while True:
        for images, _ in batches:
            yield images


def _webdataset(setting: Setting, randaugment: bool) -> Iterator[torch.Tensor]:
    import webdataset

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
    """JPEG bytes -> uint8 [3, SIZE_PX, SIZE_PX] through torchvision's decoder and v2 transforms. RandAugment runs on
    PIL images, where it is faster.
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


def _ffcv(setting: Setting) -> Iterator[torch.Tensor]:
    threads = torch.get_num_threads()  # torch's own, in the whole process: FFCV changes them, even by being imported
    try:
        batches = _open_ffcv(_beton(setting), setting.batch, setting.workers, setting.device)
        while True:
            epoch = iter(batches)
            try:
                for (images,) in epoch:
                    yield images
            finally:  # FFCV's own close() leaves its thread at work, in the next row's time
                epoch.terminate_event.set()
                epoch.join()
                epoch.close()
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _open_ffcv(beton: Path, batch: int, workers: int, device: torch.device) -> Iterable[tuple[torch.Tensor]]:
    """FFCV's loader, an epoch each time it is iterated. Compiled once a process, which takes it seconds."""
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
    """The pictures as FFCV's file, beside their folder. Written once, in a process of its own, which FFCV can fork."""
    import ffcv  # noqa: F401  where it is missing, here is where to notice

    path = setting.folder.parent / "train.beton"
    if not path.exists():
        arguments = (setting.folder, path, setting.workers)
        writer = multiprocessing.get_context(_CLEAN_PROCESSES).Process(target=_write_beton, args=arguments)
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"FFCV cannot write its file (exit code {writer.exitcode}). What it said stands above")
    return path


def _write_beton(folder: Path, path: Path, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    multiprocessing.set_start_method("fork", force=True)  # as FFCV has it; this process has no threads
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=_JPEG_QUALITY), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(ImageFolder(str(folder)))
