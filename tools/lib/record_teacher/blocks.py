"""The pass over blocks of steps: images, the teacher's forward pass, encoded rows, pieces of the store."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.common.errors import UserError, write_error_line
from pipelines.common.launcher import Launch, array_task, launched
from pipelines.ops.mixing import partners
from pipelines.plan.plan import BatchPlan
from tools.lib.common.terminal import Progress
from tools.lib.record_teacher.recording import Recording
from trainer.models.teacher import TeacherCheck, agreement
from trainer.targets.header import StoreHeader
from trainer.targets.pieces import Piece, write_piece
from trainer.update.inputs import teacher_inputs

_SHOWN = 3  # An error names at most this many positions.


def this_process(environment: Mapping[str, str] | None = None) -> Launch:
    """This process among all that record: those of torchrun or srun, those in each task of a job array, or it alone.

    Prints a line about variables of a launcher that are ignored.

    Args:
      environment: os.environ by default.
    """
    this, array = launched(environment), array_task(environment)
    if ignored := array.ignored or (this.ignored if array.size == 1 else ""):
        write_error_line(f"note: {ignored}. torchrun, srun and sbatch --array=0-N start several processes")
    return dataclasses.replace(this, rank=array.rank * this.size + this.rank, size=array.size * this.size)


def in_own_order(blocks: list[Piece], block_steps: int, rank: int, size: int) -> list[Piece]:
    """All missing blocks in the order in which a process takes them, first its own and then those of the others.

    The number of a block decides whose it is, because processes that start at different moments see different lists.
    Its place in the list decides about the order. So what a lost process has left, and others see alike, is divided
    among all. The blocks of others are taken from the last one back, and they themselves begin at the first.
    """

    def key(place: int) -> tuple[bool, int, int]:
        is_own = blocks[place].first_step // block_steps % size == rank
        return not is_own, (place - rank) % size, place if is_own else -place

    return [blocks[place] for place in sorted(range(len(blocks)), key=key)]


def record_blocks(
    recording: Recording,
    store: Path,
    header: StoreHeader,
    blocks: list[Piece],
    *,
    stopped_by: Callable[[], int],
    progress: Progress,
    check: TeacherCheck,
) -> int:
    """Record blocks of steps, each a piece. The host waits for the device once a block.

    While a thread writes one block the device works on the next one. A block that another process has recorded when its
    turn comes is passed over. One that both record is written once. Both make the same of it if both have the same
    `made_with`, and else rows that may differ in the last bits.

    Args:
      header: the store's own, which may have been made with something else.
      blocks: pieces of all rows.
      stopped_by: called before each forward pass; a signal's number other than 0 ends the recording there.
      check: counts what is recorded.
    Returns:
      what `stopped_by` returned last. The block in work is then lost.
    Raises:
      UserError: logits cannot be encoded, too many images are damaged, or a piece cannot be written.
    """
    taken: collections.deque[Piece] = collections.deque()  # The pipeline's thread takes the next one early.
    global_batch = recording.plan.global_batch
    missing = (block for block in blocks if not (store / block.name).exists())
    batches: Any = recording.pipelines.of["train"].batches(_plans(recording, missing, taken))
    written: Future[None] | None = None

    def write(block: Piece, rows: np.ndarray) -> None:
        if write_piece(store, header, block, rows):
            progress.add_bytes(rows.nbytes)
        else:
            progress.add_repeated(block.num_steps)

    with contextlib.closing(batches), ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        try:
            for first_batch in batches:
                block = taken.popleft()
                found = encoded_rows(recording, itertools.chain([first_batch], batches), block, stopped_by, progress)
                if found is None:
                    return stopped_by()
                rows, is_encoded, num_right = (each.cpu().numpy() for each in found)
                _check_encoded(recording, block, is_encoded)
                warning = check.add((num_right / global_batch).tolist(), global_batch)
                for line in filter(None, (recording.pipelines.quarantine.record_new(), warning)):
                    progress.say(line)
                progress.finding = f"teacher's top-1 on mixed images {check.top1:.2%}"
                if written:
                    written.result()
                written = writer.submit(write, block, rows)
        finally:
            if written:
                written.result()
    return 0


def _plans(recording: Recording, blocks: Iterable[Piece], taken: collections.deque[Piece]) -> Iterator[BatchPlan]:
    """All batches of all blocks, each announced in `taken`, so that images of the next block are read ahead."""
    for block in blocks:
        taken.append(block)
        yield from recording.plan.batches(block.first_step, block.stop_step, micro_batch=recording.micro_batch)


@torch.inference_mode()
def encoded_rows(
    recording: Recording, batches: Iterator[Batch], block: Piece, stopped_by: Callable[[], int], progress: Progress
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The encoded rows of a block, which of them the codec could encode, and how many of a step find the label.

    It is None if a signal came.

    Args: as for `record_blocks`.
    Returns:
      uint8 [steps, global batch, row_bytes]; bool [steps, global batch]; and float32 [steps], for how many images the
      teacher's best class is the label with the larger weight. All are on the device, for which nobody has waited.
    """
    teachers, codec, device = recording.teachers, recording.header.open_codec(), recording.rows[0].device
    shape = (block.num_steps, block.num_rows)
    rows = torch.empty((*shape, codec.row_bytes), dtype=torch.uint8, device=device)
    is_encoded = torch.empty(shape, dtype=torch.bool, device=device)
    num_right = torch.zeros(shape[0], device=device)
    for step in range(shape[0]):
        for own in recording.rows:
            if stopped_by():
                return None
            batch = next(batches)
            logits = teachers(teacher_inputs(teachers, batch)).float()
            rows[step].index_copy_(0, own, codec.encode(logits))
            is_encoded[step].index_copy_(0, own, codec.can_encode(logits))
            partner_labels = partners(batch.labels, batch.mix_group)
            num_right[step] += agreement(logits, logits, batch.labels, partner_labels, batch.lam)[0] * len(logits)
        progress.add_step()
    return rows, is_encoded, num_right


def _check_encoded(recording: Recording, block: Piece, is_encoded: np.ndarray) -> None:
    """Raise a UserError that names the samples whose logits the codec cannot encode; it made them any numbers."""
    plan, precision, codec = recording.plan, recording.header.precision, recording.header.open_codec()
    positions = block.first_step * plan.global_batch + np.flatnonzero(~is_encoded)
    if not len(positions):
        return
    samples = [f"{each} ({plan.index.name(int(plan[each].sample[0]))})" for each in positions[:_SHOWN].tolist()]
    advice = "another teacher; this one's precision is fp32 already"
    if precision != "fp32":
        advice = "--teacher.precision fp32 and a new store"
    elif codec.name == "fp16":
        advice = "--codec int8 and a new store"
    raise UserError(
        f"the teacher's outputs are {codec.refused} at {len(positions)} of {is_encoded.size} positions of "
        f"{block.steps}, such as position {' and '.join(samples)}. These steps are not recorded. Use "
        f"{advice}"
    )
