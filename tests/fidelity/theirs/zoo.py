"""Models of timm 0.5.4, or of the authors' repository where a clone is given: parameters as they begin, and groups."""

import importlib
from collections.abc import Callable

import arguments
import numpy as np
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs


def run(given: dict) -> dict:
    """Return for each model `NAME names`, `NAME shapes` (str), `NAME std`, `NAME mean` (float64), `NAME decay` (bool)
    and `NAME dropout` (float64 []), the largest rate.

    Args:
      given: models str [n]. One that is not there has no arrays.
    """
    found = {}
    library = importlib.import_module("models" if arguments.has_clone() else "timm.models")
    for name in given["models"].tolist():
        torch.manual_seed(0)
        if library.is_model(name):
            found.update(described(name, create(library.create_model, name)))
    return found


def create(create_model: Callable[..., torch.nn.Module], name: str) -> torch.nn.Module:
    """A model as the authors' main() makes it: of its arguments, dropout alone has a default that is not None."""
    try:
        return create_model(name, drop_rate=arguments.defaults().drop)
    except TypeError:  # GhostNet calls it `dropout` in timm 0.5.4, not in the authors' repository
        return create_model(name)


def described(name: str, model: torch.nn.Module) -> dict:
    """The arrays of one model."""
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=arguments.defaults()))
    decays = {id(each): group["weight_decay"] > 0 for group in optimizer.param_groups for each in group["params"]}
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {
        f"{name} names": np.array(names),
        f"{name} shapes": np.array(["x".join(map(str, each.shape)) for each in parameters]),
        f"{name} std": np.array([each.detach().double().std(correction=0).item() for each in parameters]),
        f"{name} mean": np.array([each.detach().double().mean().item() for each in parameters]),
        f"{name} decay": np.array([decays[id(each)] for each in parameters]),
        f"{name} dropout": np.array(largest_dropout(model)),
    }


def largest_dropout(model: torch.nn.Module) -> float:
    """The largest rate of a layer, or of the attribute that a model's forward reads."""
    layers = [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    attributes = [getattr(model, name, None) for name in ("drop_rate", "dropout")]
    return max([0.0, *layers, *(rate for rate in attributes if isinstance(rate, float))])
