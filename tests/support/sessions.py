"""Sessions of a run as Telemetry records them, without a run."""

from pathlib import Path

import torch

from trainer.cluster.world import World
from trainer.monitor.telemetry import Telemetry

ONE = World(0, 1, 1, torch.device("cpu"))
TRAIN = {"epoch": 0, "loss": 2.5, "lr": 1e-3, "images_per_s": 1234.5, "input_wait": 0.25}
EVAL = {"raw": {"top1": 50.0, "top5": 90.0, "loss": 1.5, "images": 96}}


def session(folder: Path, start: int, stop: int, *, world: World = ONE, sinks=()) -> None:
    """A session with a train line after each step and an evaluation after every second one."""
    facts = {"validation": ""}
    telemetry = Telemetry(folder, world, step=start, total_steps=10, steps_per_epoch=2, sinks=sinks, facts=facts)
    with telemetry.live():
        steps(telemetry, start, stop)


def steps(telemetry: Telemetry, start: int, stop: int) -> None:
    """The steps of such a session."""
    for step in range(start + 1, stop + 1):
        telemetry.advance(step)
        telemetry.train({"step": step, **TRAIN})
        if step % 2 == 0:
            telemetry.evaluation(step, EVAL)
