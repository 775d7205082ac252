"""The EMA of weights and BatchNorm statistics follows timm's ModelEmaV2, and the exact EMA more closely.

Each update of timm's multiplies by the decay and by its complement, both rounded to float32, whose sum is 1 + 5e-9: its
EMA grows by that much with every update. Ours moves by a fraction of the difference, which has no such error.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fidelity.old_timm import theirs
from fidelity.rows import Row, within
from trainer.config.sections import EmaConfig
from trainer.models.ema import ModelEma

UPDATES, SIZE = 2000, 2000
TOLERANCE = 1e-4  # timm's EMA may be off by 2,000 updates x 5e-9 and as many roundings of 6e-8.
EXACT_TOLERANCE = 1e-5


def rows() -> Iterator[Row]:
    """Weights and statistics that walk at random; then the counters of BatchNorm."""
    generator = np.random.default_rng(0)
    steps = generator.normal(scale=1e-2, size=(2, UPDATES + 1, SIZE))
    steps[:, 0] = generator.normal(size=(2, SIZE))
    weights, statistics = steps.cumsum(axis=1).astype(np.float32)
    expected = theirs("ema", weights=weights, statistics=statistics)
    found, counter = _ours(weights, statistics)
    names = "ModelEma", "ModelEmaV2"
    for name, current in (("weights", weights), ("statistics", statistics)):
        exact = _exact(current)
        off = np.abs(expected[name] - exact).max() / np.abs(exact).max()
        note = f"timm's EMA differs from the exact one by {off:.2g} of the largest value"
        yield within(f"{name}, {UPDATES:,} updates", names, found[name], expected[name], TOLERANCE, relative=True)
        with_exact = "ModelEma", "in float64"
        yield within(f"{name}, exactly", with_exact, found[name], exact, EXACT_TOLERANCE, relative=True, note=note)
    apart = f"{counter} and {int(expected['counter'])}"
    note = "theirs stays at 0, because it averages the counter and truncates the result to an integer. Nothing reads it"
    yield Row("counters of BatchNorm", *names, 1, apart, "ours counts", counter == UPDATES, note)


def _ours(weights: np.ndarray, statistics: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """The averages after each update, float32 [updates, n], and the counter at the end."""
    model = torch.nn.BatchNorm1d(SIZE)
    _set(model, weights[0], statistics[0], 0)
    ema, found = ModelEma(model), {"weights": [], "statistics": []}
    for number in range(1, len(weights)):
        _set(model, weights[number], statistics[number], number)
        ema.update(EmaConfig().decay)
        found["weights"].append(ema.module.weight.numpy().copy())
        found["statistics"].append(ema.module.running_mean.numpy().copy())
    return {name: np.stack(values) for name, values in found.items()}, int(ema.module.num_batches_tracked)


def _set(model: torch.nn.BatchNorm1d, weights: np.ndarray, statistics: np.ndarray, number: int) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights))
        model.running_mean.copy_(torch.from_numpy(statistics))
        model.num_batches_tracked.fill_(number)


def _exact(current: np.ndarray) -> np.ndarray:
    """The averages in float64 [updates, n]."""
    decay, average, found = EmaConfig().decay, current[0].astype(np.float64), []
    for values in current[1:]:
        average = decay * average + (1 - decay) * values
        found.append(average)
    return np.stack(found)
