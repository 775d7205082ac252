"""scikit-learn's handwritten digits as an image folder: a small real dataset that needs no download."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_digits(folder: Path, num_train: int = 1437, num_val: int = 360) -> None:
    """scikit-learn's digits as FOLDER/{train,val}/DIGIT/*.jpg: grayscale JPEGs of 8 x 8 pixels, the same every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    train, val = train_test_split(
        np.arange(len(data.target)), train_size=num_train, test_size=num_val, random_state=0, stratify=data.target
    )
    for split, chosen in (("train", train), ("val", val)):
        for i in chosen:
            path = folder / split / str(data.target[i]) / f"digit-{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            # values 0 to 16 -> 0 to 255
            Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)).save(path, quality=95)
