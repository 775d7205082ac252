"""The models of the USI paper: their accuracy, and the arguments with which the installed timm builds them."""

import csv
import dataclasses
import functools
import importlib.resources
import json


@dataclasses.dataclass(frozen=True)
class PaperModel:
    """A row of usi_paper.csv.

    Attributes:
      top1: percent, on ImageNet's validation images of `image_size` pixels; `source` has published it.
      arguments: of timm's function, where the installed timm builds another model under the same name: (name, value).
      parameters: how many the model has.
    """

    name: str
    top1: float
    image_size: int
    source: str
    arguments: tuple[tuple[str, object], ...]
    parameters: int


@functools.cache
def paper_models() -> tuple[PaperModel, ...]:
    """Those that timm has."""
    text = (importlib.resources.files("trainer.config") / "usi_paper.csv").read_text()
    return tuple(
        PaperModel(
            name=row["model"],
            top1=float(row["top1"]),
            image_size=int(row["image_size"]),
            source=row["source"],
            arguments=tuple(json.loads(row["arguments"] or "{}").items()),
            parameters=int(row["parameters"]),
        )
        for row in csv.DictReader(text.splitlines())
        if row["model"]
    )


def paper_arguments(name: str) -> dict:
    """The arguments that give the paper's model of this name; {} where timm's own is the paper's, or not in it."""
    return next((dict(model.arguments) for model in paper_models() if model.name == name), {})
