"""A hundred models train. They have as many parameters as the authors', except those that docs/recipe.md lists."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from fidelity.old_timm import models_of
from fidelity.rows import Row
from fidelity.zoo import MODELS, as_known, both, dropouts
from pipelines.common.errors import UserError
from trainer.config.sections import OptimConfig
from trainer.models.factory import create_model
from trainer.update.optimizer import build_optimizer

SIZES = {"bat_resnext26ts": 256, "halonet26t": 256, "crossvit_9_240": 240}  # px; all others take the recipe's 224
KNOWN = {
    "timm 0.5.4": {"tnt_s_patch16_224"},
    "the authors' models": {"tnt_s_patch16_224", "levit_128s", "levit_384"},
}
# Their own rate here; the authors' command line says 0 for every model. GhostNet of timm 0.5.4 does not take it.
_DROPOUT = {"legacy_seresnet18", "rexnet_100"}
DROPOUT = {"timm 0.5.4": _DROPOUT, "the authors' models": _DROPOUT | {"ghostnet_050", "ghostnet_100"}}


def rows() -> Iterator[Row]:
    """Numbers of parameters, and dropout; then one update of each model."""
    ours, theirs = ({model: sum(each.size for each in of) for model, of in side.items()} for side in both())
    found = {model for model, count in theirs.items() if count != ours[model]}
    shown = [f"{model} ({ours[model]:,}, theirs {theirs[model]:,})" for model in sorted(found)]
    note = ", ".join([*shown, *(f"{model} is not there" for model in MODELS if model not in theirs)])
    names = "timm.create_model", "create_model"
    yield as_known(f"numbers of parameters, {models_of()}", names, len(theirs), found, KNOWN, note)
    ours, theirs = dropouts()
    found = {model for model, rate in theirs.items() if rate != ours[model]}
    note = ", ".join(f"{model} ({ours[model]:g}, theirs {theirs[model]:g})" for model in sorted(found))
    yield as_known("rates of dropout", names, len(theirs), found, DROPOUT, note)
    complaints = {model: complaint for model in MODELS if (complaint := update(model, SIZES.get(model, 224)))}
    note = "; ".join(f"{model}: {complaint}" for model, complaint in complaints.items())
    yield Row(
        *("one update of two images", "create_model, build_optimizer", "", len(MODELS)),
        *(f"{len(MODELS) - len(complaints)} train", "all train", not complaints, note),
    )


def update(name: str, size: int) -> str:
    """Train a model on two random images of `size` pixels. Returns what went wrong; "" if nothing did."""
    torch.manual_seed(0)
    try:
        model = create_model(name, 1000, size, {}).train()
    except UserError as error:
        return str(error)
    optimizer = build_optimizer(model, OptimConfig())
    loss = functional.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 1]))
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if without:
        return f"{len(without)} parameters have no gradient, {without[0]} among them"
    optimizer.step()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return "its weights are not finite after an update"
    return ""
