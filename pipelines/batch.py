"""The batch: what every pipeline hands to the training step."""

import dataclasses

import numpy as np
import torch

from pipelines.index import ShardIndex
from pipelines.plan import BatchPlan


@dataclasses.dataclass(frozen=True)
class Batch:
    """B consecutive positions, carried out, on the device.

    Attributes:
      images: uint8 [B, S, S, 3], RGB; permuted to [B, 3, S, S] it is channels-last without a copy.
      labels: int64 [B].
      lam: float32 [B], share of the row's own label after mixing.
      box: int32 [B, 4], top, left, height, width of what comes from the partner; empty means mixup.
      valid: bool [B], False for rows that only fill up the batch.
      position: of the first row.
      mix_group: rows that are mixed with each other, partner = the group reversed; 0 where nothing is mixed.
    """

    images: torch.Tensor
    labels: torch.Tensor
    lam: torch.Tensor
    box: torch.Tensor
    valid: torch.Tensor
    position: int
    mix_group: int


def make_batch(images: torch.Tensor, plan: BatchPlan, index: ShardIndex) -> Batch:
    """Pixels and the rest of their plan, on the pixels' device."""

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(images.device, non_blocking=True)

    return Batch(
        images=images,
        labels=on_device(index.samples["label"][plan.sample]),
        lam=on_device(plan.lam),
        box=on_device(plan.box),
        valid=on_device(plan.valid),
        position=plan.position,
        mix_group=plan.mix_group,
    )
