"""Real images for tests, benchmarks and demos, which scikit-learn brings along: cuts of its photographs, its digits."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photographs() -> list[tuple[str, Image.Image, dict]]:
    """Name, image and JPEG options of each photograph.

    There are ImageNet-like sizes, tall, wide and tiny ones, grayscale, progressive, and without chroma subsampling.
    """
    china, flower = _pictures()
    return [
        ("usual", china.crop((60, 20, 560, 395)), {}),
        ("flower", flower.crop((100, 30, 600, 405)), {"quality": 85}),
        ("tall", china.crop((200, 0, 300, 420)), {}),
        ("wide", flower.crop((0, 200, 640, 290)), {}),
        ("small", china.resize((64, 48), Image.Resampling.LANCZOS), {}),
        ("tiny", flower.resize((9, 7), Image.Resampling.LANCZOS), {}),
        ("gray", flower.convert("L"), {}),
        ("progressive", china, {"progressive": True}),
        ("full-chroma", flower.crop((37, 11, 401, 318)), {"subsampling": "4:4:4"}),
        ("odd", china.crop((1, 2, 334, 225)), {"subsampling": "4:2:0", "quality": 75}),
    ]


def write_photographs(folder: Path) -> dict[str, Path]:
    """The photographs as JPEGs in FOLDER/train/CLASS, two classes, quality 92 unless their options say otherwise.

    Returns:
      Name -> file, in the order of `photographs`.
    """
    paths = {}
    for i, (name, image, options) in enumerate(photographs()):
        paths[name] = folder / "train" / f"class{i % 2}" / f"{name}.jpg"
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        image.save(paths[name], "JPEG", **{"quality": 92, **options})
    return paths


def write_common_photographs(folder: Path, count: int, classes: int = 10) -> list[Path]:
    """`count` JPEGs of ImageNet's common size (500 x 375, quality 92) in FOLDER/train/CLASS, `classes` of them."""
    digits = max(2, len(str(classes - 1)))  # The classes have one order, as text and by number.
    paths = [folder / "train" / f"class{i % classes:0{digits}d}" / f"{i:06d}.jpg" for i in range(count)]
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    pictures = _pictures()
    for i, path in enumerate(paths):
        left, top = 7 * i % 141, 5 * i % 53
        pictures[i % 2].crop((left, top, left + 499, top + 374)).resize((500, 375)).save(path, quality=92)
    return paths


def _pictures() -> list[Image.Image]:
    """china.jpg and flower.jpg, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


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
