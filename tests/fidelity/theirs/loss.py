"""The authors' loss of given logits, its gradient, and what their teacher sees."""

import numpy as np
import torch
from distillation import Teacher, train_epoch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy


class Logits(torch.nn.Module):
    """A student whose parameters are its logits, whatever it sees; the same for a teacher."""

    def __init__(self, values: np.ndarray):
        super().__init__()
        self.values = torch.nn.Parameter(torch.from_numpy(values))
        self.default_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.values


def run(given: dict) -> dict:
    """Return losses float64 [cases], gradients float32 [cases, B, C], teacher_pixels float32 [pairs, n, 3, 1, 1].

    Args:
      given: student and teacher, logits float32 [cases, B, C]; labels int64 [cases, B]; lam float64 [cases]; pixels
        float32 [n, 3, 1, 1] in [0, 1]; mean and std float64 [pairs, 2, 3], of student and teacher.
    """
    losses, gradients = [], []
    for student, teacher, labels, lam in zip(
        given["student"], given["teacher"], given["labels"], given["lam"], strict=True
    ):
        model, classes = Logits(student), student.shape[1]
        targets = mixup_target(torch.from_numpy(labels), classes, float(lam), 0.0, device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        kd = Teacher(Logits(teacher), model.default_cfg)
        pixels = torch.zeros(len(labels), 3, 1, 1)
        losses.append(train_epoch(0, model, [(pixels, targets)], optimizer, SoftTargetCrossEntropy(), kd))
        gradients.append(model.values.grad.numpy().copy())
    seen = [_seen(torch.from_numpy(given["pixels"]), *pair) for pair in zip(given["mean"], given["std"], strict=True)]
    return {"losses": np.array(losses), "gradients": np.stack(gradients), "teacher_pixels": np.stack(seen)}


def _seen(pixels: torch.Tensor, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    student = Logits(np.zeros((1, 1), np.float32))
    student.default_cfg = {"mean": tuple(mean[0].tolist()), "std": tuple(std[0].tolist())}
    teacher = Teacher(student, {"mean": tuple(mean[1].tolist()), "std": tuple(std[1].tolist())})
    shown = (pixels - torch.tensor(mean[0]).float().view(3, 1, 1)) / torch.tensor(std[0]).float().view(3, 1, 1)
    return teacher.normalize_input(shown, student).numpy()
