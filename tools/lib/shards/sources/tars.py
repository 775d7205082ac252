"""Reading tars to the end of the file: Python's tarfile takes a damaged header, or one block of zeros, for the end."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.common.errors import UserError, clipped, named
from pipelines.common.files import instead_of_content
from tools.lib.shards.sources.contents import printable

BLOCK = 512
Parts = dict[str, tuple[int, int]]  # The parts of a sample in a tar: extension -> (offset, bytes) of the content.
# A writer ends an archive with two blocks of zeros, and fills the file up to a multiple of its record with more.
_END = 2 * BLOCK
# The record has 20 blocks unless the person chose another size; these are the ones that people choose.
_RECORD, _LARGER_RECORDS = 20 * BLOCK, tuple(blocks * BLOCK for blocks in (64, 128, 256, 512, 1024, 2048))
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20  # The headers before one member, with names and remarks, are far shorter in any usual archive.
_VOLUME_LABEL = b"V"  # `tar --label` writes it.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # first bytes of what gzip, bzip2, xz, zstd write


def tar_files(path: Path, file: BinaryIO, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, in order.

    Args:
      path: how an error names it.
      file: holds the tar in the `size` bytes from `start` on, or to its end. Offsets of members count from `start`.
    Raises:
      UserError: it is no tar, a header is damaged, it is cut off, or something follows its end; the byte is named. Or,
        after the last file, that links and other special members are among them.
    """
    stop = file.seek(0, os.SEEK_END) if size is None else start + size
    headers, others = _Headers(file, start, stop), []
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            while (member := tar.next()) is not None:
                headers.left = _MAX_HEADER
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # Otherwise it keeps all.
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.ReadError(f"{clipped(printable(member.name))} has {member.size} bytes")
                if member.isreg() and not member.issparse():
                    yield member
                elif not member.isdir() and member.type != _VOLUME_LABEL:
                    others.append(clipped(printable(member.name)))
            end = start + tar.offset
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Look at that file or disk") from error
    except Exception as error:  # tarfile raises errors of nearly any type about damaged headers.
        raise UserError(f"{path}: {_why_no_tar(file, start, error)}") from error
    if damage := _damage_at_end(file, start, end, stop):
        raise UserError(f"{path}: {damage}. Restore it, or pack it again")
    if others:
        help_ = "Pack the tar again with the files themselves: tar -h --hard-dereference"
        raise UserError(f"{path}: links, sparse or special files: {named(others, 3)}. {help_}")


class _Headers(io.RawIOBase):
    """A range of a file as tarfile reads its headers: those before one member have a bounded size, whatever they say.

    A long name or PAX records may claim any number of bytes, and tarfile would hold them in memory.
    """

    def __init__(self, file: BinaryIO, start: int, stop: int):
        self._file, self._start, self._stop, self.left = file, start, stop, _MAX_HEADER
        self._file.seek(start)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset in the range, or from the present one; `io` asks for that one so, with 0."""
        base = self._start if whence == os.SEEK_SET else self._file.tell()
        return self._file.seek(base + offset) - self._start

    def read(self, nbytes: int = -1) -> bytes:
        if not 0 <= nbytes <= self.left:
            raise tarfile.ReadError(f"the headers before one member have more than {_MAX_HEADER:,} bytes")
        self.left -= nbytes
        return self._file.read(max(0, min(nbytes, self._stop - self._file.tell())))


def _why_no_tar(file: BinaryIO, start: int, error: Exception) -> str:
    file.seek(start)
    head = file.read(BLOCK)
    if head.startswith(_COMPRESSED):
        return "compressed, so nothing in it can be read alone. Unpack it (gunzip, bunzip2, unxz, unzstd)"
    damaged = f"not an uncompressed tar, or damaged ({clipped(error, 120)}). Restore it"
    return instead_of_content(head) or (damaged if head else "an empty file. Restore it")


def _damage_at_end(file: BinaryIO, start: int, end: int, stop: int) -> str:
    """Say what is wrong unless zeros alone follow the last member, and no more than a writer fills a file with."""
    file.seek(end)
    found = file.read(min(BLOCK, max(0, stop - end)))
    if found != bytes(BLOCK):
        return f"damaged or cut off at byte {end}, where its end or a header is expected"
    usual, *larger = (-(-(end - start + _END) // record) * record for record in (_RECORD, *_LARGER_RECORDS))
    is_filled = stop - start <= usual or stop - start in larger
    if not is_filled or first_not_zero(file, end + BLOCK, stop) is not None:
        return f"damaged, or several tars joined: zeros at byte {end}, and {stop - end:,} bytes from there to its end"
    return ""


def first_not_zero(file: BinaryIO, start: int, stop: int) -> int | None:
    """The offset of the first byte of a range that is not zero."""
    file.seek(start)
    while chunk := file.read(min(_CHUNK, max(0, stop - start))):
        if rest := chunk.lstrip(b"\0"):
            return start + len(chunk) - len(rest)
        start += len(chunk)
    return None


def tar_header(name: str, size: int) -> bytes:
    """The header before a member's content in a tar that `write_shard` made: one block, more for unusual names."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf()
