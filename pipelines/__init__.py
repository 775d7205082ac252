"""The augmented dataset as a pure function of the position: a plan in NumPy, and executors that carry it out.

    import pipelines as P

    data = P.open_dataset("OUT")
    plan = P.TrainPlan(data.train, P.AugmentConfig(), seed=0, global_batch=1024)
    print(plan.explain(5))
    images = P.render(plan[0:128], data.train, mixed=True)
    with P.open_pipeline(data.train) as pipeline:
        for batch in pipeline.batches(plan.batches(0, 100)):
            ...

Planning needs NumPy alone: torch is imported when pixels are made.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from pipelines.config import PipelineConfig
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, EvalPlan, TrainPlan
from pipelines.shards.dataset import Dataset, open_dataset

if TYPE_CHECKING:
    from pipelines.batch import Batch, Pipeline
    from pipelines.executors import open_pipeline, resolve_decode, resolve_pipeline
    from pipelines.reference import decode_sample, render

__all__ = [
    "PIXELS_VERSION",
    "AugmentConfig",
    "Batch",
    "BatchPlan",
    "Dataset",
    "EvalPlan",
    "Pipeline",
    "PipelineConfig",
    "TrainPlan",
    "decode_sample",
    "open_dataset",
    "open_pipeline",
    "render",
    "resolve_decode",
    "resolve_pipeline",
]

# OpenMP's threads spin while they wait for each other, by default for so long that a training step beside other work
# is slowed down several times (docs/performance.md). libgomp reads this when torch is imported. Your own choice wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Version of the pixels that an executor makes of a plan. Resuming under another version logs a warning.
PIXELS_VERSION = 1

# The modules that need torch. They are imported when a name of theirs is first asked for.
_NEED_TORCH = ("pipelines.batch", "pipelines.executors", "pipelines.reference")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(importlib.import_module, _NEED_TORCH):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
