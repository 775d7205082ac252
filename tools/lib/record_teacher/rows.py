"""The rows of pieces, and the names of damaged images that go with pieces into another store."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.common.files import split_json_lines
from trainer.monitor.quarantine import is_quarantine_line
from trainer.monitor.run_files import append_synced
from trainer.targets.header import StoreHeader
from trainer.targets.pieces import Piece
from trainer.targets.store import QUARANTINE, PieceFile

_STEPS = 64  # Rows of this many steps are held in memory.


def parts_of(piece: Piece) -> Iterator[Piece]:
    """A piece as pieces of at most 64 steps, which is what a recorder writes."""
    for first in range(piece.first_step, piece.stop_step, _STEPS):
        yield dataclasses.replace(piece, first_step=first, stop_step=min(first + _STEPS, piece.stop_step))


def read_rows(store: Path, header: StoreHeader, piece: Piece, part: Piece) -> np.ndarray:
    """The rows of one of `parts_of` a piece: uint8 [steps, rows, row_bytes].

    Raises:
      UserError: a group does not have its checksum, or the file is damaged in another way.
    """
    file = PieceFile(store, header, piece)  # This comes first, because a forged name may ask for any memory.
    rows = np.empty((part.num_steps, part.num_rows, header.open_codec().row_bytes), dtype=np.uint8)
    for step in range(part.num_steps):
        for row in range(0, part.num_rows, header.mix_group):
            rows[step, row : row + header.mix_group] = file.group(part.first_step + step, part.first_row + row)
    return rows


def copy_quarantine(source: Path, target: Path) -> None:
    """Name the damaged images of one store in another one, where they are not named yet."""
    lines = [split_json_lines(store / QUARANTINE, is_quarantine_line)[0] for store in (source, target)]
    missing = [line for line in lines[0] if line not in lines[1]]
    if missing:
        append_synced(target / QUARANTINE, [json.dumps(line).encode() for line in missing])
