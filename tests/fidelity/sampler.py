"""Every position has the image of timm's RepeatAugSampler, on 1 to 8 ranks. Validation counts each image once.

Both sides get the plan's permutation of an epoch. A rank of theirs is a group of ours.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from fidelity.old_timm import theirs
from fidelity.rows import Row, within
from pipelines.plan import order
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import EvalPlan, TrainPlan
from pipelines.shards.index import synthetic_index
from trainer.cluster.world import World
from trainer.evaluation.predict import eval_plans

GROUP, RANKS, EPOCH = 128, range(1, 9), 1
REPEATS = {
    "repeated": (3, "RepeatAugSampler"),
    "plain": (1, "DistributedSampler"),
}  # How often each image comes, and theirs.
IMAGENET, SMALL, VALIDATION = 1_281_167, 10_000, 50_000
EPOCHS = [*itertools.product(("repeated", "plain"), (SMALL,), RANKS), ("repeated", IMAGENET, 8)]
VALIDATIONS = [*itertools.product(("ordered",), (VALIDATION, VALIDATION + 1), RANKS)]
COUNTS = np.arange(2048, 40_000, 37)  # numbers of images whose epochs are counted


def rows() -> Iterator[Row]:
    """An epoch on each number of ranks, with repeats and without; how many updates it has; validation."""
    cases = [*EPOCHS, *VALIDATIONS]
    orders = {f"order {n}": order.global_order(0, EPOCH, n, np.arange(n)) for n in {images for _, images, _ in cases}}
    names = [" ".join(map(str, case)) for case in cases]
    found = theirs("sampler", cases=np.array(names), counts=COUNTS, **orders)
    samples = dict(zip(cases, (found[name] for name in names), strict=True))
    yield from _epochs({case: samples[case] for case in EPOCHS})
    yield from _updates(found["lengths"])
    yield from _validations({case: samples[case] for case in VALIDATIONS})


def _epochs(samples: dict[tuple, np.ndarray]) -> Iterator[Row]:
    """The images of every position of an epoch, on all numbers of ranks together."""
    for (kind, images), group in itertools.groupby(samples.items(), lambda item: item[0][:2]):
        pairs = [(ranks, *_epoch(images, ranks, REPEATS[kind][0], dealt)) for (_, _, ranks), dealt in group]
        ours, there = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (1, 2))
        what = f"{images:,} images x {REPEATS[kind][0]}, {_listed([ranks for ranks, *_ in pairs])} ranks"
        yield within(what, ("TrainPlan", REPEATS[kind][1]), ours, there)


def _epoch(images: int, ranks: int, repeats: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images of an epoch, ours and theirs, [updates, ranks, GROUP]; samples: int64 [ranks, samples]."""
    plan = TrainPlan(synthetic_index(images, 10), AugmentConfig(repeats=repeats), 0, GROUP * ranks, 32, (0, 0, 0))
    steps = range(EPOCH * plan.steps_per_epoch, (EPOCH + 1) * plan.steps_per_epoch)
    batches = [plan.rows(step * plan.global_batch, (step + 1) * plan.global_batch).sample for step in steps]
    updates = samples.shape[1] // GROUP  # the authors' loader drops the last partial batch
    # [ranks, updates, GROUP] -> [updates, ranks, GROUP], the order of positions
    dealt = samples[:, : updates * GROUP].reshape(ranks, updates, GROUP).swapaxes(0, 1)
    return np.stack(batches).reshape(-1, ranks, GROUP), dealt


def _updates(lengths: np.ndarray) -> Iterator[Row]:
    """For how many numbers of images an epoch has another number of updates; lengths: int64 [8, counts]."""
    apart = np.stack([np.abs(COUNTS // (GROUP * n) - lengths[n - 1] // GROUP) for n in RANKS])
    names = "steps_per_epoch", "RepeatAugSampler"
    for parity, allowed in ((0, 0), (1, 1)):
        ranks = [n for n in RANKS if n % 2 == parity]
        chosen = apart[[n - 1 for n in ranks]]
        yield Row(
            f"updates an epoch, {_listed(ranks)} ranks, {len(COUNTS):,} numbers of images",
            *(*names, chosen.size, f"{chosen.max()}, in {(chosen > 0).sum()} cases"),
            *("1" if allowed else "equal", bool(chosen.max() <= allowed)),
            "theirs first rounds the number of images down to a multiple of 256" if allowed else "",
        )


def _validations(samples: dict[tuple, np.ndarray]) -> Iterator[Row]:
    """How many images are evaluated twice, on each number of ranks."""
    for images, group in itertools.groupby(samples.items(), lambda item: item[0][1]):
        found = [(ranks, dealt) for (_, _, ranks), dealt in group]
        here = [_evaluated(images, ranks) for ranks, _ in found]
        there = [int((np.bincount(dealt.ravel(), minlength=images) > 1).sum()) for _, dealt in found]
        yield Row(
            f"validation of {images:,} images, {_listed([ranks for ranks, _ in found])} ranks",
            *("eval_plans", "OrderedDistributedSampler", images * len(found)),
            *(f"theirs {_listed(there)} twice", "ours each once", all((seen == 1).all() for seen in here)),
        )


def _evaluated(images: int, ranks: int) -> np.ndarray:
    """How often each image is evaluated here: int64 [images]."""
    plan, seen = EvalPlan(synthetic_index(images, 10), 32, 0.95, "bicubic"), np.zeros(images, np.int64)
    for rank in range(ranks):
        for batch in eval_plans(plan, GROUP, World(rank, ranks, ranks, torch.device("cpu"))):
            np.add.at(seen, batch.sample[batch.valid], 1)
    return seen


def _listed(numbers: list[int]) -> str:
    return "1 to 8" if numbers == list(RANKS) else ", ".join(map(str, numbers))
