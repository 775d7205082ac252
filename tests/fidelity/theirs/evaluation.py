"""timm 0.5.4's validation transform of image files."""

import arguments
import numpy as np
from PIL import Image
from timm.data import create_transform


def run(given: dict) -> dict:
    """Return pixels uint8 [files, S, S, 3]; given: files str [n], size, interpolation."""
    transform = create_transform(
        int(given["size"]),
        is_training=False,
        use_prefetcher=True,
        interpolation=str(given["interpolation"]),
        crop_pct=arguments.defaults().crop_pct,
    )
    pixels = [transform(Image.open(path).convert("RGB")) for path in given["files"].tolist()]
    return {"pixels": np.stack(pixels).transpose(0, 2, 3, 1)}
