"""One epoch of the authors' training: their own train_one_epoch where a clone is given, else the same formulas.

Source: train_one_epoch in train.py and kd/kd_utils.py of Alibaba-MIIL/Solving_ImageNet. The loss is the soft-target
cross-entropy plus alpha_kd times torch's kl_div(log softmax of the student, softmax of the teacher), `batchmean`: the
sum over classes of q (log q - log p), mean over the batch, at temperature 1. The teacher sees the student's pixels,
brought to its own normalisation: divided by std_teacher / std_student, then minus (mean_teacher - mean_student).
"""

import contextlib

import arguments
import torch
from torch.nn import functional
from torchvision.transforms.functional import normalize


class Teacher(torch.nn.Module):
    """A teacher as train_one_epoch uses one: `model`, and `normalize_input(pixels, student)`.

    Args:
      model: gives logits.
      config: its default_cfg, of which mean and std are read.
    """

    def __init__(self, model: torch.nn.Module, config: dict):
        super().__init__()
        self.model = model.eval()
        self.mean_model_kd, self.std_model_kd = config["mean"], config["std"]

    def normalize_input(self, pixels: torch.Tensor, student: torch.nn.Module) -> torch.Tensor:
        """The teacher's pixels from those that are normalised for the student."""
        if arguments.has_clone():
            from kd.kd_utils import build_kd_model

            return build_kd_model.normalize_input(self, pixels, student)
        mean, std = student.default_cfg["mean"], student.default_cfg["std"]
        ratio = [own / other for own, other in zip(self.std_model_kd, std, strict=True)]
        shift = [own - other for own, other in zip(self.mean_model_kd, mean, strict=True)]
        return normalize(normalize(pixels, (0.0,) * 3, ratio), shift, (1.0,) * 3)


def train_epoch(epoch, student, batches, optimizer, loss_fn, teacher, ema=None) -> float:
    """Train on a list of batches (normalised pixels, soft labels) and return the mean loss."""
    if arguments.has_clone():
        import train

        args = arguments.defaults(prefetcher=True, distributed=False, local_rank=1, world_size=1)
        return train.train_one_epoch(
            epoch, student, batches, optimizer, loss_fn, args, model_ema=ema, model_KD=teacher,
            amp_autocast=contextlib.nullcontext,
        )["loss"]  # fmt: skip
    total, alpha = 0.0, arguments.defaults().alpha_kd
    student.train()
    for pixels, targets in batches:
        logits = student(pixels)
        with torch.no_grad():
            expected = functional.softmax(teacher.model(teacher.normalize_input(pixels, student)), dim=-1)
        divergence = functional.kl_div(functional.log_softmax(logits, dim=-1), expected, reduction="batchmean")
        loss = loss_fn(logits, targets) + alpha * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(student)
        total += loss.item() * len(pixels)
    return total / sum(len(pixels) for pixels, _ in batches)
