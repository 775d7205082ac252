"""What models make of each image of a split, each counted exactly once on any number of ranks."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from pipelines import Pipeline
from pipelines.batch import Batch
from pipelines.plan.plan import BatchPlan, EvalPlan
from trainer.cluster.world import World
from trainer.evaluation import metrics
from trainer.evaluation.metrics import Predictions
from trainer.models.normalize import Normalize

Classifier = Callable[[torch.Tensor], torch.Tensor]  # normalised images [B, 3, S, S] -> logits [B, C]


def num_eval_batches(images: int, batch: int, world: World) -> int:
    """Of each rank, for a split of so many images."""
    return math.ceil(images / (batch * world.size))


def eval_plans(plan: EvalPlan, batch: int, world: World) -> Iterator[BatchPlan]:
    """This rank's share of a split, `batch` rows at a time; every rank gets as many plans."""
    for step in range(num_eval_batches(len(plan.index), batch, world)):
        start = (step * world.size + world.rank) * batch
        yield plan.rows(start, start + batch)


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
    """Evaluate several weights of one model; arguments as of `predict`. Every rank must call it.

    Returns:
      for each name: top1 and top5 in percent, loss (cross-entropy), images; {} if it was given up. The models' training
      mode is as before.
    """
    training = {name: model.training for name, model in models.items()}
    how = {"batch": batch, "precision": precision, "world": world, "interrupted": interrupted}
    try:
        for model in models.values():
            model.eval()
        found = predict(models, normalize, pipeline, plan, **how)
    finally:  # memory may have been too short, and a smaller micro-batch is tried next
        for name, model in models.items():
            model.train(training[name])
    return {name: metrics.accuracy(predictions) for name, predictions in found.items()}


@torch.no_grad()
def predict(
    models: dict[str, Classifier],
    normalize: Normalize,
    pipeline: Pipeline,
    plan: EvalPlan,
    *,
    batch: int,
    precision: torch.dtype,
    world: World,
    interrupted: Callable[[], bool] = lambda: False,
    shown: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> dict[str, Predictions]:
    """Predictions of every image, in a single pass; the same on every rank. Every rank must call it.

    The host waits for a GPU at the end alone.

    Args:
      models: by name; all normalised alike.
      batch: images a forward pass on each rank.
      interrupted: asked before each batch; True, on all ranks at once, gives it up.
      shown: wraps the batches, with a progress bar for instance.
    Returns:
      by name; {} if it was given up.
    """
    is_valid: list[torch.Tensor] = []
    rows: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in models}
    with contextlib.closing(pipeline.batches(eval_plans(plan, batch, world))) as batches:
        for images in shown(batches):
            if interrupted():
                return {}
            world.heartbeat("evaluation")
            pixels = normalize(images.images)
            for name, model in models.items():
                with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
                    logits = model(pixels)
                rows[name].append(_columns(logits.float(), images))
            is_valid.append(images.valid)
    valid = torch.cat(is_valid).cpu().numpy()  # to choose rows on the device would make the host wait
    found = {}
    for name, parts in rows.items():
        mine = Predictions(*(torch.cat(column).cpu().numpy()[valid] for column in zip(*parts, strict=True)))
        found[name] = metrics.joined(world.all_gather([mine]), len(plan.index))
    return found


def _columns(logits: torch.Tensor, images: Batch) -> tuple[torch.Tensor, ...]:
    """The columns of Predictions for a batch."""
    sample = torch.arange(images.position, images.position + len(logits), device=logits.device)
    top = logits.topk(min(metrics.TOP, logits.shape[1]), dim=1).indices
    confidence = logits.softmax(1).amax(1)
    return sample, images.labels, top, confidence, F.cross_entropy(logits, images.labels, reduction="none")
