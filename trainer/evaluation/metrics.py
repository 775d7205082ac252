"""The metrics of an evaluation: pure functions of a model's predictions.

A new metric is a function here and a key of `Accuracy`, where a run logs it, or of `Summary`, where only
tools/evaluate.py reports it.
"""

import dataclasses
from typing import TypedDict

import numpy as np

# The calibration error has this many bins. Source: Guo et al. 2017, arXiv 1706.04599, section 4.
BINS = 15
# This many of the best classes are kept for each image.
TOP = 5


class Accuracy(TypedDict):
    """The metrics that a run logs: top1 and top5 in percent, the mean cross-entropy, and the number of images."""

    top1: float
    top5: float
    loss: float
    images: int


class Summary(Accuracy):
    """The accuracy, and the expected calibration error in percent."""

    ece: float


class RealAccuracy(TypedDict):
    """The accuracy under several labels: top1 in percent, and how many images have a label and count."""

    top1: float
    images: int


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions for N images.

    Attributes:
      sample: int64 [N], row of the ShardIndex; each image once.
      label: int64 [N].
      top: int64 [N, K], the best classes, best first; K is 5, or the number of classes if that is less.
      confidence: float32 [N], probability of the best class.
      loss: float32 [N], cross-entropy with the label.
    """

    sample: np.ndarray
    label: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def correct(self) -> np.ndarray:
        """Bool [N], whether the best class is the label."""
        return self.top[:, 0] == self.label


def joined(parts: list[Predictions], num_samples: int) -> Predictions:
    """Join the predictions of several ranks in the order of the samples; asserts that each sample is there once."""
    columns = [np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(parts[0])]
    order = np.argsort(columns[0], kind="stable")
    assert np.array_equal(columns[0][order], np.arange(num_samples))
    return Predictions(*(column[order] for column in columns))


def accuracy(predictions: Predictions) -> Accuracy:
    """The metrics that a run logs."""
    in_top = (predictions.top == predictions.label[:, None]).any(1)
    return {
        "top1": 100 * float(predictions.correct.mean()),
        "top5": 100 * float(in_top.mean()),
        "loss": float(predictions.loss.mean(dtype=np.float64)),
        "images": len(predictions),
    }


def summary(predictions: Predictions) -> Summary:
    """The metrics that tools/evaluate.py reports."""
    error = calibration_error(predictions.confidence, predictions.correct)
    return {**accuracy(predictions), "ece": 100 * error}


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error: |accuracy - mean confidence| in bins of equal width, weighted by their images.

    Args:
      confidence: [N] in [0, 1]; a bin holds its upper end.
      correct: bool [N].
    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    where = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(where, weights=correct.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def per_class(predictions: Predictions, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, and the fraction of them that is found, NaN without images: int64 and float64 [C]."""
    images = np.bincount(predictions.label, minlength=num_classes)
    hits = np.bincount(predictions.label[predictions.correct], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return images, hits / images


def confusions(predictions: Predictions, label: int, most: int = 3) -> list[tuple[int, float]]:
    """The other classes that images of a class are most often taken for, each with the fraction of its images."""
    taken_for = predictions.top[predictions.label == label, 0]
    counts = np.bincount(taken_for, minlength=label + 1)
    counts[label] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(other), float(counts[other] / len(taken_for))) for other in order if counts[other]]


def real_accuracy(predictions: Predictions, labels: list[list[int]]) -> RealAccuracy:
    """Accuracy where an image may have several labels, or none, and then does not count.

    The best class is right if it is one of the labels.

    Args:
      labels: each sample's; at least one sample has some.
    Source: Beyer et al. 2020, arXiv 2006.07159.
    """
    best = predictions.top[:, 0].tolist()
    hits = [best[row] in labels[sample] for row, sample in enumerate(predictions.sample.tolist()) if labels[sample]]
    return {"top1": 100 * float(np.mean(hits)), "images": len(hits)}
