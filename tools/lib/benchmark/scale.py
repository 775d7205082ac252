"""What more of everything costs: training on 1 to 8 ranks, and the plan over up to 14 million samples (planning.py).

Training is on synthetic batches, a student without a teacher, so that nothing but the update and its all-reduce is
measured. The global batch stays the same on any number of ranks, as it does in the recipe, and so does the micro-batch:
with more ranks each has fewer of them. Speed-up and efficiency are over one rank, started without torchrun, from
neighbouring runs. On the CPU every rank has one thread, so that ranks do not share cores.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores
from pipelines.plan.draws import AugmentConfig
from tools.lib.benchmark.planning import SAMPLES, plan_rows
from tools.lib.benchmark.processes import run_training
from tools.lib.common.opening import first_device
from tools.lib.common.timing import interleaved, ratio, speeds

COLUMNS = {
    "what": "what",
    "images_per_s": "images/s",
    "open_s": "open, s",
    "open_min": "min",
    "open_max": "max",
    "plan_ms": "plan 1,024, ms",
    "min": "min",
    "max": "max",
    "ratio": "speed-up",
    "efficiency": "efficiency",
    "memory_mb": "memory, MB",
    "mapped_mb": "mapped, MB",
}
_RANKS = (1, 2, 4, 8)
_STEPS = {"cpu": (2, 10), "cuda": (10, 50)}  # before the time is taken, and while it is


def scale(model: str, batch: int, size: int, repeats: int) -> Iterator[dict]:
    """The rows of both tables."""
    ranks = [number for number in _RANKS if number <= _places()]
    yield from rank_rows(ranks, repeats, model, size, batch)
    yield from plan_rows(SAMPLES, repeats)


def rank_rows(ranks: list[int], repeats: int, model: str, size: int, batch: int) -> list[dict]:
    """Training throughput on each number of ranks; the first is what the others are compared with.

    Raises:
      UserError: the ranks cannot share the global batch in whole groups; or a run failed.
    """
    group = min(AugmentConfig().mix_group, batch // max(ranks))
    if group < 1 or batch % (group * max(ranks)):
        raise UserError(f"--batch is {batch}: {max(ranks)} ranks cannot share it. Use a multiple of {max(ranks)}")
    settings = {
        "data.pipeline": "synthetic",
        "data.image_size": size,
        "augment.mix_group": group,
        "student.name": model,
        "teacher.name": "null",
        "run.global_batch": batch,
    }
    times = interleaved({str(n): functools.partial(_seconds, settings, n) for n in ranks}, repeats, warm_up=False)
    images = batch * _STEPS[first_device().type][1]
    rows = []
    for number, seconds in zip(ranks, times.values(), strict=True):
        speedup = ratio(times[str(ranks[0])], seconds)
        rows.append(
            {
                "what": f"{number} x {first_device().type}",
                "augmentation": f"training {model}, {size} px, global batch {batch}",
                **speeds(images, seconds, 1),
                "ratio": speedup,
                "efficiency": round(speedup * ranks[0] / number, 3),
            }
        )
    return rows


def _seconds(settings: dict, ranks: int) -> float:
    """Of the counted steps of one run; a line of the log waits for the device."""
    lead, steps = _STEPS[first_device().type]
    settings = {**settings, "run.log_every": lead, "run.stop_after_steps": lead + steps}
    environment = {"OMP_NUM_THREADS": "1"} if first_device().type == "cpu" else None
    with tempfile.TemporaryDirectory() as scratch:
        _, lines = run_training(Path(scratch) / "run", settings, ranks=ranks, environment=environment)
    lines = [line for line in lines if line["kind"] == "train"]
    assert (lines[0]["step"], lines[-1]["step"]) == (lead, lead + steps), lines
    return lines[-1]["time"] - lines[0]["time"]


def _places() -> int:
    """How many ranks can have a device, or a core, of their own."""
    return torch.cuda.device_count() or num_cores()
