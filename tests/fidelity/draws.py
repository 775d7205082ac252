"""Crops, flips, operations, lambdas and boxes come from the distributions that timm draws from.

The seeds of both sides are fixed, so the p values stay as they are until somebody changes what is drawn.
"""

from collections.abc import Iterator

import numpy as np

from fidelity.old_timm import theirs
from fidelity.rows import Row, alike, as_often
from pipelines.plan import draws, rng
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.rng import Stream
from tools.lib.parity.timm_reference import NAMES

SEED, COUNT, SIDE = 3, 100_000, 224
SIZES = ((375, 500), (500, 333), (100, 900))  # height, width: ImageNet's common ones, and one that needs the fallback
CONFIG = AugmentConfig()


def rows() -> Iterator[Row]:
    """100,000 draws of each kind."""
    drawn = theirs("draws", count=np.array(COUNT), seed=np.array(SEED), sizes=np.array(SIZES), side=np.array(SIDE))
    assert drawn["names"].tolist() == list(NAMES.values())
    yield from _crops(drawn["crops"])
    uniforms = rng.uniforms(SEED, Stream.CROP, 0, COUNT, draws.CROP_DRAWS)
    flips = draws.flips(uniforms, CONFIG)
    names = "augment.flips", "RandomHorizontalFlip"
    yield as_often("flips", names, *(np.bincount(each, minlength=2) for each in (flips, drawn["flips"])))
    yield from _operations(drawn["ops"], drawn["args"])
    yield from _mixes(drawn["cutmix"], drawn["lam"], drawn["box"])


def _crops(drawn: np.ndarray) -> Iterator[Row]:
    """Area, aspect and corner of the crops of images of each size."""
    for number, ((height, width), timms) in enumerate(zip(SIZES, drawn, strict=True)):
        uniforms = rng.uniforms(SEED, Stream.CROP, number * COUNT, (number + 1) * COUNT, draws.CROP_DRAWS)
        ours = draws.resized_crops(uniforms, np.full(COUNT, height), np.full(COUNT, width), CONFIG)
        names = "augment.resized_crops", "RandomResizedCrop…"
        for what, of in {
            "area": lambda box: box[:, 2] * box[:, 3],
            "aspect": lambda box: box[:, 3] / box[:, 2],
            "top": lambda box: box[:, 0],
            "left": lambda box: box[:, 1],
        }.items():
            yield alike(f"crop of {height} x {width} px: {what}", names, of(ours), of(timms))


def _operations(timm_ops: np.ndarray, timm_args: np.ndarray) -> Iterator[Row]:
    """How many operations are applied, which, in which order, and with which arguments."""
    uniforms = rng.uniforms(SEED, Stream.RANDAUGMENT, 0, COUNT, draws.randaugment_draws(CONFIG))
    ops, args = draws.randaugment(uniforms, CONFIG)
    names = "augment.randaugment", "RandAugment"
    counts = [np.bincount((each > 0).sum(axis=1), minlength=3) for each in (ops, timm_ops)]
    yield as_often("operations an image", names, *counts)
    yield as_often(
        "which operation", names, *(np.bincount(each[each > 0], minlength=16)[1:] for each in (ops, timm_ops))
    )
    yield as_often("which pair of two", names, *(_pairs(each) for each in (ops, timm_ops)))
    for op, name in NAMES.items():
        ours, timms = args[ops == op], timm_args[timm_ops == op].astype(np.float32)
        if ours.any():
            yield alike(f"argument of {name}", names, ours, timms)


def _pairs(ops: np.ndarray) -> np.ndarray:
    """How often each ordered pair of operations was applied: [15, 15]."""
    first, second = ops[(ops > 0).all(axis=1)].T.astype(np.int64)
    return np.bincount((first - 1) * 15 + second - 1, minlength=225)


def _mixes(timm_cutmix: np.ndarray, timm_lam: np.ndarray, timm_box: np.ndarray) -> Iterator[Row]:
    """CutMix or mixup, and its lambda or box. A plan calls CutMix with an empty box mixup with lambda 1."""
    uniforms = rng.uniforms(SEED, Stream.MIX, 0, COUNT, draws.MIX_DRAWS)
    lam, box = draws.mixes(uniforms, SIDE, CONFIG)
    timm_box = np.where((timm_cutmix & (timm_box[:, 2:].prod(axis=1) > 0))[:, None], timm_box, 0)
    ours, timms = box[:, 2] > 0, timm_box[:, 2] > 0
    names = "augment.mixes", "FastCollateMixup"
    yield as_often("mixup or CutMix", names, *(np.bincount(each, minlength=2) for each in (ours, timms)))
    blended = ~ours & (lam < 1), ~timms & ~timm_cutmix
    yield alike("lambda of mixup", names, lam[blended[0]], timm_lam[blended[1]].astype(np.float32))
    yield alike("lambda of CutMix", names, lam[ours], timm_lam[timms].astype(np.float32))
    for column, what in enumerate(("top", "left", "height", "width")):
        yield alike(f"CutMix's box: {what}", names, box[ours, column], timm_box[timms, column])
