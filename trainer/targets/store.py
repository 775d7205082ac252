"""Reads what was recorded for any positions, and finds what is missing or damaged."""

import bisect
import collections
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden, is_leftover, read_json_lines
from trainer.targets.header import HEADER, StoreHeader, read_header
from trainer.targets.pieces import Piece, PieceFile, faults, find_pieces, piece_named

QUARANTINE = "quarantine.jsonl"
_LARGEST_QUARANTINE = 1 << 26  # bytes; a line has about 150, and a recorder stops long before half a million.
_OPEN_FILES = 32  # A global batch lies in one piece, or in as many as processes that divided its rows.


class Coverage:
    """Which rows of which steps a store has, by the names of its files when this is made.

    Attributes:
      complete: the ranges (first, stop) of steps of which every row is recorded, in order.
    """

    def __init__(self, store: Path, header: StoreHeader):
        self._global_batch = header.global_batch
        # The pieces of each range of rows. Pieces of two processes may overlap; each step is found in the first one.
        self._pieces: dict[tuple[int, int], list[Piece]] = collections.defaultdict(list)
        bounds = set()
        for piece in find_pieces(store, header):
            bounds.update((piece.first_step, piece.stop_step))
            pieces = self._pieces[piece.first_row, piece.stop_row]
            if not pieces or piece.stop_step > pieces[-1].stop_step:
                pieces.append(piece)
        # Between two neighbouring bounds all steps have the same rows. A forged name may have any numbers.
        self.complete: list[tuple[int, int]] = []
        for first, stop in itertools.pairwise(sorted(bounds)):
            if self._has_all_rows(first):
                is_next = self.complete and self.complete[-1][1] == first
                self.complete.append((self.complete.pop()[0] if is_next else first, stop))

    def find(self, step: int, row: int) -> Piece | None:
        """The piece that has a row of a step; None where that is not recorded."""
        for (first_row, stop_row), pieces in self._pieces.items():
            if first_row <= row < stop_row:
                index = bisect.bisect_right(pieces, step, key=lambda piece: piece.stop_step)
                if index < len(pieces) and pieces[index].first_step <= step:
                    return pieces[index]
        return None

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

    def missing_blocks(self, start_step: int, stop_step: int, steps: int = 64) -> list[tuple[int, int]]:
        """The ranges of `missing`, cut at each multiple of `steps`.

        So all processes divide the work in the same way, whenever they look.
        """
        return [
            (max(first, block), min(stop, block + steps))
            for first, stop in self.missing(start_step, stop_step)
            for block in range(first // steps * steps, stop, steps)
        ]

    def _has_all_rows(self, step: int) -> bool:
        row = 0
        while row < self._global_batch and (piece := self.find(step, row)):
            row = piece.stop_row
        return row == self._global_batch


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
            step, first_row = divmod(number * self.header.mix_group, self.header.global_batch)
            rows = self._open(self._piece(step, first_row)).group(step, first_row)
            wanted = group == number
            out[wanted] = rows[row[wanted]]
        return torch.from_numpy(out)

    def drop_from_cache(self, positions: np.ndarray) -> None:
        """Drop the pieces that hold positions from the page cache, as far as the file system allows it."""
        step, row = np.divmod(np.unique(positions), self.header.global_batch)
        for piece in {self._piece(*each) for each in zip(step.tolist(), row.tolist(), strict=True)}:
            with open(self.folder / piece.name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def num_quarantined(self) -> int:
        """How many damaged images the recorders have named; the teacher saw them in gray.

        Raises:
          UserError: their list is too long to be one.
        """
        path = self.folder / QUARANTINE
        if path.is_file() and path.stat().st_size > _LARGEST_QUARANTINE:
            raise UserError(f"{path}: has more than {_LARGEST_QUARANTINE} bytes, so it is no list of damaged images")
        lines = read_json_lines(path)
        return len({tuple(str(line.get(name)) for name in ("split", "shard", "key", "offset")) for line in lines})

    def _piece(self, step: int, row: int) -> Piece:
        piece = self.coverage.find(step, row)
        if piece is None:
            raise UserError(
                f"{self.folder}: step {step} is not recorded for row {row}. To complete the store, "
                f"{self.header.how_to_complete}"
            )
        return piece


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
        if path.name in (HEADER, QUARANTINE) or is_leftover(path.name) or is_hidden(path.name):
            continue
        if piece := piece_named(path.name, header):
            yield from faults(store, header, piece)
        else:
            yield f"{path}: its name is none that a piece of this store can have. Move it away"
