"""Brings the pieces of several stores of the same plan, teacher, codec and precision together in one of them."""

import itertools
import json
import os
from pathlib import Path

from pipelines.common.errors import UserError, write_error_line
from pipelines.common.files import append_synced, open_regular, sync_folder, write_once
from pipelines.shards.quarantine import QUARANTINE, read_quarantine
from tools.lib.common.terminal import tracked
from trainer.targets.header import HEADER_FILE, StoreHeader, check_plan, check_same, claim, read_header
from trainer.targets.pieces import Piece, faults, find_pieces, head_of
from trainer.targets.store import Coverage

_READ_BYTES = 1 << 20  # A piece is copied in parts of this size.


def merge(store: Path, sources: list[Path]) -> tuple[int, list[str]]:
    """Add the pieces of other stores that a store lacks. The sources stay unchanged.

    A line on stderr names a source that was recorded with something else, such as another version of timm. Every piece
    is read and checked before it is added. It becomes a second name of the same file where the file system allows that,
    and a copy elsewhere. A piece that the store has under the same name as another file is read there, too. It stays,
    even if it is damaged. No other piece of the store is read.

    Args:
      store: made if it is not there.
    Returns:
      How many pieces were added, and a line about each damaged one: of a source, which was left out, or of the store.
    Raises:
      UserError: a source was recorded from something else, or by another pipeline; the first field that differs is
        named, and nothing was added.
    """
    headers = {source: read_header(source) for source in sources}
    wanted = read_header(store) if (store / HEADER_FILE).exists() else headers[sources[0]]
    for source, found in headers.items():
        if store.exists() and os.path.samefile(source, store):
            raise UserError(f"{source}: is the store itself. Name other stores")
        _check_source(source, found, store, wanted)
    header = claim(store, wanted)
    for source, found in headers.items():
        if other := found.made_otherwise(header.made_with):
            write_error_line(f"note: {source} {other}")
    added, damaged = 0, []
    for source, found in headers.items():
        copy_quarantine(source, store)  # Before the pieces that show these images in gray.
        coverage = Coverage(store, header)
        for piece in tracked(find_pieces(source, found), f"merging {source}"):
            if (store / piece.name).exists():
                damaged += _faults_of_own(store, header, source, found, piece)
            elif coverage.first_missing(piece.first_step, piece.stop_step) is not None:
                fault = next(faults(source, found, piece), None)
                if fault is None:
                    added += _add(store, header, source, found, piece)
                else:
                    damaged.append(fault)
    return added, damaged


def _check_source(source: Path, found: StoreHeader, store: Path, wanted: StoreHeader) -> None:
    """Compare headers as `check_same`. An error about a larger codec says how the source's steps can be added."""
    check_plan(source, found, wanted.plan, wanted.num_classes)
    is_larger = found.open_codec().row_bytes > wanted.open_codec().row_bytes
    if is_larger and found.transcoded_to(wanted.codec).facts == wanted.facts:
        raise UserError(
            f"{source}: is stored as {found.codec}, and {store} as {wanted.codec}. To add its steps, use "
            f"'tools/record_teacher.py transcode {source} {store} --codec {wanted.codec}'"
        )
    check_same(source, found, wanted)


def _faults_of_own(
    store: Path, header: StoreHeader, source: Path, source_header: StoreHeader, piece: Piece
) -> list[str]:
    """A line if the store's own piece is damaged, which says whether the source's of the same name can replace it."""
    own, other = store / piece.name, source / piece.name
    if os.path.samefile(own, other):  # What an earlier merge has linked needs no second reading.
        return []
    fault = next(faults(store, header, piece), None)
    if fault is None or any(faults(source, source_header, piece)):
        return [] if fault is None else [fault]
    return [f"{own}: is damaged, and {other} is intact. Move the damaged file away and merge again"]


def _add(store: Path, header: StoreHeader, source: Path, source_header: StoreHeader, piece: Piece) -> bool:
    """Add an intact piece. Returns False where the store has it under the same name."""
    if source_header.identity == header.identity:
        try:
            # The name of a symbolic link would be linked instead of the file, and may lead nowhere from the store.
            os.link(os.path.realpath(source / piece.name), store / piece.name)
        except FileExistsError:
            return False
        except OSError:  # It is another file system, or one without hard links.
            pass
        else:
            sync_folder(store)
            return True
    with open(open_regular(source / piece.name), "rb") as file:
        # A header of an older version may lack settings. Its identity, which a file begins with, is then another one.
        file.seek(len(head_of(source_header, piece)))
        content = iter(lambda: file.read(_READ_BYTES), b"")
        return write_once(store / piece.name, itertools.chain([head_of(header, piece)], content))


def copy_quarantine(source: Path, target: Path) -> None:
    """Name the damaged images of one store in another one, where they are not named yet."""
    named = read_quarantine(target / QUARANTINE)
    missing = [line for where, line in read_quarantine(source / QUARANTINE).items() if where not in named]
    if missing:
        append_synced(target / QUARANTINE, [json.dumps(line).encode() for line in missing])
