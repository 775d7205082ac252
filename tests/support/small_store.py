"""A teacher store of a few steps, whose rows are known by their positions."""

from pathlib import Path

import numpy as np

from trainer.targets.header import StoreHeader, TeacherFacts, claim
from trainer.targets.pieces import Piece, write_piece

PLAN = {"seed": 0, "global_batch": 12, "augment.mix_group": 4, "image_size": 32, "fill": (124, 116, 104)}
TEACHER = TeacherFacts("test_resnet", {"drop_rate": 0.0}, 0, "ab" * 32)
HEADER = StoreHeader(PLAN, 5, TEACHER, "int8", "fp32", {"pipeline": "cpu"})
ALL_STEPS = Piece(0, 8, 0, 12)
# Pieces of other widths and heights, with an overlap.
PIECES = (Piece(0, 4, 0, 12), Piece(4, 6, 0, 8), Piece(4, 6, 8, 12), Piece(5, 8, 0, 12))


def rows_of(piece: Piece, header: StoreHeader = HEADER) -> np.ndarray:
    """What a small store has in a piece: uint8 [steps, rows, row_bytes]; the rows of different positions differ."""
    steps = np.arange(piece.first_step, piece.stop_step)[:, None]
    positions = steps * header.global_batch + np.arange(piece.first_row, piece.stop_row)
    row_bytes = header.open_codec().row_bytes
    return ((positions[..., None] * 7 + np.arange(row_bytes) * positions[..., None] // 3) % 256).astype(np.uint8)


def write_small_store(folder: Path, header: StoreHeader = HEADER, pieces: tuple[Piece, ...] = PIECES) -> Path:
    """Write a store of steps [0, 8) and return its folder."""
    stored = claim(folder, header)
    for piece in pieces:
        assert write_piece(folder, stored, piece, rows_of(piece, header))
    return folder
