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
from pipelines.ops.pil_ops import apply_op, decode, resized_crop
from pipelines.ops.torch_ops import apply_ops
from pipelines.plan import draws, rng
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, EvalPlan, TrainPlan
from pipelines.plan.rng import Stream
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader
from tools.lib.common.hardware import first_device
from tools.lib.common.photos import photographs, write_photographs
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
# Where the sides stand in a simple ratio, many values lie exactly between two levels, and those bits decide.
RESIZE_TIES = Tolerance(max=2, mean=0.06)
TIE_SIZES = (
    (640, 480),
    (480, 480),
    (512, 512),
    (288, 480),
)  # Width and height stand to 384 like 5/3, 5/4, 4/3 and 3/4.
# A level's difference before an operation may become many by it (posterize, solarize, equalize, auto-contrast).
TRAINING, TRAINING_TORCH = Tolerance(max=None, mean=1.5), Tolerance(max=None, mean=0.1)
ROUNDED_ARGUMENTS = Tolerance(max=1)
ROUNDED_LAMBDA = Tolerance(max=1)
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

    def pixels(self, photos: Photos, plan: BatchPlan) -> np.ndarray:
        """The plan carried out: uint8 [B, S, S, 3]."""
        config = PipelineConfig(pipeline=self.pipeline, threads=2, decode=self.decode)
        pipeline = open_pipeline(photos.index, config, device=self.device)
        (batch,) = pipeline.batches([plan])
        return batch.images.cpu().numpy()

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
    for way in ways:
        yield from _attempt("decode", decoding, photos, way)
    for name in INTERPOLATIONS:
        for way in ways:
            yield from _attempt(f"crop + {name} resize", crop_resize, photos, way, size, name)
    for way in ways[:2]:
        yield from _attempt("flip", flip, photos, way, size)
    yield from operations(photos, size)
    for way in ways[:2]:
        yield from _attempt("whole training transform", training, photos, way, size)
    yield from mixing(photos, size)
    for name in INTERPOLATIONS:
        for way in ways[:2]:
            yield from _attempt(f"evaluation, {name}", evaluation, photos, way, name)
            yield from _attempt(f"evaluation, squash, {name}", squashed, photos, way, name)
        yield from ties(f"evaluation, squash, {name}", name)
    for way in ways[:2]:
        yield from _attempt("top-1 of a ResNet-18", top1, photos, way)


def _attempt(name: str, stage: Callable[..., Iterator[Row]], photos: Photos, way: Executor, *arguments) -> list[Row]:
    try:
        return list(stage(name, photos, way, *arguments))
    except UserError as error:  # DALI is not installed, or cannot do this.
        return [not_compared(name, way.name, "timm", str(error))]


def decoding(stage: str, photos: Photos, way: Executor) -> Iterator[Row]:
    """Whole images. DALI's come in square windows that cover the image."""
    tolerance = way.allows(EXACT, EXACT)
    if way.pipeline == "torchvision":
        reader = ShardReader(photos.index)
        ours = [np.asarray(decode(reader.read(np.array([sample]))[0])) for sample in range(len(photos))]
        pairs = zip(ours, map(np.asarray, photos.timms), strict=True)
    else:
        pairs = (pair for sample in range(len(photos)) for pair in _windows(photos, way, sample))
    row = compare(stage, way.name, "timm (PIL)", pairs, tolerance)
    yield dataclasses.replace(row, images=len(photos))


