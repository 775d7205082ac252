"""timm 0.5.4's EMA of a model's state."""

import arguments
import numpy as np
import torch
from timm.utils import ModelEmaV2


class State(torch.nn.Module):
    """Stands for a model: weights, running statistics and the counter of a BatchNorm."""

    def __init__(self, weights: np.ndarray, statistics: np.ndarray):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.from_numpy(weights))
        self.register_buffer("statistics", torch.from_numpy(statistics))
        self.register_buffer("counter", torch.tensor(0))


def run(given: dict) -> dict:
    """Return the EMA after each update, float32 [updates, n], and the counter at the end.

    Args:
      given: weights and statistics, float32 [1 + updates, n]: at the start and after each update.
    """
    model = State(given["weights"][0].copy(), given["statistics"][0].copy())
    ema = ModelEmaV2(model, decay=arguments.defaults().model_ema_decay)
    weights, statistics = [], []
    for number, (weight, statistic) in enumerate(
        zip(given["weights"][1:], given["statistics"][1:], strict=True), start=1
    ):
        with torch.no_grad():
            model.weights.copy_(torch.from_numpy(weight))
            model.statistics.copy_(torch.from_numpy(statistic))
            model.counter.fill_(number)
        ema.update(model)
        weights.append(ema.module.weights.detach().numpy().copy())
        statistics.append(ema.module.statistics.numpy().copy())
    return {"weights": np.stack(weights), "statistics": np.stack(statistics), "counter": ema.module.counter.numpy()}
