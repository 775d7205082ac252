"""What models expect of their pixels."""

import dataclasses
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its pixels, from its timm configuration.

    Attributes:
      mean, std: normalisation of RGB in [0, 1].
      interpolation: of the resize in validation, bicubic or bilinear.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    @property
    def fill(self) -> tuple[int, int, int]:
        """The fill colour of geometric augmentation for pixels outside the source image.

        Source: timm.data.transforms_factory, img_mean = min(255, round(255 x mean)).
        """
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue


def timm_config(model: nn.Module) -> dict[str, Any]:
    """A timm model's configuration, which may be changed in place."""
    config: Any = model.pretrained_cfg
    return config


def preprocessing(model: nn.Module) -> Preprocessing:
    """A timm model's preprocessing; bicubic where it names a filter that the pipelines do not have."""
    config = timm_config(model)
    interpolation = config.get("interpolation", "bicubic")
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
    )
