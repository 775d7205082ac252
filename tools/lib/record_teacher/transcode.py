"""Writes a store again in a smaller codec, and measures what that loses on this very store."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError
from tools.lib.common.terminal import tracked
from tools.lib.record_teacher.rows import copy_quarantine, parts_of, read_rows
from trainer.targets.codec import Codec, open_codec
from trainer.targets.header import StoreHeader, check_store_folder, claim, read_header
from trainer.targets.pieces import Piece, find_pieces, write_piece

_NOISE = 1.0  # Standard deviation of the noise on logits; a student of such logits has a KL of about half a nat.


@dataclasses.dataclass
class Loss:
    """What a smaller codec changes, as means over the positions that were compared.

    Attributes:
      num: how many positions were compared.
      kl: KL(before || after), nats.
      uniform, noised: how far the gradient of the distillation, weight x (student - teacher), moves, relative to its
        norm: for a student that gives all classes the same probability, and for the teacher's logits with noise.
      same_top1: fraction of the positions whose best class is the same.
    """

    num: int = 0
    kl: float = 0.0
    uniform: float = 0.0
    noised: float = 0.0
    same_top1: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, seed: int) -> None:
        """Compare decoded logits, float32 [B, C]; `seed` is that of the noise."""
        log_p, log_q = before.log_softmax(1), after.log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)) * _NOISE
        student = (before + noise).softmax(1)
        moved = (q - p).norm(dim=1)
        values = {
            "kl": (p * (log_p - log_q)).sum(1),
            "uniform": moved / (p - 1 / p.shape[1]).norm(dim=1).clamp(min=1e-12),
            "noised": moved / (p - student).norm(dim=1).clamp(min=1e-12),
            "same_top1": (before.argmax(1) == after.argmax(1)).float(),
        }
        total = self.num + len(before)
        for name, value in values.items():
            setattr(self, name, (getattr(self, name) * self.num + value.sum().item()) / total)
        self.num = total


def transcode(store: Path, out: Path, codec_name: str) -> tuple[int, Loss]:
    """Write a store in a smaller codec. Run it again to resume after an interruption.

    Args:
      out: folder of the new store.
    Returns:
      How many pieces were written, and what was lost, measured on the first step of each of them.
    Raises:
      UserError: the codec is not smaller, a piece is damaged, or `out` was made from something else.
    """
    header = read_header(store)
    old, new = header.open_codec(), open_codec(codec_name, header.num_classes)
    if new.row_bytes >= old.row_bytes:
        raise UserError(
            f"--codec {new.name} takes {new.row_bytes:,} bytes a position, and {store} has {old.row_bytes:,} "
            f"({old.name}) for {header.num_classes} classes. Name a codec that takes fewer bytes"
        )
    check_store_folder(out)
    # What a codec has lost stays lost, so the rows are others than those of a recorder with the new codec.
    lossy = header.transcoded_from if old.is_lossless else [*header.transcoded_from, old.name]
    out_header = claim(out, dataclasses.replace(header, codec=new.name, transcoded_from=lossy))
    copy_quarantine(store, out)
    torch.set_num_threads(1)  # Operations on a group are so short that threads would mostly wait for each other.
    loss, written = Loss(), 0
    for piece in tracked(find_pieces(store, header), "transcoding"):
        for part in parts_of(piece):
            if not (out / part.name).exists():
                rows = read_rows(store, header, piece, part)
                written += write_piece(out, out_header, part, _transcoded(rows, header, new, part, loss))
    return written, loss


def _transcoded(rows: np.ndarray, header: StoreHeader, new: Codec, part: Piece, loss: Loss) -> np.ndarray:
    """Rows of a part, uint8 [steps, rows, row_bytes], in another codec. What the first step loses is added."""
    old, encoded = header.open_codec(), np.empty((*rows.shape[:2], new.row_bytes), dtype=np.uint8)
    for step in range(part.num_steps):
        for row in range(0, part.num_rows, header.mix_group):  # One group at a time is decoded, to save memory.
            group = slice(row, row + header.mix_group)
            logits = old.decode(torch.from_numpy(rows[step, group]))
            if not logits.isfinite().all():  # No recorder writes that, and a codec would make it any numbers.
                raise UserError(
                    f"{part.name}: has logits that are not finite at step {part.first_step + step}. Record it again"
                )
            coded = new.encode(logits)
            encoded[step, group] = coded.numpy()
            if step == 0:
                loss.add(logits, new.decode(coded), seed=part.first_step)
    return encoded
