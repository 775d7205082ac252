"""Each stage of a training or validation image's way, held to timm's own code on the same photographs."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset
from torchvision.transforms import functional

from pipelines import PipelineConfig, open_pipeline, resolve_decode
from pipelines.batch import Batch
from pipelines.common.errors import UserError
from pipelines.ops.pil_ops import apply_op, decode
from pipelines.ops.torch_ops import apply_ops
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, EvalPlan, TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader
from tools.lib.common.hardware import first_device
from tools.lib.common.photos import write_photographs
from tools.lib.parity import timm_reference
from tools.lib.parity.rows import EXACT, Row, Tolerance, compare, not_compared
from tools.lib.shards.build import BuildOptions, build
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing
from trainer.update.mixing import mix_pixels

INTERPOLATIONS = ("bicubic", "bilinear")
CROP_PCT = 0.95
MAGNITUDES = (3.0, 7.0, 10.0)
KERNEL = "Triton kernel"
CPU = torch.device("cpu")
hflip: Any = functional.hflip  # It takes PIL images, too.
TINY = "tiny"  # This photograph has 9 x 7 pixels.
# PIL rounds between the two passes of a resize, DALI does not. The difference shows at sharp edges, and where 9 x 7
# pixels are enlarged.
RESIZE, RESIZE_TINY = Tolerance(max=16, mean=0.25), Tolerance(max=16, mean=1.0)
RESIZE_TORCH = Tolerance(max=2, mean=0.02)  # The filter's weights have 16 bits in torch and 22 in PIL.
# A level's difference before an operation may become many by it (posterize, solarize, equalize, auto-contrast).
TRAINING, TRAINING_TORCH = Tolerance(max=None, mean=1.5), Tolerance(max=None, mean=0.1)
GPU_DECODER_MEAN = 2.0  # nvJPEG's chroma upsampling and inverse DCT may add this much.


@dataclasses.dataclass(frozen=True)
class Photos:
    """The photographs as a dataset, and as timm opens their files; equal order."""

    index: ShardIndex
    names: list[str]
    timms: list[Image.Image]

    def __len__(self) -> int:
        return len(self.index)


@dataclasses.dataclass(frozen=True)
class Executor:
    """One of our ways to carry out a plan."""

    name: str
    pipeline: Literal["dali", "torchvision"]
    device: torch.device
    decode: Literal["roi", "full"] = "roi"

    def batch(self, photos: Photos, plan: BatchPlan) -> Batch:
        """The plan carried out."""
        config = PipelineConfig(pipeline=self.pipeline, threads=2, decode=self.decode)
        (batch,) = open_pipeline(photos.index, config, device=self.device).batches([plan])
        return batch

    def pixels(self, photos: Photos, plan: BatchPlan) -> np.ndarray:
        """The plan's images: uint8 [B, S, S, 3]."""
        return self.batch(photos, plan).images.cpu().numpy()

    def allows(self, dali: Tolerance, ours: Tolerance) -> Tolerance:
        """The tolerance: `dali` for DALI, on a GPU with what its decoder adds; `ours` for the CPU pipeline."""
        if self.pipeline == "torchvision":
            return ours
        if self.device.type == "cuda":
            return Tolerance(max=None, mean=GPU_DECODER_MEAN + (dali.mean or 0.0))
        return dali


def executors() -> list[Executor]:
    """The reference, and DALI on the GPU if there is one."""
    device = first_device()
    on = "GPU" if device.type == "cuda" else "CPU"
    return [
        Executor("torchvision", "torchvision", CPU),
        Executor(f"DALI {on}, roi", "dali", device),
        Executor(f"DALI {on}, full", "dali", device, decode="full"),
    ]


def open_photos(folder: Path) -> Photos:
    """Write, convert and open the photographs in an empty folder."""
    write_photographs(folder / "src")
    build(folder / "src", folder / "out", BuildOptions(samples_per_shard=4))
    index = read_index(folder / "out", "train")
    dataset: Any = create_dataset("", str(folder / "src" / "train"))  # timm annotates a union of many types.
    by_name = {Path(dataset.filename(i)).stem: dataset[i][0] for i in range(len(dataset))}
    names = [Path(key.decode()).name for key in index.samples["key"]]
    return Photos(index, names, [by_name[name] for name in names])


def report(photos: Photos, size: int = 224) -> Iterator[Row]:
    """All comparisons, stage by stage, with training images of `size` pixels."""
    ways = executors()
    path, why = resolve_decode(PipelineConfig(), photos.index, ways[1].device)
    if path == "full":
        yield not_compared("decode", ways.pop(1).name, "timm", why)
    yield from _each_way("decode", ways, decoding, photos)
    for name in INTERPOLATIONS:
        yield from _each_way(f"crop + {name} resize", ways, crop_resize, photos, size, name)
    yield from _each_way("flip", ways[:2], flip, photos, size)
    yield from operations(photos, size)
    yield from _each_way("whole training transform", ways[:2], training, photos, size)
    yield from mixing(photos, size)
    for name in INTERPOLATIONS:
        yield from _each_way(f"evaluation, {name}", ways[:2], evaluation, photos, 224, CROP_PCT, name)
        yield from _each_way(f"evaluation, squash, {name}", ways[:2], evaluation, photos, 384, 1.0, name, "squash")
    yield from _each_way("top-1 of a ResNet-18", ways[:2], top1, photos)


