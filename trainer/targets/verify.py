"""Reads all of a store and names what is damaged or does not belong to it."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden, is_leftover
from trainer.targets.header import HEADER, StoreHeader, read_header
from trainer.targets.pieces import Piece
from trainer.targets.store import QUARANTINE, PieceFile


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
        if path.name not in (HEADER, QUARANTINE) and not is_leftover(path.name) and not is_hidden(path.name):
            yield from _faults_of(path, header)


def _faults_of(path: Path, header: StoreHeader) -> Iterator[str]:
    piece = Piece.named(path.name)
    if piece is None or not piece.fits(header):
        yield f"{path}: its name is none that a piece of this store can have. Move it away"
        return
    try:
        yield from PieceFile(path.parent, header, piece).faults()
    except UserError as error:
        yield str(error)
