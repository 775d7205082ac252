"""Reading tars to the end of the file: Python's tarfile takes a damaged header, or one block of zeros, for the end."""

import contextlib
import errno
import io
import os
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.common.errors import UserError, clipped, grouped, named
from pipelines.common.files import instead_of_content
from tools.lib.shards.sources.contents import printable

BLOCK = 512
Parts = dict[str, tuple[int, int]]  # The parts of a sample in a tar: extension -> (offset, bytes) of the content.
_END = 2 * BLOCK  # A writer ends an archive with two blocks of zeros.
# Writers fill the file with zeros up to a multiple of their record. It has 20 blocks unless the person chose another
# size, as `tar -b 128` does for tapes and file servers; usual choices are powers of two from 32 KiB to 1 MiB.
_RECORD = 20 * BLOCK
_LARGER_RECORDS = tuple(blocks * BLOCK for blocks in (64, 128, 256, 512, 1024, 2048))
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_MAX_HEADER = 1 << 20  # The headers before one member, with names and remarks, are far shorter in any usual archive.
_VOLUME_LABEL = b"V"  # `tar --label` writes it.
# Compressed files are recognised by their first bytes; each kind has a suffix and a tool that unpacks it.
COMPRESSED = {
    b"\x1f\x8b": (".gz", "gunzip"),
    b"BZh": (".bz2", "bunzip2"),
    b"\xfd7zXZ": (".xz", "unxz"),
    b"\x28\xb5\x2f\xfd": (".zst", "unzstd"),
}