def _each_way(name: str, ways: list[Executor], stage: Callable[..., Iterator[Row]], *arguments) -> Iterator[Row]:
    for way in ways:
        try:
            yield from list(stage(name, way, *arguments))
        except (UserError, ImportError) as error:  # DALI is not installed, or cannot do this.
            yield not_compared(name, way.name, "timm", str(error))


def decoding(stage: str, way: Executor, photos: Photos) -> Iterator[Row]:
    """Whole images."""
    encoded = [ShardReader(photos.index).read(np.array([sample]))[0] for sample in range(len(photos))]
    if way.pipeline == "torchvision":
        ours = [np.asarray(decode(jpeg)) for jpeg in encoded]
    else:
        from pipelines.dali import decoded_regions

        crops = [np.array([[0, 0, image.height, image.width]], dtype=np.int32) for image in photos.timms]
        load = PipelineConfig().hw_decoder_load
        ours = [
            decoded_regions(jpeg, crop, way.device, way.decode, load)[0]
            for jpeg, crop in zip(encoded, crops, strict=True)
        ]
    pairs = zip(ours, map(np.asarray, photos.timms), strict=True)
    yield compare(stage, way.name, "timm (PIL)", pairs, way.allows(EXACT, EXACT))


def _train_plan(photos: Photos, size: int, **augment) -> TrainPlan:
    """Every image once a step; timm's default mean as the fill colour."""
    num = len(photos)
    return TrainPlan(photos.index, AugmentConfig(mix_group=num, repeats=1, **augment), 0, num, size, _usual_fill())


@functools.cache
def _usual_fill() -> tuple[int, int, int]:
    return preprocessing(timm.create_model("resnet18")).fill


def _by_size(stage: str, photos: Photos, way: Executor, sample: np.ndarray, pairs: list) -> Iterator[Row]:
    """Two rows: the ordinary photographs, and the one that is enlarged from 9 x 7 pixels."""
    tiny = [photos.names[row] == TINY for row in sample]
    for name, is_tiny, tolerance in ((stage, False, RESIZE), (f"{stage}, 9 x 7 px", True, RESIZE_TINY)):
        chosen = [i for i in range(len(pairs)) if tiny[i] is is_tiny]
        yield compare(
            name, way.name, "timm", [pairs[i] for i in chosen], way.allows(tolerance, RESIZE_TORCH), sample[chosen]
        )


def crop_resize(stage: str, way: Executor, photos: Photos, size: int, interpolation: str) -> Iterator[Row]:
    """Random resized crops, from the uniforms on: which box, and its pixels."""
    plan = _train_plan(photos, size, flip=0.0, randaugment_ops=0, interpolation=interpolation)
    sample, pairs = _trained(photos, way, plan, steps=8)
    yield from _by_size(stage, photos, way, sample, pairs)


def training(stage: str, way: Executor, photos: Photos, size: int) -> Iterator[Row]:
    """The complete training transform, from the uniforms on: crop, resize, flip, RandAugment."""
    plan = _train_plan(photos, size)
    if way.pipeline == "torchvision":
        sample, pairs = _trained(photos, way, plan, steps=16, our_resize=True)
        yield compare(stage, way.name, "timm with our resize", pairs, EXACT, sample)
    sample, pairs = _trained(photos, way, plan, steps=16)
    yield compare(stage, way.name, "timm", pairs, way.allows(TRAINING, TRAINING_TORCH), sample)


def _trained(
    photos: Photos, way: Executor, plan: TrainPlan, steps: int, *, our_resize: bool = False
) -> tuple[np.ndarray, list]:
    rows = plan.rows(0, steps * plan.global_batch)
    timms = timm_reference.TimmTraining(plan, our_resize=our_resize)
    expected = [timms(photos.timms[sample], position) for position, sample in enumerate(rows.sample)]
    return rows.sample, list(zip(way.pixels(photos, rows), expected, strict=True))


def flip(stage: str, way: Executor, photos: Photos, size: int) -> Iterator[Row]:
    """Flipped crops against timm's flip (torchvision's) of the same crops."""
    plan = _train_plan(photos, size, flip=0.0, randaugment_ops=0).rows(0, len(photos))
    bare = way.pixels(photos, plan)
    flipped = way.pixels(photos, dataclasses.replace(plan, flip=np.ones(len(plan), dtype=bool)))
    expected = [np.asarray(hflip(Image.fromarray(image))) for image in bare]
    yield compare(stage, way.name, "timm (torchvision)", zip(flipped, expected, strict=True), EXACT)


