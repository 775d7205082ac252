"""The recording of one process: from the settings to its last line."""

import math
import signal
import time
from pathlib import Path

import torch

from tools.lib.common.terminal import Progress
from tools.lib.common.units import human_bytes, human_seconds
from tools.lib.record_teacher.blocks import in_own_order, record_blocks, this_process
from tools.lib.record_teacher.recording import build_recording
from trainer.cluster.preemption import INTERRUPTED, REQUEUE, Preemption
from trainer.cluster.world import alone
from trainer.config.sections import parse
from trainer.micro_batch import reporting_out_of_memory
from trainer.models.teacher import TeacherCheck
from trainer.targets.header import claim
from trainer.targets.store import Coverage

_AGAIN = "Run the same command again to record the rest, the block in work included"


def record(store: Path, settings: list[str], *, codec: str, epochs: int) -> int:
    """Record this process's blocks, with lines about it on stderr.

    Args:
      settings: of the training, as on its command line.
      codec, epochs: as for `build_recording`.
    Returns:
      the exit code: 0, or that of a run which the same signal has stopped.
    Raises:
      UserError: the settings cannot be recorded, or as `record_blocks`.
    """
    config, this = parse(settings, prog="tools/record_teacher.py"), this_process()
    num_gpus = torch.cuda.device_count() if config.run.device != "cpu" else 0
    # srun may show a task one GPU alone, and processes may outnumber the GPUs: a recording needs no GPU for each.
    world = alone(config.run.device, this.local_rank % max(num_gpus, 1), this.local_size)
    preemption = Preemption(world)
    with preemption.catching_signals(), reporting_out_of_memory():
        recording = build_recording(config, store, codec=codec, epochs=epochs, world=world)
        header = claim(store, recording.header)
        recording.pipelines.keep_decode(store)
        missing = Coverage(store, header).missing_blocks(0, recording.total_steps, recording.block_steps)
        blocks = in_own_order(missing, recording.block_steps, this.rank, this.size)
        num_missing = sum(stop - first for first, stop in blocks)
        num_steps, name = math.ceil(num_missing / this.size), f"process {this.rank + 1} of {this.size}"
        progress = Progress(num_steps, recording.plan.global_batch, name)
        for note in recording.teachers.notes:
            progress.say(note)
        if other := header.made_otherwise(recording.header.made_with):
            rows = "the rows of this process may differ a little from its first ones"
            progress.say(f"{store} was begun with {other}: {rows}")
        progress.say(f"{num_missing:,} of the {recording.total_steps:,} steps of {store} are to be recorded")
        start_s, check = time.monotonic(), TeacherCheck(recording.plan.index.num_classes)
        with progress.showing():
            stopped_by = lambda: preemption.agree(False).signal  # noqa: E731
            number = record_blocks(
                recording, store, header, blocks, stopped_by=stopped_by, progress=progress, check=check
            )
        took = f"{human_bytes(progress.num_bytes)} recorded in {human_seconds(time.monotonic() - start_s)}"
        left = sum(stop - first for first, stop in Coverage(store, header).missing(0, recording.total_steps))
        if check.num_images:
            took += f"; the teacher finds the label of {check.top1:.2%} of these {check.num_images:,} mixed images"
        progress.say(_ending(store, number, took, left, recording.total_steps))
    if number:
        return INTERRUPTED if number == signal.SIGINT else REQUEUE
    return 0


def _ending(store: Path, number: int, took: str, left: int, total_steps: int) -> str:
    """What the last line of a recording says, which the signal of a number ended, or nothing where it is 0."""
    ended = f"{signal.Signals(number).name}: stopped" if number else "done"
    has = f"lacks {left:,} steps. {_AGAIN}" if left else f"has all {total_steps:,} steps"
    return f"{ended}, {took}; {store} {has}"
