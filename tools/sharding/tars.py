"""Reading tars without missing what is damaged: Python's tarfile takes a damaged header for the end of the archive."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError

BLOCK = 512


def tar_files(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, in order.

    Args:
      path: how an error names it.
      file: positioned at its beginning.
    Raises:
      UserError: it is no tar, a header is damaged, or it is cut off; the byte is named.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not an uncompressed tar, or damaged ({error}). Restore it") from error
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"{path}: damaged or cut off at byte {end}, where its end or a header is expected. Restore it")


def tar_members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> extension -> (offset, bytes) of the data, from the headers of a WebDataset tar.

    Raises:
      UserError: as `tar_files`, or a name occurs twice.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as file:
        for member in tar_files(path, file):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            parts = members.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if extension.lower() in parts:
                raise UserError(f"{path}: {member.name} occurs twice. Write the tar again with names of their own")
            parts[extension.lower()] = (member.offset_data, member.size)
    return members


def tar_header(name: str, size: int) -> bytes:
    """What stands before a member's content in a tar that `write_shard` made: one block, more for unusual names."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf()
