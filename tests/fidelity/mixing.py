"""Mixed pixels and soft labels equal those of timm's FastCollateMixup, given the same lambda and box.

A plan keeps lambda in float32. timm has it in float64 and rounds lambda and 1 - lambda to float32 apart, so that its
second factor may differ from ours in the last bit, and a pixel that lies between two levels falls on the other one.
Ours stays: another lambda would be another plan, and runs could no longer resume with the same data.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from fidelity.old_timm import theirs
from fidelity.rows import Row, within
from pipelines.batch import Batch
from pipelines.plan import draws, rng
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.rng import Stream
from trainer.update.mixing import mix_pixels, partners

SEED, SIZE, CLASSES = 2, 96, 1000
NUM_MIXUP = 1000
LARGEST_FRACTION = 1e-5  # At most this fraction of the values is off by one level because of lambda.


def rows() -> Iterator[Row]:
    """CutMix and labels of random images; mixup of every pair of levels, under the lambdas of a plan."""
    lam, exact, box = _draws(2 * NUM_MIXUP + 200)
    cutmix = box.any(axis=1)
    names = "mix_pixels", "FastCollateMixup"
    generator = np.random.default_rng(SEED)
    boxes = np.flatnonzero(cutmix)[:8]
    given = {
        "images": generator.integers(0, 256, (len(boxes), 128, 3, SIZE, SIZE), np.uint8),
        "labels": generator.integers(0, CLASSES, (len(boxes), 128)),
        "box": box[boxes],
    }
    (pixels, targets), expected = _both(given, lam[boxes], lam[boxes])
    yield within("CutMix", names, pixels, expected["pixels"])
    yield within("CutMix, soft labels", ("lam, labels, partners", "mixup_target"), targets, expected["targets"], 1e-7)
    blends = np.flatnonzero(~cutmix)[:NUM_MIXUP]
    given = {"images": every_pair()[None], "labels": np.array([[0, 1]]), "box": box[blends]}
    (pixels, targets), expected = _both(given, lam[blends], lam[blends])
    yield within("mixup, our float32 lambda", names, pixels, expected["pixels"])
    (pixels, targets), expected = _both(given, lam[blends], exact[blends])
    yield within("mixup, soft labels", ("lam, labels, partners", "mixup_target"), targets, expected["targets"], 1e-7)
    yield _counted(names, pixels, expected["pixels"])


def every_pair() -> np.ndarray:
    """Two images, uint8 [2, 1, 256, 256]: at each place one of the 65,536 pairs of levels."""
    return np.stack(np.meshgrid(np.arange(256), np.arange(256)))[:, None].astype(np.uint8)


def _draws(num_groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each group of a plan: its lambda (float32), the lambda before rounding (float64), and its box."""
    config = AugmentConfig()
    uniforms = rng.uniforms(SEED, Stream.MIX, 0, num_groups, draws.MIX_DRAWS)
    lam, box = draws.mixes(uniforms, SIZE, config)
    exact = np.where(box.any(axis=1), lam, draws.beta_quantile(uniforms[:, 2], config.mixup_alpha))
    return lam, exact, box.astype(np.int64)


def _both(given: dict, lam: np.ndarray, their_lam: np.ndarray) -> tuple[list[np.ndarray], dict]:
    """Pixels and soft labels of all groups, ours and theirs, under lambdas of either."""
    expected = theirs("mixing", **given, classes=np.array(CLASSES), lam=their_lam.astype(np.float64))
    images, labels = (np.broadcast_to(given[x], (len(lam), *given[x].shape[1:])) for x in ("images", "labels"))
    groups = [_ours(*group) for group in zip(images, labels, lam, given["box"], strict=True)]
    return [np.stack(column) for column in zip(*groups, strict=True)], expected


def _ours(images: np.ndarray, labels: np.ndarray, lam: np.float32, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mixed pixels, uint8 [B, C, S, S], and soft labels, float32 [B, classes], of a group."""
    group, labels = len(images), torch.from_numpy(labels.copy())
    batch = Batch(
        images=torch.from_numpy(images.copy()).permute(0, 2, 3, 1),
        labels=labels,
        lam=torch.full((group,), float(lam)),
        box=torch.from_numpy(box).int().expand(group, 4),
        valid=torch.ones(group, dtype=torch.bool),
        position=0,
        mix_group=group,
    )
    own, other = (functional.one_hot(each, CLASSES).float() for each in (labels, partners(labels, group)))
    targets = batch.lam[:, None] * own + (1.0 - batch.lam[:, None]) * other
    return mix_pixels(batch).permute(0, 3, 1, 2).numpy(), targets.numpy()


def _counted(names: tuple[str, str], ours: np.ndarray, theirs: np.ndarray) -> Row:
    """How many values a lambda in float64 changes."""
    off = np.abs(ours.astype(np.int16) - theirs)
    num_off, largest = int((off > 0).sum()), int(off.max())
    groups = int((off > 0).any(axis=(1, 2, 3, 4)).sum())
    ok = largest <= 1 and num_off <= LARGEST_FRACTION * off.size
    note = f"{num_off} of {off.size:,} values differ by one level, with {groups} of {len(off):,} lambdas"
    allowed = f"1, of {LARGEST_FRACTION:g} of the values"
    return Row("mixup, their float64 lambda", *names, off.size, f"{largest}, of {num_off}", allowed, ok, note)