def _windows(photos: Photos, way: Executor, sample: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    whole = np.asarray(photos.timms[sample])
    height, width = whole.shape[:2]
    side = min(height, width)
    corners = [(top, 0) for top in _starts(height, side)] if height > side else [(0, x) for x in _starts(width, side)]
    num = len(corners)
    plan = dataclasses.replace(
        EvalPlan(photos.index, side, 1.0, "bicubic").rows(0, num),
        sample=np.full(num, sample, dtype=np.int32),
        crop=np.array([(*corner, side, side) for corner in corners], dtype=np.int32),
        resize=np.full((num, 2), side, dtype=np.int32),
        window=np.zeros((num, 2), dtype=np.int32),
        valid=np.ones(num, dtype=bool),
    )
    for pixels, (top, left) in zip(way.pixels(photos, plan), corners, strict=True):
        yield pixels, whole[top : top + side, left : left + side]


def _starts(length: int, side: int) -> list[int]:
    return sorted({*range(0, length - side, side), length - side})


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


def crop_resize(stage: str, photos: Photos, way: Executor, size: int, interpolation: str) -> Iterator[Row]:
    """Random resized crops, from the uniforms on: which box, and its pixels."""
    plan = _train_plan(photos, size, flip=0.0, randaugment_ops=0, interpolation=interpolation)
    sample, pairs = _trained(photos, way, plan, steps=8)
    yield from _by_size(stage, photos, way, sample, pairs)


def training(stage: str, photos: Photos, way: Executor, size: int) -> Iterator[Row]:
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


def flip(stage: str, photos: Photos, way: Executor, size: int) -> Iterator[Row]:
    """Flipped crops against timm's flip (torchvision's) of the same crops."""
    plan = _train_plan(photos, size, flip=0.0, randaugment_ops=0).rows(0, len(photos))
    bare = way.pixels(photos, plan)
    flipped = way.pixels(photos, dataclasses.replace(plan, flip=np.ones(len(plan), dtype=bool)))
    expected = [np.asarray(hflip(Image.fromarray(image))) for image in bare]
    yield compare(stage, way.name, "timm (torchvision)", zip(flipped, expected, strict=True), EXACT)


def operations(photos: Photos, size: int) -> Iterator[Row]:
    """Each RandAugment operation at several magnitudes and both signs, from identical crops."""
    plan = _train_plan(photos, size, randaugment_ops=0)
    images = Executor("", "torchvision", CPU).pixels(photos, plan.rows(0, len(photos)))
    on_device = _device_operations()
    unrounded = []
    for op, timms_name in timm_reference.NAMES.items():
        ours, theirs, args = [], [], []
        for magnitude, sign in itertools.product(MAGNITUDES, (-1, 1)):
            arg = timm_reference.planned_argument(op, magnitude, sign)
            timms = timm_reference.operation(op, magnitude, sign, plan.fill)
            float64 = timm_reference.operation(op, magnitude, sign, plan.fill, float32=False)
            for image in map(Image.fromarray, images):
                ours.append(np.asarray(apply_op(image, op, float(arg), plan.fill)))
                theirs.append(np.asarray(timms(image)))
                unrounded.append((theirs[-1], np.asarray(float64(image))))
                args.append(arg)
        name = f"RandAugment: {timms_name.removesuffix('Increasing').removesuffix('Rel')}"
        yield compare(name, "torchvision", "timm", zip(ours, theirs, strict=True), EXACT)
        repeated = np.concatenate([images] * (len(args) // len(images)))
        for way, apply in on_device.items():
            pixels = apply(repeated, np.full((len(args), 1), op, np.uint8), np.array(args)[:, None], plan.fill)
            yield compare(name, way, "timm", zip(pixels, theirs, strict=True), EXACT)
    if not any(KERNEL in way for way in on_device):
        yield not_compared("RandAugment", KERNEL, "timm", "it needs a GPU, or TRITON_INTERPRET=1 and a small --size")
    yield compare("RandAugment: float32 arguments", "timm, rounded", "timm", unrounded, ROUNDED_ARGUMENTS)


def _device_operations() -> dict[str, Callable]:
    """The operations on a batch of pixels: in torch, and the GPU's kernel where it can run."""
    device = first_device()

    def way(kernel: bool) -> Callable:
        def apply(images: np.ndarray, ops: np.ndarray, args: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
            return apply_ops(torch.from_numpy(images).to(device), ops, args, fill, kernel=kernel).cpu().numpy()

        return apply

    kernel_runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    on = "GPU" if device.type == "cuda" else "CPU"
    return {f"torch {on}": way(False), **({f"{KERNEL} {on}": way(True)} if kernel_runs else {})}


def mixing(photos: Photos, size: int) -> Iterator[Row]:
    """Groups mixed as the plan says, from identical crops."""
    plan = _train_plan(photos, size, randaugment_ops=0)
    rows = plan.rows(0, 16 * plan.global_batch)
    images = Executor("", "torchvision", CPU).pixels(photos, rows)
    batch = Batch(
        images=torch.from_numpy(images),
        labels=torch.zeros(len(rows), dtype=torch.int64),
        lam=torch.from_numpy(rows.lam),
        box=torch.from_numpy(rows.box),
        valid=torch.from_numpy(rows.valid),
        position=0,
        mix_group=rows.mix_group,
    )
    ours = mix_pixels(batch).numpy()
    groups = range(0, len(rows), rows.mix_group)
    theirs = [
        timm_reference.mixed(images[i : i + rows.mix_group], float(rows.lam[i]), rows.box[i].tolist()) for i in groups
    ]
    cutmix = rows.box.any(axis=1)
    for name, chosen in (("mixup", ~cutmix), ("CutMix", cutmix)):
        pairs = zip(ours[chosen], np.concatenate(theirs)[chosen], strict=True)
        yield compare(name, "trainer.update.mixing", "timm", pairs, EXACT)
    yield _unrounded_lambda(plan)


def _unrounded_lambda(plan: TrainPlan, num_groups: int = 2000) -> Row:
    """Mixup of every pair of levels by timm with its own lambda, which a plan rounds to float32."""
    uniforms = rng.uniforms(plan.seed, Stream.MIX, 0, num_groups, draws.MIX_DRAWS)
    lam, box = draws.mixes(uniforms, plan.image_size_at(0), plan.augment)
    blended = np.flatnonzero(~box.any(axis=1))
    exact = draws.beta_quantile(uniforms[:, 2], plan.augment.mixup_alpha)
    # [2, 256, 256, 1]: two images in which each of the 65,536 pairs of levels meets
    levels = np.stack(np.meshgrid(np.arange(256), np.arange(256)))[..., None].astype(np.uint8)
    pairs = [
        (_blended(levels, lam[group]), timm_reference.mixed(levels, float(exact[group]), (0, 0, 0, 0)))
        for group in blended
    ]
    row = compare("mixup: float32 lambda", "trainer.update.mixing", "timm, unrounded", pairs, ROUNDED_LAMBDA)
    num_off = sum(int((one != other).sum()) for one, other in pairs)
    num_lambdas = sum(bool((one != other).any()) for one, other in pairs)
    num_values = len(pairs) * levels.size
    note = f"{num_off} of {num_values:,} values differ by one level, with {num_lambdas} of {len(pairs):,} lambdas"
    return dataclasses.replace(row, note=note)


def _blended(images: np.ndarray, lam: np.float32) -> np.ndarray:
    """A group of two images under mixup, by us: uint8 as `images`."""
    batch = Batch(
        images=torch.from_numpy(images),
        labels=torch.zeros(len(images), dtype=torch.int64),
        lam=torch.full((len(images),), float(lam)),
        box=torch.zeros(len(images), 4, dtype=torch.int32),
        valid=torch.ones(len(images), dtype=torch.bool),
        position=0,
        mix_group=len(images),
    )
    return mix_pixels(batch).numpy()


def evaluation(stage: str, photos: Photos, way: Executor, interpolation: str) -> Iterator[Row]:
    """Resize and centre crop of validation."""
    ours = way.pixels(photos, EvalPlan(photos.index, 224, CROP_PCT, interpolation).rows(0, len(photos)))
    timms = timm_reference.timm_transform(
        224, is_training=False, interpolation=interpolation, crop_pct=CROP_PCT, normalize=False
    )
    yield from _evaluated(stage, photos, way, ours, timms)


def squashed(stage: str, photos: Photos, way: Executor, interpolation: str) -> Iterator[Row]:
    """Both sides resized to 384 px, as the models with crop_mode squash have it."""
    ours = way.pixels(photos, EvalPlan(photos.index, 384, 1.0, interpolation, "squash").rows(0, len(photos)))
    how = {"interpolation": interpolation, "crop_pct": 1.0, "crop_mode": "squash", "normalize": False}
    yield from _evaluated(stage, photos, way, ours, timm_reference.timm_transform(384, is_training=False, **how))


def _evaluated(
    stage: str, photos: Photos, way: Executor, ours: np.ndarray, timms: Callable[[Image.Image], torch.Tensor]
) -> Iterator[Row]:
    pairs = [(one, timms(image).permute(1, 2, 0).numpy()) for one, image in zip(ours, photos.timms, strict=True)]
    yield from _by_size(stage, photos, way, np.arange(len(photos)), pairs)


def ties(stage: str, interpolation: str) -> Iterator[Row]:
    """A photograph of each of TIE_SIZES resized to a square of 384 px, for which its sides stand in simple ratios.

    The weights of the filter are then simple fractions, and many sums lie exactly between two levels. Which of the two
    they are rounded to depends on the last bits of the weights, of which torch has 16 and PIL 22.
    """
    resample = Image.Resampling[interpolation.upper()]
    (whole,) = (image for name, image, _ in photographs() if name == "progressive")
    for size in TIE_SIZES:
        image = whole.resize(size, Image.Resampling.LANCZOS)
        ours = resized_crop(np.asarray(image), (0, 0, image.height, image.width), (384, 384), interpolation)
        pairs = [(ours, np.asarray(image.resize((384, 384), resample)))]
        yield compare(f"{stage}, {size[0]} x {size[1]} px", "torchvision", "timm (PIL)", pairs, RESIZE_TIES)


@torch.no_grad()
def top1(stage: str, photos: Photos, way: Executor) -> Iterator[Row]:
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
        unit="logits",
        note=f"logits (standard deviation {theirs.std(1).mean():.2g}); off by > 1: images whose best class differs",
    )
