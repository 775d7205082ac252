"""Reads what was recorded for any positions."""

import functools
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError, advice_against
from pipelines.common.files import read_json_lines
from trainer.models.files.torch_files import require_regular
from trainer.targets.codec import Codec
from trainer.targets.header import StoreHeader, read_header
from trainer.targets.pieces import Coverage, Piece, head_of

QUARANTINE = "quarantine.jsonl"
_LARGEST_QUARANTINE = 1 << 26  # bytes; a line has about 150, and a recorder stops long before half a million.
_OPEN_FILES = 32  # A global batch lies in one piece, or in as many as processes that divided its rows.


class PieceFile:
    """A piece's open file, whose head and size are those that its name and its store ask for.

    It is closed when nobody refers to it any more.

    Raises:
      UserError: it is short, damaged or of another store, or cannot be read.
    """

    def __init__(self, store: Path, header: StoreHeader, piece: Piece):
        self._path, self._piece = Path(store) / piece.name, piece
        self._again = f"Move it away, and {header.how_to_complete}"
        self._row_bytes, self._group = header.open_codec().row_bytes, header.mix_group
        head = head_of(header, piece)
        self._sums_at = len(head)
        self._rows_at = len(head) + 4 * piece.num_steps * self._groups_per_step
        size = self._rows_at + piece.num_steps * piece.num_rows * self._row_bytes
        try:
            require_regular(self._path)
            self._file = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise self._unreadable(error) from error
        weakref.finalize(self, os.close, self._file)
        if (found := os.fstat(self._file).st_size) != size:
            raise UserError(f"{self._path}: has {found} bytes instead of {size}. {self._again}")
        if self._read(0, len(head)).tobytes() != head:
            raise UserError(f"{self._path}: belongs to another store, or its head is damaged. {self._again}")

    def group(self, step: int, row: int) -> np.ndarray:
        """The rows of the mixing group that has a row: uint8 [mix_group, row_bytes].

        Raises:
          UserError: they do not have their checksum, or cannot be read.
        """
        index = (step - self._piece.first_step) * self._groups_per_step + (row - self._piece.first_row) // self._group
        num_bytes = self._group * self._row_bytes
        rows = self._read(self._rows_at + index * num_bytes, num_bytes)
        if zlib.crc32(rows.data) != int(self._read(self._sums_at + 4 * index, 4).view("<u4")[0]):
            raise UserError(f"{self._path}: is damaged at step {step}. {self._again}")
        return rows.reshape(self._group, self._row_bytes)

    def faults(self) -> Iterator[str]:
        """A line for every step that is damaged."""
        for step in range(self._piece.first_step, self._piece.stop_step):
            try:
                for row in range(self._piece.first_row, self._piece.stop_row, self._group):
                    self.group(step, row)
            except UserError as error:
                yield str(error)

    @property
    def _groups_per_step(self) -> int:
        return self._piece.num_rows // self._group

    def _read(self, offset: int, num_bytes: int) -> np.ndarray:
        content = np.empty(num_bytes, dtype=np.uint8)
        done = 0
        while done < num_bytes:
            try:
                count = os.preadv(self._file, [content.data[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise UserError(f"{self._path}: has become shorter while it was read. {self._again}")
            done += count
        return content

    def _unreadable(self, error: OSError) -> UserError:
        advice = advice_against(error, self._again)
        return UserError(f"{self._path}: cannot be read ({error.strerror or error}). {advice}")


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
        self.codec: Codec = self.header.open_codec()
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
        step, row = np.divmod(positions, self.header.global_batch)
        group = positions // self.header.mix_group
        wanted: dict[Piece, list[int]] = {}  # The indices, in `positions`, of one row of each group.
        for index in np.unique(group, return_index=True)[1].tolist():
            wanted.setdefault(self._piece(int(step[index]), int(row[index])), []).append(index)
        out = np.empty((len(positions), self.codec.row_bytes), dtype=np.uint8)
        for piece, indices in wanted.items():
            file = self._open(piece)
            for index in indices:
                rows = file.group(int(step[index]), int(row[index]))
                same = group == group[index]
                out[same] = rows[positions[same] % self.header.mix_group]
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
