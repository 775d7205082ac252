"""The USI loss."""

import torch
from torch.nn import functional

from trainer.config.sections import DistillConfig


def usi_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    partner_labels: torch.Tensor,
    lam: torch.Tensor,
    config: DistillConfig,
) -> torch.Tensor:
    """label_weight x cross-entropy with the mixed labels + weight x T^2 x KL(teacher || student), mean over the batch.

    Args:
      student, teacher: logits [B, C]; without a teacher the divergence is left out.
      labels, partner_labels: int64 [B]; the target is lam x one_hot(labels) + (1 - lam) x one_hot(partner_labels),
        of which label_smoothing is spread evenly over all C classes.
      lam: float32 [B].
      config: the weights, the temperature T and the smoothing.
    Returns:
      float32 scalar. A label term of weight 0 is not computed. Computed in float32 whatever the logits' type.
    Source: USI (arXiv 2204.03475), section 3; T^2 as in Hinton et al. 2015.
    """
    student = student.float()
    loss = torch.zeros((), device=student.device)
    if config.label_weight:
        smoothing = config.label_smoothing
        own = functional.cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)
        other = functional.cross_entropy(student, partner_labels, reduction="none", label_smoothing=smoothing)
        loss = config.label_weight * (lam * own + (1.0 - lam) * other).mean()
    if teacher is None:
        return loss
    t = config.temperature
    divergence = functional.kl_div(
        functional.log_softmax(student / t, dim=1),
        functional.log_softmax(teacher.float() / t, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return loss + config.weight * t**2 * divergence
