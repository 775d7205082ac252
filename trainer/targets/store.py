"""Reads what was recorded for any positions, and finds what is missing or damaged."""

import bisect
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden, is_leftover
from pipelines.dali_probe import DECODE
from pipelines.shards.quarantine import QUARANTINE, read_quarantine
from trainer.targets.header import HEADER_FILE, StoreHeader, read_header
from trainer.targets.pieces import Piece, PieceFile, faults, find_pieces, piece_named

_OTHER_FILES = (HEADER_FILE, QUARANTINE, DECODE)  # A recorder writes them beside the pieces.
_OPEN_FILES = 32  # A global batch lies in one piece, or in as many as processes that divided its rows.


class Coverage:
    """Which pieces have which rows of which steps, by the names of a store's files when this is made.

    Attributes:
      complete: the ranges (first, stop) of steps of which every row is recorded, in order.
    """

    def __init__(self, store: Path, header: StoreHeader):
        pieces = find_pieces(store, header)
        self._global_batch = header.global_batch
        # Between two neighbouring bounds all steps are in the same pieces. A forged name may have any numbers.
        self._bounds = sorted({0, *(step for piece in pieces for step in (piece.first_step, piece.stop_step))})
        self._pieces: list[list[Piece]] = [[] for _ in self._bounds]
        for piece in pieces:
            first, stop = (bisect.bisect_left(self._bounds, step) for step in (piece.first_step, piece.stop_step))
            for found in self._pieces[first:stop]:
                found.append(piece)
        self.complete: list[tuple[int, int]] = []
        for first, stop in itertools.pairwise(self._bounds):
            row = 0
            while found := self.holding(first, row):
                row = found[0].stop_row
            if row == header.global_batch:
                is_next = self.complete and self.complete[-1][1] == first
                self.complete.append((self.complete.pop()[0] if is_next else first, stop))

    def holding(self, step: int, row: int) -> list[Piece]:
        """The pieces that have a row of a step, in the order of their names. Those of two recorders may overlap."""
        found = self._pieces[bisect.bisect_right(self._bounds, step) - 1]
        return [piece for piece in found if piece.first_row <= row < piece.stop_row]

    def missing(self, start_step: int, stop_step: int) -> Iterator[tuple[int, int]]:
        """The ranges (first, stop) of steps in [start_step, stop_step) of which a row is missing, in order."""
        step = start_step
        for first, stop in [*self.complete, (stop_step, stop_step)]:
            if step < min(first, stop_step):
                yield step, min(first, stop_step)
            step = max(step, stop)

    def first_missing(self, start_step: int, stop_step: int) -> int | None:
        """The first step in [start_step, stop_step) of which a row is missing; None where all are recorded."""
        return next((first for first, _ in self.missing(start_step, stop_step)), None)

    @property
    def holes(self) -> list[tuple[int, int]]:
        """The ranges (first, stop) of missing steps in front of steps that are recorded, in order."""
        return list(self.missing(0, self.complete[-1][1] if self.complete else 0))

    def missing_pieces(self, start_step: int, stop_step: int, steps: int) -> list[Piece]:
        """Pieces of all rows for the ranges of `missing`, cut at each multiple of `steps`.

        So all processes record the same pieces, whenever they look.
        """
        return [
            Piece(max(first, block), min(stop, block + steps), 0, self._global_batch)
            for first, stop in self.missing(start_step, stop_step)
            for block in range(first // steps * steps, stop, steps)
        ]


class TeacherStore:
    """A recorded teacher's outputs by position. Safe to call from several threads.

    Args:
      folder: the store. What is recorded later is found by a TeacherStore that is made later.
    Raises:
      UserError: it is no store, or its header is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.codec = self.header.open_codec()
        self.coverage = Coverage(self.folder, self.header)
        # A store may have more pieces than a process may have open files. A file that another thread still reads is
        # closed when that thread is done with it.
        self._open = functools.lru_cache(_OPEN_FILES)(functools.partial(PieceFile, self.folder, self.header))

    def read(self, positions: np.ndarray) -> torch.Tensor:
        """What is stored for positions in any order.

        Args:
          positions: int64 [B].
        Returns:
          uint8 [B, row_bytes], for the codec to decode.
        Raises:
          UserError: a position is not recorded, or what is stored for it is damaged; the file and step are named.
        """
        group, row = np.divmod(positions, self.header.mix_group)
        out = np.empty((len(positions), self.codec.row_bytes), dtype=np.uint8)
        for number in np.unique(group).tolist():
            rows = self.group(*divmod(number * self.header.mix_group, self.header.global_batch))
            wanted = group == number
            out[wanted] = rows[row[wanted]]
        return torch.from_numpy(out)

    def group(self, step: int, row: int) -> np.ndarray:
        """The rows of the mixing group that has a row, from the first piece that holds them intact.

        Returns:
          uint8 [mix_group, row_bytes].
        Raises:
          UserError: no piece holds them, or each that does is damaged there; the first of these is named.
        """
        error = None
        for piece in self.coverage.holding(step, row):
            try:
                return self._open(piece).group(step, row)
            except UserError as damage:
                error = error or damage
        advice = f"To complete the store, {self.header.how_to_add('its missing steps')}"
        raise error or UserError(f"{self.folder}: step {step} is not recorded for row {row}. {advice}")

    def num_quarantined(self) -> int:
        """How many damaged images the recorders have named; the teacher saw them in gray.

        Raises:
          UserError: as `read_quarantine`.
        """
        return len(read_quarantine(self.folder / QUARANTINE))


def verify(store: Path) -> Iterator[str]:
    """Every fault of a store, a line each, in the order of the files' names.

    Every byte of the header and of the pieces is read and compared with its checksum. Hidden files, and what a killed
    or a present recorder leaves behind, are no faults. Which steps are missing is no fault either; see Coverage.
    """
    try:
        header = read_header(store)
    except UserError as error:
        yield str(error)
        return
    for path in sorted(Path(store).iterdir()):
        if path.name in _OTHER_FILES or is_leftover(path.name) or is_hidden(path.name):
            continue
        if piece := piece_named(path.name, header):
            yield from faults(store, header, piece)
        else:
            yield f"{path}: its name is none that a piece of this store can have. Move it away"
