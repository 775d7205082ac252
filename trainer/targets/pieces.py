"""A store's files: each holds the encoded rows of a rectangle of steps x rows, as safetensors.

    targets   uint8 [steps, rows, row_bytes]
    crc32     uint32 [steps, groups], of the bytes of each mixing group
    metadata  store, codec, first_step, stop_step, first_row, stop_row

The name of a file and the header of its store determine every byte in front of the checksums, and the size. So a reader
expects these bytes instead of parsing them, and nothing that a file claims is believed.
"""

import bisect
import collections
import dataclasses
import json
import re
import zlib
from pathlib import Path

import numpy as np

from pipelines.common.files import write_once
from trainer.targets.header import StoreHeader

_NAME = re.compile(r"(\d{8,10})-(\d{8,10})\.(\d{1,7})-(\d{1,7})\.safetensors", re.ASCII)


@dataclasses.dataclass(frozen=True, order=True)
class Piece:
    """One file: steps [first_step, stop_step), rows [first_row, stop_row) of each global batch."""

    first_step: int
    stop_step: int
    first_row: int
    stop_row: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.first_step:08d}-{self.stop_step:08d}.{self.first_row}-{self.stop_row}.safetensors"

    @property
    def num_steps(self) -> int:
        """How many steps it has."""
        return self.stop_step - self.first_step

    @property
    def num_rows(self) -> int:
        """How many rows of each global batch it has."""
        return self.stop_row - self.first_row

    @staticmethod
    def named(name: str) -> "Piece | None":
        """The piece of a file's name; None for other names."""
        match = _NAME.fullmatch(name)
        piece = Piece(*map(int, match.groups())) if match else None
        return piece if piece is not None and piece.name == name else None

    def fits(self, header: StoreHeader) -> bool:
        """Return whether it has steps, and rows of complete mixing groups within the global batch."""
        group = header.mix_group
        return (
            self.first_step < self.stop_step
            and self.first_row < self.stop_row <= header.global_batch
            and self.first_row % group == self.stop_row % group == 0
        )


def find_pieces(store: Path, header: StoreHeader) -> list[Piece]:
    """The pieces that a store's folder has by their names, in the order of their steps; other names are left out."""
    named = (Piece.named(entry.name) for entry in Path(store).iterdir())
    return sorted(piece for piece in named if piece is not None and piece.fits(header))


def head_of(header: StoreHeader, piece: Piece) -> bytes:
    """What a piece's file begins with, up to the checksums: the head of a safetensors file."""
    num_groups = piece.num_rows // header.mix_group
    row_bytes = header.open_codec().row_bytes
    end_of_sums = 4 * piece.num_steps * num_groups
    end = end_of_sums + piece.num_steps * piece.num_rows * row_bytes
    head = {
        "__metadata__": {
            "store": header.identity,
            "codec": header.codec,
            **{name: str(value) for name, value in vars(piece).items()},
        },
        "crc32": {"dtype": "U32", "shape": [piece.num_steps, num_groups], "data_offsets": [0, end_of_sums]},
        "targets": {
            "dtype": "U8",
            "shape": [piece.num_steps, piece.num_rows, row_bytes],
            "data_offsets": [end_of_sums, end],
        },
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The format aligns the data with spaces.
    return len(text).to_bytes(8, "little") + text


def write_piece(store: Path, header: StoreHeader, piece: Piece, rows: np.ndarray) -> bool:
    """Write a piece, complete or not at all. A piece that is there is kept.

    Args:
      header: as `claim` returned it.
      rows: uint8 [steps, rows, row_bytes], as the codec encodes.
    Returns:
      whether it was written; False where the store has it, for example from another process.
    Raises:
      ValueError: the rows are not those of the piece, or the piece does not fit the store.
      UserError: the storage fails or is full; then no file is left.
    """
    shape = (piece.num_steps, piece.num_rows, header.open_codec().row_bytes)
    if not piece.fits(header) or rows.shape != shape or rows.dtype != np.uint8:
        raise ValueError(f"{piece}: rows are {rows.dtype} {list(rows.shape)}, and the piece takes uint8 {list(shape)}")
    rows = np.ascontiguousarray(rows)
    groups = rows.reshape(piece.num_steps, -1, header.mix_group * shape[2])
    sums = np.array([[zlib.crc32(group) for group in step] for step in groups], dtype="<u4")
    return write_once(Path(store) / piece.name, [head_of(header, piece), sums.tobytes(), rows.data])


class Coverage:
    """Which rows of which steps a store has, by the names of its files when this is made."""

    def __init__(self, store: Path, header: StoreHeader):
        self._global_batch = header.global_batch
        # The pieces of each range of rows. Pieces of two processes may overlap; each step is found in the first one.
        self._stops: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        self._pieces: dict[tuple[int, int], list[Piece]] = collections.defaultdict(list)
        for piece in find_pieces(store, header):
            rows = (piece.first_row, piece.stop_row)
            if not self._stops[rows] or piece.stop_step > self._stops[rows][-1]:
                self._stops[rows].append(piece.stop_step)
                self._pieces[rows].append(piece)

    def find(self, step: int, row: int) -> Piece | None:
        """The piece that has a row of a step; None where that is not recorded."""
        for rows, stops in self._stops.items():
            if rows[0] <= row < rows[1]:
                index = bisect.bisect_right(stops, step)
                if index < len(stops) and self._pieces[rows][index].first_step <= step:
                    return self._pieces[rows][index]
        return None

    def first_missing(self, start_step: int, stop_step: int) -> int | None:
        """The first step in [start_step, stop_step) of which a row is missing; None where all are recorded."""
        step = start_step
        while step < stop_step:
            recorded = self._recorded_until(step)
            if recorded == step:
                return step
            step = recorded
        return None

    def missing_blocks(self, start_step: int, stop_step: int, steps: int = 64) -> list[tuple[int, int]]:
        """What is missing in [start_step, stop_step), as ranges (first_step, stop_step).

        No range crosses a multiple of `steps`, so all processes divide the work in the same way, whenever they look.
        """
        missing = []
        step = start_step
        while step < stop_step:
            recorded = self._recorded_until(step)
            if recorded > step:
                step = recorded
                continue
            first, end_of_block = step, min(stop_step, (step // steps + 1) * steps)
            while step < end_of_block and self._recorded_until(step) == step:
                step += 1
            missing.append((first, step))
        return missing

    def _recorded_until(self, step: int) -> int:
        """The step up to which all rows are recorded from `step` on; `step` itself where a row of it is missing."""
        row, until = 0, None
        while row < self._global_batch:
            piece = self.find(step, row)
            if piece is None:
                return step
            row, until = piece.stop_row, piece.stop_step if until is None else min(until, piece.stop_step)
        assert until is not None
        return until