class FilePart(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset in the range."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read from there on, at most to the end of the range."""
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content


Readable = BinaryIO | FilePart


def tar_files(path: Path, file: Readable) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, in order.

    Args:
      path: how an error names it.
      file: positioned at its beginning.
    Raises:
      UserError: as `tar_entries`; or, after the last file, that links and other special members are among them.
    """
    reasons: dict[str, list[str]] = {}
    for member in tar_entries(path, file):
        if reason := why_not_a_file(member):
            reasons.setdefault(reason, []).append(printable(member.name))
        else:
            yield member
    if reasons:
        raise UserError(f"{path}: {grouped(reasons)}")


def tar_entries(path: Path, file: Readable) -> Iterator[tarfile.TarInfo]:
    """Everything in an uncompressed tar but folders, in order.

    Args:
      path: how an error names it.
      file: positioned at its beginning.
    Raises:
      UserError: it is no tar, a header is damaged, it is cut off, or something follows its end; the byte is named.
    """
    nbytes = file.seek(0, os.SEEK_END)
    headers = _Headers(file)
    headers.seek(0)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            while (member := tar.next()) is not None:
                headers.left = _MAX_HEADER
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # Otherwise it keeps all.
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.ReadError(f"{clipped(printable(member.name))} has {member.size} bytes")
                if not member.isdir() and member.type != _VOLUME_LABEL:
                    yield member
            end = tar.offset
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Look at that file or disk") from error
    except Exception as error:  # tarfile raises errors of nearly any type about damaged headers.
        raise UserError(f"{path}: {_why_no_tar(path, file, nbytes, error)}") from error
    _check_end(path, file, end, nbytes)


class _Headers(io.RawIOBase):
    """The file as tarfile reads its headers: those before one member have a bounded size, whatever they say.

    A long name or PAX records may claim any number of bytes, and tarfile would hold them in memory.
    """

    def __init__(self, file: Readable):
        self._file, self.left = file, _MAX_HEADER

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, nbytes: int = -1) -> bytes:
        if not 0 <= nbytes <= self.left:
            raise tarfile.ReadError(f"the headers before one member have more than {_MAX_HEADER:,} bytes")
        self.left -= nbytes
        return self._file.read(nbytes)


def _why_no_tar(path: Path, file: Readable, nbytes: int, error: Exception) -> str:
    file.seek(0)
    head = file.read(BLOCK)
    if found := instead_of_content(head):
        return found
    for magic, (_, tool) in COMPRESSED.items():
        if head.startswith(magic):
            name, part = shlex.quote(path.name), shlex.quote(f"{path.name}.part")
            return f"compressed, so nothing in it can be read alone. Run {tool} < {name} > {part} && mv {part} {name}"
    if not nbytes:
        return "an empty file. Restore it"
    return f"not an uncompressed tar, or damaged ({clipped(error, 120)}). Restore it"


def check_compressed(root: Path, tars: list[Path]) -> None:
    """Raise a UserError that names the compressed ones among the tars of a folder's folders, and unpacks them all.

    What is unpacked replaces a file, or a link to one, no sooner than it is complete.
    """
    found: dict[str, list[Path]] = {}
    for path in tars:
        with (
            contextlib.suppress(OSError),
            open(path, "rb", buffering=0) as file,
        ):  # An error is reported when the tar is read.
            head = file.read(BLOCK)
            for magic, (_, tool) in COMPRESSED.items():
                if head.startswith(magic) and not _is_header(head):
                    found.setdefault(tool, []).append(path)
    if not found:
        return
    tool, paths = next(iter(found.items()))
    names = [clipped(printable(str(path.relative_to(root))), 30) for paths in found.values() for path in paths]
    number = "1 tar is" if len(names) == 1 else f"{len(names):,} tars are"
    where = " ".join(f"{folder}/*.tar" for folder in dict.fromkeys(path.parent.name for path in paths))
    raise UserError(
        f"{root}: {number} compressed, so nothing inside can be read alone: {named(names, 2)}. In that folder run "
        f'for f in {where}; do {tool} <"$f" >"$f.part" && mv "$f.part" "$f" || rm "$f.part"; done'
    )


def _check_end(path: Path, file: Readable, end: int, nbytes: int) -> None:
    """Raise a UserError unless zeros alone follow the last member, and no more than a writer fills a file with."""
    file.seek(end)
    found = file.read(BLOCK)
    if not found:
        raise UserError(
            f"{path}: has no end mark after its last member, as if cut off there. Restore it; if nothing is missing, "
            f"add the mark: head -c {_END} /dev/zero >> {shlex.quote(path.name)}"
        )
    if found != bytes(BLOCK):
        raise UserError(f"{path}: damaged or cut off at byte {end}, where its end or a header is expected. Restore it")
    begin = first_not_zero(file, end + BLOCK)
    if begin is not None:
        raise UserError(f"{path}: {_what_follows(path, file, end, begin)}")
    usual, *larger = _filled_sizes(end)
    if nbytes > usual and nbytes not in larger:
        raise UserError(
            f"{path}: zeros from byte {end} to its end, {nbytes - end:,} bytes, are more than a tar is filled up with: "
            "perhaps its rest is lost. Restore it; if nothing is missing, cut them off: "
            f"truncate -s {end + _END} {shlex.quote(path.name)}"
        )


def _filled_sizes(end: int) -> list[int]:
    """How large a tar is whose last member ends at `end`: with usual records, and with each of the larger ones."""
    return [-(-(end + _END) // record) * record for record in (_RECORD, *_LARGER_RECORDS)]


def first_not_zero(file: Readable, start: int) -> int | None:
    """The offset of the first byte from `start` on that is not zero."""
    while True:
        start = _behind_hole(file, start)
        file.seek(start)
        if not (chunk := file.read(_CHUNK)):
            return None
        if chunk != _ZEROS[: len(chunk)]:
            return start + len(chunk) - len(chunk.lstrip(b"\0"))
        start += len(chunk)


def _behind_hole(file: Readable, start: int) -> int:
    """Where a hole of the disk at `start` ends: gigabytes of zeros that nobody wrote need not be read."""
    try:
        descriptor = file.fileno()
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
    except OSError:  # A part of a file has no descriptor.
        return start
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA)
    except OSError as error:
        return os.fstat(descriptor).st_size if error.errno == errno.ENXIO else start  # Only a hole follows.
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)  # The buffer of `file` expects it there.


def _what_follows(path: Path, file: Readable, end: int, begin: int) -> str:
    """Say what a file probably is in which zeros at `end` are followed by other bytes at `begin`."""
    file.seek(begin)
    if begin in (end + _END, *_filled_sizes(end)) and path.is_file() and _is_header(file.read(BLOCK)):
        name, (first, second) = path.name, (f"{path.stem}.part{number}.tar" for number in (1, 2))
        name, first, second = map(shlex.quote, (name, first, second))
        return (
            f"another archive begins at byte {begin}, where readers of tars stop. If tars were joined, separate them: "
            f"head -c {begin} {name} > {first}; tail -c +{begin + 1} {name} > {second}; and move {name} away. "
            "Otherwise restore it"
        )
    return f"damaged: zeros at byte {end} where a header is expected, and more content from byte {begin} on. Restore it"


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def why_not_a_file(member: tarfile.TarInfo) -> str:
    """Why a member of a tar has no content of its own there, and what helps; "" if it is a regular file."""
    if member.issparse():
        return "stored as a sparse file. Pack the tar again without --sparse"
    if member.isreg():
        return ""
    if member.islnk() or member.issym():
        return "a link in the tar. Pack it again with the files themselves: tar -h --hard-dereference -cf ..."
    return f"no file (type {member.type.decode(errors='replace')!r}). Pack the tar without it"


def tar_header(name: str, size: int) -> bytes:
    """The header before a member's content in a tar that `write_shard` made: one block, more for unusual names."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf()
