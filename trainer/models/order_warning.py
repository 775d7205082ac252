"""Finds out whether a model's outputs are in another order than the dataset's classes, from its confusions."""

import math

import numpy as np

_PER_CLASS = 10  # The check sees this many images of a class on average,
_FEWEST = 200  # but at least this many images in all.
_LEAST = 2  # At least this many images of a class must be taken for the same other one.
_SIGMA = 3  # The excess of wrong classes must be this many standard deviations of chance.


def num_images_needed(num_classes: int) -> int:
    """The number of images that `taken_for` should see."""
    return max(_FEWEST, _PER_CLASS * num_classes)


def taken_for(labels: np.ndarray, best: np.ndarray, num_classes: int) -> list[tuple[int, int]]:
    """Classes that are consistently taken for one other class, as where a model's outputs are in another order.

    At least a third of such a class's images, and more than are found to be of it, are taken for the other one, which
    the model finds in few images but these, its own among them. So a model that gives all images the same class has no
    such pair, and neither has one that confuses two classes with each other.

    Args:
      labels, best: int64 [N], the class of each image and the class that the model finds most likely.
    Returns:
      (class, other class) in the order of the classes; [] where they are fewer than two or than a tenth of the classes
      in `labels`, or could be chance.
    """
    found, counts = np.unique(labels.astype(np.int64) * num_classes + best, return_counts=True)
    label, guess = found // num_classes, found % num_classes
    images, guesses = (np.bincount(values, minlength=num_classes) for values in (labels, best))
    own, times, other = (np.zeros(num_classes, np.int64) for _ in range(3))
    right = label == guess
    own[label[right]] = counts[right]
    rising = np.argsort(counts[~right], kind="stable")  # For equal indices the last value, so the largest count, wins.
    times[label[~right][rising]] = counts[~right][rising]
    other[label[~right][rising]] = guess[~right][rising]
    is_taken = (times >= _LEAST) & (3 * times >= images) & (times > own)
    is_taken &= (2 * times > guesses[other]) & (times > 3 * own[other])  # the other class is taken for a third one
    classes = np.flatnonzero(is_taken)
    excess, noise = (times - own)[classes].sum(), math.sqrt((times + own)[classes].sum())
    if len(classes) < max(2, np.count_nonzero(images) / 10) or excess <= _SIGMA * noise:
        return []
    return [(int(each), int(other[each])) for each in classes]


def order_warning(
    labels: np.ndarray, best: np.ndarray, num_classes: int, names: list[str] | None, model: str, option: str
) -> str:
    """The warning about a model whose outputs seem to be in another order than the dataset's classes; "" for others.

    Args:
      labels, best: as for `taken_for`.
      names: of the dataset's classes; None where they have none.
      model: what it is called; option: the setting that names its outputs.
    """
    pairs = taken_for(labels, best, num_classes)
    if not pairs:
        return ""
    words = names or [str(label) for label in range(num_classes)]
    shown = ", ".join(f"'{words[one][:30]}' for '{words[other][:30]}'" for one, other in pairs[:3])
    return (
        f"{model} consistently takes {len(pairs)} of {num_classes} classes for one other each ({shown}): its outputs "
        f"are probably in another order than the dataset's classes. Name them with {option} FILE, or build the dataset "
        "with its classes in their order (--class-order)"
    )
