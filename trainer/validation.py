"""Accuracy on the validation set, each image counted exactly once on any number of ranks."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from pipelines import Pipeline
from pipelines.plan import BatchPlan, EvalPlan
from trainer.distributed import World
from trainer.mix import Normalize


def eval_plans(plan: EvalPlan, batch: int, world: World) -> Iterator[BatchPlan]:
    """This rank's share of the validation set, `batch` rows at a time; every rank gets as many plans."""
    per_step = batch * world.size
    for step in range(-(-len(plan.index) // per_step)):
        start = step * per_step + world.rank * batch
        yield plan.rows(start, start + batch)


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    normalize: Normalize,
    pipeline: Pipeline,
    plan: EvalPlan,
    *,
    batch: int,
    precision: torch.dtype,
    world: World,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]]:
    """Evaluate several weights of one model in a single pass over the images. Every rank must call it.

    Args:
      models: by name; all normalised alike. Their training mode is as before afterwards.
      batch: images a forward pass on each rank.
      interrupted: asked before each batch; True, on all ranks at once, gives the evaluation up.
    Returns:
      for each name: top1 and top5 in percent, loss (cross-entropy), images; {} if it was given up.
    """
    training = {name: model.training for name, model in models.items()}
    # correct at 1, correct at 5, sum of losses, images
    sums = {name: torch.zeros(4, dtype=torch.float64, device=world.device) for name in models}
    complete = False
    for model in models.values():
        model.eval()
    with contextlib.closing(pipeline.batches(eval_plans(plan, batch, world))) as batches:
        for images in batches:
            if interrupted():
                break
            world.beat("evaluation")
            pixels = normalize(images.images)
            for name, model in models.items():
                with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
                    logits = model(pixels)
                sums[name] += _counts(logits.float(), images.labels, images.valid)
        else:
            complete = True
    for name, model in models.items():
        model.train(training[name])
    if not complete:
        return {}
    return {name: _metrics(world.sum(total)) for name, total in sums.items()}


def _counts(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    per_image = torch.stack(
        [best[:, 0].double(), best.any(1).double(), losses.double(), torch.ones_like(losses).double()]
    )
    return torch.where(valid, per_image, 0.0).sum(1)


def _metrics(total: torch.Tensor) -> dict[str, float]:
    top1, top5, loss, images = total.tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}
