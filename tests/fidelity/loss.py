"""The loss, its gradient, and the teacher's pixels equal the authors' within float32's rounding.

Where AUTHORS is given, the other side is the authors' own train_one_epoch and kd_utils; elsewhere the same formula in
torch's functions, with timm's soft labels and SoftTargetCrossEntropy.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fidelity.old_timm import authors, theirs
from fidelity.rows import Row, within
from trainer.config.sections import DistillConfig
from trainer.models.normalize import Normalize
from trainer.update.loss import usi_loss
from trainer.update.mixing import partners

BATCH, CLASSES = 128, 1000
SCALES = (0.1, 1.0, 5.0, 20.0)  # standard deviations of the logits
LAMBDAS = (0.0, 0.2, 0.5, 0.837, 1.0)
TOLERANCE = 1e-5  # relative: sums of 1,000 terms in float32
NORMALISATIONS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "Inception's": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
TEACHER = NORMALISATIONS["none"]  # TResNet-L v2 has this one.


def rows() -> Iterator[Row]:
    """Loss and gradient for logits of several scales and lambdas; the teacher's pixels for several students."""
    generator = np.random.default_rng(1)
    cases = [(scale, lam) for scale in SCALES for lam in LAMBDAS]
    scale, lam = (np.array(column) for column in zip(*cases, strict=True))
    logits = generator.normal(size=(2, len(cases), BATCH, CLASSES)) * scale[:, None, None]
    student, teacher = logits.astype(np.float32)
    labels = generator.integers(0, CLASSES, (len(cases), BATCH))
    pixels = generator.integers(0, 256, (1000, 3, 1, 1)).astype(np.float32)
    pairs = np.array([(student, TEACHER) for student in NORMALISATIONS.values()])  # [pairs, 2, mean or std, 3]
    given = {"student": student, "teacher": teacher, "labels": labels, "lam": lam, "pixels": pixels / 255}
    expected = theirs("loss", **given, mean=pairs[:, :, 0], std=pairs[:, :, 1])
    ours = [_ours(*case) for case in zip(student, teacher, labels, lam, strict=True)]
    names = "usi_loss", "train_one_epoch" if authors() else "its formula"
    losses = np.array([loss for loss, _ in ours]) / expected["losses"]
    yield within("loss, divided by theirs", names, losses, np.ones(len(cases)), TOLERANCE)
    gradients = np.stack([gradient for _, gradient in ours])
    yield within("gradient", names, gradients, expected["gradients"], TOLERANCE, relative=True)
    seen = Normalize(*TEACHER)(torch.from_numpy(pixels).permute(0, 2, 3, 1)).numpy()
    for name, found in zip(NORMALISATIONS, expected["teacher_pixels"], strict=True):
        compared = "Normalize", "normalize_input" if authors() else "its formula"
        yield within(f"teacher's pixels, student's normalisation {name}", compared, seen, found, 1e-6)


def _ours(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, lam: float) -> tuple[float, np.ndarray]:
    logits, labels = torch.from_numpy(student).requires_grad_(True), torch.from_numpy(labels)
    lams = torch.full((BATCH,), lam, dtype=torch.float32)
    loss = usi_loss(logits, torch.from_numpy(teacher), labels, partners(labels, BATCH), lams, DistillConfig())
    loss.backward()
    return loss.item(), logits.grad.numpy()
