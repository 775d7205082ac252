"""The stages of a run, and how their speeds are measured: in images/s of the global batch.

A stage is a function: called with a number of updates, it works through this rank's part of as many global batches and
returns its seconds. All stages have the same images, in the order of the plan and in complete global batches: the
copies of repeated augmentation lie within one, and only the first of them is decoded.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping

from tools.lib.common.timing import interleaved, timed_on_device
from trainer.cluster.world import World

READING_COLD, READING = "reading, cold", "reading"
DECODING, RESIZING, PIPELINE = "+ decoding", "+ crop, resize, flip", "+ RandAugment: the pipeline"
TO_DEVICE, TEACHER, STUDENT, ALL_REDUCE, STEP = "host to device", "teacher", "student", "all-reduce", "the step"
STORE = "reading the teacher store, cold"
WHOLE = "the whole"
NOTHING = "not-there"  # In this folder of a run another build finds no checkpoint.
_LEAST_UPDATES = 4  # A timed run of fewer shows how the threads that decode happen to fall rather than a speed.

Stage = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images/s of the global batch: the median of the timed runs, the slowest, the fastest."""

    images_per_s: float
    min: float
    max: float


def rates(stages: Mapping[str, Stage], images: int, seconds: float, world: World, repeats: int = 3) -> dict[str, Rate]:
    """Measure the speed of each stage, in turn and after a warm-up. Every rank must call it.

    Args:
      images: how many a global batch has.
      seconds: how long the timed runs of a stage take together, or longer: each makes some updates at least.
    """

    def together(stage: Stage, count: int) -> float:
        world.barrier()
        return max(world.all_gather([stage(count)]))  # The ranks wait for each other in every update.

    counts = {}
    for name, stage in stages.items():
        together(stage, 1)
        counts[name] = max(_LEAST_UPDATES, round(seconds / repeats / together(stage, 1)))
    runs = {name: functools.partial(together, stage, counts[name]) for name, stage in stages.items()}
    found = {}
    for name, times in interleaved(runs, repeats, warm_up=False).items():
        measured = images * counts[name]
        found[name] = Rate(measured / statistics.median(times), measured / max(times), measured / min(times))
    return found


def take(batches: Iterator[object], count: int) -> None:
    """Take `count` batches."""
    for _ in range(count):
        next(batches)


def timed_updates(update: Callable[[], object], count: int) -> float:
    """Seconds for `count` updates, to the end of the device's work."""

    def updates() -> None:
        for _ in range(count):
            update()

    return timed_on_device(updates)()
