"""Applies models to each image of a split, which counts exactly once on any number of ranks."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipelines import Pipeline
from pipelines.batch import Batch
from pipelines.plan.plan import BatchPlan, EvalPlan
from trainer.cluster.world import World
from trainer.evaluation import metrics
from trainer.evaluation.metrics import Accuracy, Predictions
from trainer.models.normalize import Normalize

Classifier = Callable[[torch.Tensor], torch.Tensor]  # Normalised images [B, 3, S, S] -> logits [B, C].


def num_eval_batches(images: int, batch: int, world: World) -> int:
    """How many batches each rank gets of a split with this many images."""
    return math.ceil(images / (batch * world.size))


def eval_plans(plan: EvalPlan, batch: int, world: World) -> Iterator[BatchPlan]:
    """This rank's slice of a split, `batch` rows at a time; every rank gets the same number of plans."""
    for step in range(num_eval_batches(len(plan.index), batch, world)):
        start = (step * world.size + world.rank) * batch
        yield plan.rows(start, start + batch)


@dataclasses.dataclass(frozen=True)
class EvalPass:
    """A pass over a split. Every rank must make it.

    Attributes:
      normalize: the normalisation of all models that are applied.
      pipeline: carries out `plan`, the images of the split.
      batch: images of a forward pass on each rank.
      precision: of the forward pass; float32 is used without autocast.
    """

    normalize: Normalize
    pipeline: Pipeline
    plan: EvalPlan
    batch: int
    precision: torch.dtype
    world: World

    def accuracy(
        self, models: Mapping[str, nn.Module], interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, Accuracy]:
        """The accuracy of several weights of one model by their names; arguments as for `predict`.

        Returns:
          {} if it was interrupted. The models are in training or evaluation mode as before, also after an error:
          memory may have been too short, and a smaller micro-batch is tried next.
        """
        training = {name: model.training for name, model in models.items()}
        try:
            for model in models.values():
                model.eval()
            found = self.predict(models, interrupted)
        finally:
            for name, model in models.items():
                model.train(training[name])
        return {name: metrics.accuracy(predictions) for name, predictions in found.items()}

    @torch.no_grad()
    def predict(
        self,
        models: Mapping[str, Classifier],
        interrupted: Callable[[], bool] = lambda: False,
        shown: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
    ) -> dict[str, Predictions]:
        """Predictions of every image by each model's name, the same on every rank.

        The host waits for a GPU only at the end.

        Args:
          interrupted: called before each batch; it must return the same on all ranks, and True ends the pass.
          shown: wraps the batches, with a progress bar for instance.
        Returns:
          {} if it was interrupted.
        """
        is_valid: list[torch.Tensor] = []
        columns: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in models}
        plans = eval_plans(self.plan, self.batch, self.world)
        batches: Any = self.pipeline.batches(plans)  # A generator, which Pipeline.batches does not promise.
        with contextlib.closing(batches):
            for images in shown(batches):
                if interrupted():
                    return {}
                self.world.heartbeat("evaluation")
                pixels = self.normalize(images.images)
                for name, model in models.items():
                    columns[name].append(_columns(self._logits(model, pixels), images))
                is_valid.append(images.valid)
        valid = torch.cat(is_valid).cpu().numpy()  # Choosing rows on the device would make the host wait.
        found = {}
        for name, parts in columns.items():
            mine = Predictions(*(torch.cat(column).cpu().numpy()[valid] for column in zip(*parts, strict=True)))
            found[name] = metrics.joined(self.world.all_gather([mine]), len(self.plan.index))
        return found

    def _logits(self, model: Classifier, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, S, S] -> float32 logits [B, C]."""
        with torch.autocast(self.world.device.type, self.precision, enabled=self.precision != torch.float32):
            return model(pixels).float()


def _columns(logits: torch.Tensor, images: Batch) -> tuple[torch.Tensor, ...]:
    """The columns of Predictions for a batch: float32 logits [B, C] -> tensors of B rows."""
    sample = torch.arange(images.position, images.position + len(logits), device=logits.device)
    top = logits.topk(min(metrics.TOP, logits.shape[1]), dim=1).indices
    confidence = logits.softmax(1).amax(1)
    loss = nn.functional.cross_entropy(logits, images.labels, reduction="none")
    return sample, images.labels, top, confidence, loss
