"""Learning rates of timm 0.5.4's scheduler, stepped as the authors' main() does."""

import arguments
import numpy as np
import torch
from timm.scheduler import create_scheduler


def run(given: dict) -> dict:
    """Return the rate of every epoch, float64 [epochs]."""
    args = arguments.defaults()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, num_epochs = create_scheduler(args, optimizer)
    rates = []
    for epoch in range(num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    return {"rates": np.array(rates)}
