"""Writes a store again in a smaller codec, and measures what that loses on this very store."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError, counted, write_error_line
from tools.lib.common.terminal import tracked
from tools.lib.record_teacher.merge import copy_quarantine
from trainer.targets.codec import Codec, open_codec
from trainer.targets.header import claim
from trainer.targets.pieces import BLOCK_STEPS, Piece, find_pieces, write_piece
from trainer.targets.store import Coverage, TeacherStore

_NOISE = 1.0  # Standard deviation of the noise on logits; a student of such logits has a KL of about half a nat.


def losses(before: torch.Tensor, after: torch.Tensor, seed: int) -> torch.Tensor:
    """Measure what a smaller codec changes.

    Args:
      before, after: decoded logits, float32 [B, C].
      seed: that of the noise.
    Returns:
      float32 [B, 4]: KL(before || after) in nats; how far the gradient of the distillation, weight x (student -
      teacher), moves relative to its norm, for a student that gives all classes the same probability, and for the
      teacher's logits with noise; and 1 where the best class is the same, else 0.
    """
    log_p, log_q = before.log_softmax(1), after.log_softmax(1)
    p, moved = log_p.exp(), (log_q.exp() - log_p.exp()).norm(dim=1)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)) * _NOISE
    gradients = [
        (p - student).norm(dim=1).clamp(min=1e-12) for student in (1 / p.shape[1], (before + noise).softmax(1))
    ]
    same_best = (before.argmax(1) == after.argmax(1)).float()
    return torch.stack([(p * (log_p - log_q)).sum(1), *(moved / each for each in gradients), same_best], dim=1)


def transcode(store: Path, out: Path, codec_name: str) -> tuple[int, str]:
    """Write a store in a smaller codec. Run it again to resume after an interruption.

    Where a piece is damaged, its rows come from another piece that holds them intact, as a run reads them.

    Args:
      out: folder of the new store.
    Returns:
      How many pieces were written, and a sentence about what the codec loses in the first step of each piece; "" for a
      store without pieces.
    Raises:
      UserError: the codec is not smaller, rows are intact in no piece, or `out` was made from something else.
    """
    source = TeacherStore(store)
    header, old = source.header, source.codec
    new = open_codec(codec_name, header.num_classes)
    if new.row_bytes >= old.row_bytes:
        raise UserError(
            f"--codec {new.name} takes {new.row_bytes:,} bytes a position, and {store} has {old.row_bytes:,} "
            f"({old.name}) for {header.num_classes} classes. Name a codec that takes fewer bytes"
        )
    out_header = claim(out, header.transcoded_to(new.name))
    if before := sum(stop - first for first, stop in Coverage(out, out_header).complete):
        write_error_line(f"note: adds to {out}, which has {counted(before, 'step')}")
    copy_quarantine(store, out)
    lost, num, written = torch.zeros(4, dtype=torch.float64), 0, 0
    with _one_thread():
        for piece in tracked(find_pieces(store, header), "transcoding"):
            for first in range(piece.first_step, piece.stop_step, BLOCK_STEPS):  # Their rows are held in memory.
                part = dataclasses.replace(piece, first_step=first, stop_step=min(first + BLOCK_STEPS, piece.stop_step))
                is_there = (out / part.name).exists()
                rows, lost_here = _transcoded(source, part, 1 if is_there else part.num_steps, new)
                lost, num = lost + lost_here.double().sum(0), num + len(lost_here)
                written += not is_there and write_piece(out, out_header, part, rows)
    return written, _sentence(num, *(lost / num).tolist()) if num else ""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch uses one thread. Operations on a group are so short that more would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _transcoded(source: TeacherStore, part: Piece, num_steps: int, new: Codec) -> tuple[np.ndarray, torch.Tensor]:
    """The first steps of a part in another codec, uint8 [num_steps, rows, row_bytes], and the `losses` of the first."""
    encoded, lost = [], []
    for step in range(part.first_step, part.first_step + num_steps):
        for row in range(part.first_row, part.stop_row, source.header.mix_group):
            logits = source.codec.decode(torch.from_numpy(source.group(step, row)))
            if not new.can_encode(logits).all():
                file = source.folder / source.coverage.holding(step, row)[0].name
                where = f"{file}: has logits at step {step} that are {new.refused}"
                raise UserError(f"{where}. Use another codec than {new.name}, or record the step again")
            encoded.append(new.encode(logits))
            if step == part.first_step:
                lost.append(losses(logits, new.decode(encoded[-1]), seed=step))
    return torch.cat(encoded).reshape(num_steps, part.num_rows, -1).numpy(), torch.cat(lost)


def _sentence(num: int, kl: float, uniform: float, noised: float, same_best: float) -> str:
    return (
        f"lost, over {num:,} positions: KL {kl:.2g} nats; gradient moved by {uniform:.2%} (uniform student) and "
        f"{noised:.2%} (the teacher with noise); best class the same in {same_best:.2%}"
    )
