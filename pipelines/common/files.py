"""Writes files that are complete or absent, and that survive a power cut."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.common.errors import UserError, advice_against

# Operating systems and file servers leave these behind, beside names that begin with a dot (as AppleDouble's ._NAME).
_SYSTEM_NAMES = {
    *("__macosx", "@eadir", "#recycle", "@recycle", "#snapshot", "thumbs.db", "desktop.ini"),
    *("lost+found", "$recycle.bin", "system volume information"),
}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that replaces `path`, and is on the disk, when the block ends.

    If the block fails nothing has changed. A process that dies inside leaves a file whose name ends in `.partial`. A
    pipe or a device, such as /dev/stdout, is written to directly.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    partial = _partial_of(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_can_be_made(folder: Path, advice: str) -> Path:
    """Raise a UserError with this advice unless a folder can be written, or made where it is not there yet.

    Returns:
      the nearest folder that exists: itself or one above it.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder}: cannot be made, {existing} is not a folder that can be written. {advice}")
    return existing


def _partial_of(path: Path) -> Path:
    """A new name beside a file that is being written; `is_leftover` knows it."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def is_leftover(name: str) -> bool:
    """Return whether a killed process that was writing a file leaves behind one of this name."""
    return re.fullmatch(r".+\.[0-9a-f]{8}\.partial", name) is not None


def check_parent_folder(path: Path, named: str) -> None:
    """Raise a UserError, which calls the path `named`, if no file can be written at `path`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{named}: not a file in a folder that is there. Make the folder, or name another")


def write_synced(path: Path, content: bytes) -> None:
    """Replace a file's content completely or not at all; it is on the disk when this returns."""
    with replacing(path) as file:
        file.write(content)


# Some file systems on networks and in user space have no hard links, and answer with these errors.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Inside, errors of the system name the file. Errors of opening a file name it anyway, those of writing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def append_synced(path: Path, lines: list[bytes]) -> None:
    """Add lines to a file, after completing a last one that was cut off, and wait until they are on the disk.

    Processes that add lines at the same time wait for each other. On a file system without locks each adds its lines in
    one write at the end of the file.
    """
    with naming_file(path), open(path, "a+b", buffering=0) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)  # The system gives it back when the file is closed.
        size = file.seek(0, os.SEEK_END)
        content = b"".join(line + b"\n" for line in lines)
        if size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n":
            content = b"\n" + content
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())


def write_once(path: Path, parts: Iterable[bytes | memoryview]) -> bool:
    """Write a file that is not there yet, complete or not at all; it is on the disk when this returns.

    A file that is there is never replaced, not even one that another process has written in the meantime, unless the
    file system has no hard links. A process that dies inside leaves a file whose name ends in `.partial`.

    Returns:
      whether this call has written it.
    Raises:
      UserError: the storage fails or is full.
    """
    if path.exists():
        return False
    partial = _partial_of(path)
    try:
        with open(partial, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        _name_once(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        advice = advice_against(error, "Run the same command again")
        raise UserError(f"{path}: cannot be written ({error.strerror}). {advice}") from error
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _name_once(partial: Path, path: Path) -> None:
    """Give a complete file its name. Raises a FileExistsError where another file has it."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        partial.rename(path)


def is_hidden(path: str) -> bool:
    """Return whether a part of a path is a hidden or system name: it begins with a dot, or is in a fixed list."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES for part in path.split("/")
    )


def instead_of_content(head: bytes) -> str:
    """Say what a file holds in place of its content, by its first bytes, and what helps; "" if it is none of these."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the file itself. Run 'git lfs pull' in its folder"
    if head.lstrip()[:9].lower().startswith((b"<html", b"<!doctype")):
        return "a web page, not the file itself. Download it again"
    return ""


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds hidden entries at the most, such as the lost+found that a file system makes."""
    return all(is_hidden(entry.name) for entry in folder.iterdir())


@contextlib.contextmanager
def making(path: Path, last: str = "") -> Iterator[Path]:
    """Make a folder to fill. When the block ends its files are in `path`, which was missing or empty, on the disk.

    A folder that exists stays the same folder, because it may be a mount point or the one that a shell stands in: the
    files move into it, each of them complete. If the block fails nothing has changed. A process that dies inside leaves
    a folder whose name ends in `.partial`; in `path` that is a hidden one, with which `path` still counts as empty.

    Args:
      last: name of the file by which readers know that the folder is complete; it moves last.
    """
    exists, token = path.is_dir(), secrets.token_hex(4)
    partial = path / f".{token}.partial" if exists else path.with_name(f"{path.name}.{token}.partial")
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(partial)
        if exists:
            move_entries(partial, path, (last,))
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path if exists else path.parent)


def move_entries(source: Path, target: Path, last: tuple[str, ...] = ()) -> None:
    """Move all entries of a folder into another one of the same file system, or none, and remove the folder.

    Args:
      last: names that move after all others, in this order.
    Raises:
      FileExistsError: the other folder has an entry of one of these names.
    """
    moved = []
    try:
        entries = sorted(source.iterdir())
        entries.sort(key=lambda entry: last.index(entry.name) if entry.name in last else -1)
        for entry in entries:
            if os.path.lexists(target / entry.name):  # Somebody has put it there in the meantime.
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target / entry.name))
            moved.append(entry.rename(target / entry.name))
        source.rmdir()
    except BaseException:
        for entry in moved:
            entry.rename(source / entry.name)
        raise


def read_json(path: Path) -> dict:
    """Read a JSON object; {} if there is no file, or if it was cut off by a crash or holds something else."""
    content = parsed_json(path.read_bytes()) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a log, [] if there is none. A line that a crash or a power cut has damaged is left out."""
    return split_json_lines(path, lambda line: isinstance(line, dict))[0]


def split_json_lines(path: Path, is_usable: Callable[[object], bool]) -> tuple[list[dict], list[bytes]]:
    """The usable lines of a JSON lines file, parsed, and the bytes of all other lines that are not empty.

    Both are empty where `path` is no file.
    """
    usable, others = [], []
    if not path.is_file():  # A device may have no end.
        return usable, others
    for content in path.read_bytes().split(b"\n"):
        line = parsed_json(content)
        if is_usable(line):
            usable.append(line)
        elif content.strip():
            others.append(content)
    return usable, others


def parsed_json(content: bytes) -> object:
    """Parse JSON; return None if the content is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # Bytes that are no UTF-8 raise a ValueError, too.
        return None


@contextlib.contextmanager
def locked(path: Path, message: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that the system gives back when the process ends, however it ends.

    Raises:
      UserError: another process holds it and `wait` is off, and `message` says what that means; or the process that
        this one waited for has removed it.
    """
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(f"{message}. Wait for it, or stop it") from error
        raise UserError(f"{path}: cannot be locked ({error.strerror}). Use a file system with locks") from error
    try:
        # A lock of a file that was removed keeps nobody out.
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise UserError(f"{path}: was removed while this process waited for it. Run the same command again")
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open a file to lock, which is never written, and return its descriptor. Links are not followed, pipes not read.

    Raises:
      UserError: something else than a regular file has its name.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise UserError(f"{path}: not a file that this program made. Move it away")


# Some file systems on networks, in user space and on USB sticks cannot sync a folder, and answer with these errors.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EPERM, errno.EACCES)


def sync_folder(folder: Path) -> None:
    """Put renames and removals in a folder on the disk, where the file system can sync folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def open_regular(path: Path) -> int:
    """Open a file to read and return its descriptor. A pipe is not waited for, also where a link leads to it.

    Raises:
      OSError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
