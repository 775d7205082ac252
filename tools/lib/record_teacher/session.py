"""The recording of one process: from the settings to its last line."""

import math
import signal
import time
from pathlib import Path

import torch

from pipelines.common.errors import counted, named
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
from trainer.targets.pieces import steps_text
from trainer.targets.store import Coverage

_AGAIN = "Run the same command again to record the rest, the block in work included"
_LESS_MEMORY = (
    "Lower run.eval_batch, which is a recorder's batch, down to 2 (the last bits of the rows may then be others); else "
    "lower data.prefetch"
)


def record(store: Path, settings: list[str], *, codec: str, epochs: int) -> int:
    """Record this process's blocks, with lines about it on stderr.

    Args:
      settings: the words of the training's command line.
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
    with preemption.catching_signals(), reporting_out_of_memory(_LESS_MEMORY):
        recording = build_recording(config, store, codec=codec, epochs=epochs, world=world)
        header = claim(store, recording.header)
        recording.pipelines.keep_decode(store)
        missing = Coverage(store, header).missing_pieces(0, recording.total_steps, recording.block_steps)
        blocks = in_own_order(missing, recording.block_steps, this.rank, this.size)
        num_missing = sum(block.num_steps for block in blocks)
        num_steps, name = math.ceil(num_missing / this.size), f"process {this.rank + 1} of {this.size}"
        progress = Progress(num_steps, recording.plan.global_batch, name)
        for note in recording.teachers.notes:
            progress.say(note)
        if other := header.made_otherwise(recording.header.made_with):
            progress.say(f"{store} {other}")
        progress.say(f"{num_missing:,} of the {counted(recording.total_steps, 'step')} of {store} are to be recorded")
        start_s, check = time.monotonic(), TeacherCheck(recording.plan.index.num_classes)
        with progress.showing():
            stopped_by = lambda: preemption.agree(False).signal  # noqa: E731
            number = record_blocks(
                recording, store, header, blocks, stopped_by=stopped_by, progress=progress, check=check
            )
        took = f"{human_bytes(progress.num_bytes)} recorded in {human_seconds(time.monotonic() - start_s)}"
        if progress.num_repeated:
            took += f"; another process was first with {progress.num_repeated:,} of its {progress.num_steps:,} steps"
        if check.num_images:
            took += f"; the teacher finds the label of {check.top1:.2%} of these {check.num_images:,} mixed images"
        # Others may have found damaged images since this process has recorded its last block.
        if not number and (line := recording.pipelines.quarantine.record_new()):
            progress.say(line)
        ended = f"{signal.Signals(number).name}: stopped" if number else "done"
        progress.say(f"{ended}, {took}; {store} {_held(Coverage(store, header), recording.total_steps)}")
    if number:
        return INTERRUPTED if number == signal.SIGINT else REQUEUE
    return 0


def _held(coverage: Coverage, total_steps: int) -> str:
    """How much of a recording a store has, for its last line; and what is missing in front of steps behind it."""
    left = sum(stop - first for first, stop in coverage.missing(0, total_steps))
    if left:
        return f"lacks {counted(left, 'step')}. {_AGAIN}"
    holes = named((steps_text(*each) for each in coverage.holes), 3)
    beyond = f". It has later steps, too, and lacks {holes} in front of them: --epochs decides how far it is recorded"
    return f"has all {counted(total_steps, 'step')}{beyond if holes else ''}"
