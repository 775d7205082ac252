"""A store's files: each holds the encoded rows of a rectangle of steps x rows, as safetensors.

    targets   uint8 [steps, rows, row_bytes]
    crc32     uint32 [steps, groups], of the bytes of each mixing group
    metadata  store, codec, first_step, stop_step, first_row, stop_row

The name of a file and the header of its store determine every byte in front of the checksums, and the size. So a reader
expects these bytes instead of parsing them, and nothing that a file claims is believed.
"""

import dataclasses
import json
import os
import re
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.common.errors import UserError, advice_against
from pipelines.common.files import open_regular, write_once
from trainer.targets.header import StoreHeader

BLOCK_STEPS = 64  # The most steps that a recorder writes into a piece: the recipe's have 65 MB with one byte a class.
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

    @property
    def steps(self) -> str:
        """Its steps, for messages."""
        return steps_text(self.first_step, self.stop_step)

    def fits(self, header: StoreHeader) -> bool:
        """Return whether it has steps, and rows of complete mixing groups within the global batch."""
        return (
            self.first_step < self.stop_step
            and self.first_row < self.stop_row <= header.global_batch
            and self.first_row % header.mix_group == self.stop_row % header.mix_group == 0
        )


def steps_text(first: int, stop: int) -> str:
    """The steps [first, stop) for messages: 'step 7' or 'steps 64 to 127'."""
    return f"steps {first} to {stop - 1}" if stop - first > 1 else f"step {first}"


def piece_named(name: str, header: StoreHeader) -> Piece | None:
    """The piece of a file's name; None for a name that no piece of the store has."""
    match = _NAME.fullmatch(name)
    piece = Piece(*map(int, match.groups())) if match else None
    return piece if piece is not None and piece.name == name and piece.fits(header) else None


def find_pieces(store: Path, header: StoreHeader) -> list[Piece]:
    """The pieces that a store's folder has by their names, in the order of their steps; other names are left out."""
    return sorted(filter(None, (piece_named(entry.name, header) for entry in Path(store).iterdir())))


def head_of(header: StoreHeader, piece: Piece) -> bytes:
    """What a piece's file begins with, up to the checksums: the head of a safetensors file."""
    groups, row_bytes = piece.num_rows // header.mix_group, header.open_codec().row_bytes
    end_of_sums = 4 * piece.num_steps * groups
    ends = [end_of_sums, end_of_sums + piece.num_steps * piece.num_rows * row_bytes]
    facts = {"store": header.identity, "codec": header.codec, **{name: str(each) for name, each in vars(piece).items()}}
    head = {
        "__metadata__": facts,
        "crc32": {"dtype": "U32", "shape": [piece.num_steps, groups], "data_offsets": [0, end_of_sums]},
        "targets": {"dtype": "U8", "shape": [piece.num_steps, piece.num_rows, row_bytes], "data_offsets": ends},
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
    groups = rows.reshape(-1, header.mix_group * shape[2])
    sums = np.array([zlib.crc32(group.data) for group in groups], dtype="<u4")
    return write_once(Path(store) / piece.name, [head_of(header, piece), sums.tobytes(), rows.data])


class PieceFile:
    """A piece's open file, whose head and size are those that its name and its store ask for.

    It is closed when nobody refers to it any more.

    Attributes:
      path: where it lies.
    Raises:
      UserError: it is short, damaged or of another store, or cannot be read.
    """

    def __init__(self, store: Path, header: StoreHeader, piece: Piece):
        self.path, self._piece = Path(store) / piece.name, piece
        self._again = f"Move it away, and {header.how_to_add(f'{piece.steps} again')}"
        self._row_bytes, self._group = header.open_codec().row_bytes, header.mix_group
        head = head_of(header, piece)
        self._sums_at = len(head)
        self._rows_at = len(head) + 4 * piece.num_steps * piece.num_rows // self._group
        size = self._rows_at + piece.num_steps * piece.num_rows * self._row_bytes
        try:
            self._file = open_regular(self.path)
        except OSError as error:
            raise self._unreadable(error) from error
        weakref.finalize(self, os.close, self._file)
        if (found := os.fstat(self._file).st_size) != size:
            raise UserError(f"{self.path}: has {found} bytes instead of {size}. {self._again}")
        if self._read(0, len(head)).tobytes() != head:
            raise UserError(f"{self.path}: belongs to another store, or its head is damaged. {self._again}")

    def group(self, step: int, row: int) -> np.ndarray:
        """The rows of the mixing group that has a row: uint8 [mix_group, row_bytes].

        Raises:
          UserError: they do not have their checksum, or cannot be read.
        """
        place = (step - self._piece.first_step) * self._piece.num_rows + row - self._piece.first_row
        number, num_bytes = place // self._group, self._group * self._row_bytes
        rows = self._read(self._rows_at + number * num_bytes, num_bytes)
        if zlib.crc32(rows.data) != int(self._read(self._sums_at + 4 * number, 4).view("<u4")[0]):
            raise UserError(f"{self.path}: is damaged at step {step}. {self._again}")
        return rows.reshape(self._group, self._row_bytes)

    def _read(self, offset: int, num_bytes: int) -> np.ndarray:
        content, done = np.empty(num_bytes, dtype=np.uint8), 0
        try:
            while count := os.preadv(self._file, [content.data[done:]], offset + done):
                done += count
        except OSError as error:
            raise self._unreadable(error) from error
        if done < num_bytes:
            raise UserError(f"{self.path}: has become shorter while it was read. {self._again}")
        return content

    def _unreadable(self, error: OSError) -> UserError:
        advice = advice_against(error, self._again)
        return UserError(f"{self.path}: cannot be read ({error.strerror or error}). {advice}")


def faults(store: Path, header: StoreHeader, piece: Piece) -> Iterator[str]:
    """Read all of a piece; give a line for each step that is damaged, or for the file."""
    try:
        file = PieceFile(store, header, piece)
    except UserError as error:
        yield str(error)
        return
    for step in range(piece.first_step, piece.stop_step):
        try:
            for row in range(piece.first_row, piece.stop_row, header.mix_group):
                file.group(step, row)
        except UserError as error:
            yield str(error)
