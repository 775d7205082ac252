"""The pass over blocks of steps: images, the teacher's forward pass, encoded rows, pieces of the store."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.common.errors import UserError, named
from pipelines.ops.mixing import partners
from pipelines.plan.plan import BatchPlan
from tools.lib.common.terminal import Progress
from tools.lib.record_teacher.recording import Recording
from trainer.models.teacher import agreement, num_images_needed, teacher_warning
from trainer.targets.header import StoreHeader
from trainer.targets.pieces import Piece, write_piece
from trainer.update.inputs import teacher_inputs

_SHOWN = 3  # An error names at most this many samples.
Block = tuple[int, int]  # First step and stop step.


def record_blocks(
    recording: Recording,
    store: Path,
    header: StoreHeader,
    blocks: list[Block],
    *,
    stopped_by: Callable[[], int],
    progress: Progress,
) -> int:
    """Record blocks of steps, each into a piece. The host waits for the device once a block.

    While a thread writes one block the device works on the next one.

    Args:
      header: the store's own, which may have been made with something else.
      stopped_by: called before each forward pass; a signal's number other than 0 ends the recording there.
    Returns:
      what `stopped_by` returned last. The block in work is then lost.
    Raises:
      UserError: logits are not finite, too many images are damaged, or a piece cannot be written.
    """
    batches: Any = recording.pipelines.of["train"].batches(_plans(recording, blocks))
    judge = _Judge(recording.plan.index.num_classes)
    written: list[Future[None]] = []

    def write(block: Block, rows: np.ndarray) -> None:
        if write_piece(store, header, Piece(*block, 0, recording.plan.global_batch), rows):
            progress.add_bytes(rows.nbytes)

    with contextlib.closing(batches), ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        try:
            for block in blocks:
                found = encoded_rows(recording, batches, block, stopped_by, progress)
                if found is None:
                    return stopped_by()
                rows, finite, num_right = (each.cpu().numpy() for each in found)
                _check_finite(recording, block, finite)
                if warning := judge.warning(float(num_right), finite.size):
                    progress.say(warning)
                if line := recording.pipelines.quarantine.record_new():
                    progress.say(line)
                if written:
                    written.pop().result()
                written.append(writer.submit(write, block, rows))
        finally:
            if written:
                written.pop().result()
    return 0


def _plans(recording: Recording, blocks: list[Block]) -> Iterator[BatchPlan]:
    """All batches of all blocks, so that images of the next block are read ahead."""
    for first, stop in blocks:
        yield from recording.plan.batches(first, stop, micro_batch=recording.micro_batch)


@torch.inference_mode()
def encoded_rows(
    recording: Recording, batches: Iterator[Batch], block: Block, stopped_by: Callable[[], int], progress: Progress
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The encoded rows of a block, which have finite logits, and how many find the label; None if a signal came.

    Args: as for `record_blocks`.
    Returns:
      uint8 [steps, global batch, row_bytes]; bool [steps, global batch]; and float32 [], the number of images where the
      teacher's best class is the label with the larger weight. All are on the device, for which nobody has waited.
    """
    plan, teachers, codec = recording.plan, recording.teachers, recording.codec
    shape, device = (block[1] - block[0], plan.global_batch), recording.device
    rows = torch.empty((*shape, codec.row_bytes), dtype=torch.uint8, device=device)
    finite = torch.empty(shape, dtype=torch.bool, device=device)
    num_right = torch.zeros((), device=device)
    for step in range(shape[0]):
        for own in recording.rows:
            if stopped_by():
                return None
            batch = next(batches)
            logits = teachers(teacher_inputs(teachers, batch)).float()
            rows[step].index_copy_(0, own, codec.encode(logits))
            finite[step].index_copy_(0, own, logits.isfinite().all(1))
            num_right += _num_right(logits, batch)
        progress.add_step()
    return rows, finite, num_right


def _num_right(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The number of images whose label with the larger weight is the best class of logits [B, C]: float32 []."""
    fractions = agreement(logits, logits, batch.labels, partners(batch.labels, batch.mix_group), batch.lam)
    return fractions[0] * len(logits)


class _Judge:
    """Finds out whether a teacher knows the dataset's classes, before all is recorded."""

    def __init__(self, num_classes: int):
        self._num_classes, self._num_right, self._num_images = num_classes, 0.0, 0

    def warning(self, num_right: float, num_images: int) -> str:
        """Count more images. Returns a warning about the teacher once, when there are enough images; else ""."""
        needed, before = num_images_needed(self._num_classes), self._num_images
        self._num_right += num_right
        self._num_images += num_images
        if not before < needed <= self._num_images:
            return ""
        return teacher_warning(self._num_right / self._num_images, self._num_classes)


def _check_finite(recording: Recording, block: Block, finite: np.ndarray) -> None:
    """Raise a UserError that names the samples whose logits are not finite; a codec would make them any numbers."""
    steps, rows = np.nonzero(~finite)
    if not len(steps):
        return
    plan = recording.plan
    positions = (block[0] + steps) * plan.global_batch + rows
    names = [
        f"position {position} ({plan.index.name(int(plan[position].sample[0]))})"
        for position in positions[:_SHOWN].tolist()
    ]
    names += [""] * (len(positions) - len(names))  # `named` counts those that it does not show.
    precision = recording.header.precision
    advice = (
        "--teacher.precision fp32" if precision != "fp32" else "another teacher; this one's precision is fp32 already"
    )
    raise UserError(
        f"the teacher's outputs are not finite at {len(positions)} of {finite.size} positions of steps {block[0]} to "
        f"{block[1] - 1}: {named(names, _SHOWN)}. These steps are not recorded. Use {advice}"
    )
