"""Trains any timm classifier with the USI recipe; trainer/run.py is the command.

    from trainer import Config, build, train, load_model

    config = Config.load("configs/usi.yaml", {"student.name": "resnet18", "data.root": "OUT", "run.out": "RUN"})
    summary = train(build(config))
    model = load_model("RUN")

These names are imported when they are first used, so `import trainer` alone needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

import pipelines  # noqa: F401  (It must come before torch: it sets how OpenMP's threads wait.)

if TYPE_CHECKING:
    from trainer.builder import Run, build
    from trainer.config.sections import Config
    from trainer.evaluation.trained import load_model
    from trainer.loop import train

__version__ = "0.1.0"
__all__ = ["Config", "Run", "build", "load_model", "train"]
_MODULES = {
    "Config": "trainer.config.sections",
    "Run": "trainer.builder",
    "build": "trainer.builder",
    "load_model": "trainer.evaluation.trained",
    "train": "trainer.loop",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'trainer' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