def operations(photos: Photos, size: int) -> Iterator[Row]:
    """Each RandAugment operation at several magnitudes and both signs, from identical crops."""
    plan = _train_plan(photos, size, randaugment_ops=0)
    images = executors()[0].pixels(photos, plan.rows(0, len(photos)))
    device = first_device()
    on = "GPU" if device.type == "cuda" else "CPU"
    kernels = {f"torch {on}": False}
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        kernels[f"{KERNEL} {on}"] = True
    else:
        yield not_compared("RandAugment", KERNEL, "timm", "it needs a GPU, or TRITON_INTERPRET=1 and a small --size")
    for op, timms_name in timm_reference.NAMES.items():
        ours, theirs, args = [], [], []
        for magnitude, sign in itertools.product(MAGNITUDES, (-1, 1)):
            arg = timm_reference.planned_argument(op, magnitude, sign)
            timms = timm_reference.operation(op, magnitude, sign, plan.fill)
            for image in map(Image.fromarray, images):
                ours.append(np.asarray(apply_op(image, op, float(arg), plan.fill)))
                theirs.append(np.asarray(timms(image)))
                args.append(arg)
        name = f"RandAugment: {timms_name.removesuffix('Increasing').removesuffix('Rel')}"
        yield compare(name, "torchvision", "timm", zip(ours, theirs, strict=True), EXACT)
        repeated = torch.from_numpy(np.concatenate([images] * (len(args) // len(images)))).to(device)
        ops, arguments = np.full((len(args), 1), op, np.uint8), np.array(args)[:, None]
        for way, kernel in kernels.items():
            pixels = apply_ops(repeated, ops, arguments, plan.fill, kernel=kernel).cpu().numpy()
            yield compare(name, way, "timm", zip(pixels, theirs, strict=True), EXACT)


def mixing(photos: Photos, size: int) -> Iterator[Row]:
    """Groups mixed as the plan says, from identical crops."""
    plan = _train_plan(photos, size, randaugment_ops=0)
    rows = plan.rows(0, 16 * plan.global_batch)
    batch = executors()[0].batch(photos, rows)
    images = batch.images.numpy().copy()
    ours = mix_pixels(batch).numpy()
    groups = range(0, len(rows), rows.mix_group)
    theirs = [
        timm_reference.mixed(images[i : i + rows.mix_group], float(rows.lam[i]), rows.box[i].tolist()) for i in groups
    ]
    cutmix = rows.box.any(axis=1)
    for name, chosen in (("mixup", ~cutmix), ("CutMix", cutmix)):
        pairs = zip(ours[chosen], np.concatenate(theirs)[chosen], strict=True)
        yield compare(name, "trainer.update.mixing", "timm", pairs, EXACT)


def evaluation(
    stage: str, way: Executor, photos: Photos, size: int, crop_pct: float, interpolation: str, mode: str = "center"
) -> Iterator[Row]:
    """Resize and crop of validation."""
    ours = way.pixels(photos, EvalPlan(photos.index, size, crop_pct, interpolation, mode).rows(0, len(photos)))
    how = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": mode, "normalize": False}
    timms = timm_reference.timm_transform(size, is_training=False, **how)
    pairs = [(one, timms(image).permute(1, 2, 0).numpy()) for one, image in zip(ours, photos.timms, strict=True)]
    yield from _by_size(stage, photos, way, np.arange(len(photos)), pairs)


@torch.no_grad()
def top1(stage: str, way: Executor, photos: Photos) -> Iterator[Row]:
    """A model's logits on our evaluation pixels, normalised by us, against timm's transform and normalisation.

    The weights are random, drawn from a fixed seed; BatchNorm takes its statistics from timm's pixels, so that the
    logits of different images differ as a trained model's do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("resnet18")
    config = preprocessing(model)
    timms = timm_reference.timm_transform(224, is_training=False, interpolation=config.interpolation, crop_pct=CROP_PCT)
    expected = torch.stack([timms(image) for image in photos.timms])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # The statistics are then those of this batch.
    model.train()(expected)
    model.eval()
    pixels = way.pixels(photos, EvalPlan(photos.index, 224, CROP_PCT, config.interpolation).rows(0, len(photos)))
    ours = model(Normalize(config.mean, config.std)(torch.from_numpy(pixels)))
    theirs = model(expected)
    off, same = (ours - theirs).abs(), (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    yield Row(
        stage=stage,
        ours=way.name,
        against="timm",
        images=len(photos),
        max=off.max().item(),
        mean=off.mean(1).max().item(),
        off_by_more=1.0 - same,
        tolerance="same class",
        ok=same == 1.0,
        note=f"logits (standard deviation {theirs.std(1).mean():.2g}); off by > 1: images whose best class differs",
    )
