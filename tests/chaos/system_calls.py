"""Conversions in which one call that changes files fails or is the last, and which are then run again.

The calls are counted in the fork that converts: those that open, make, rename and remove files by Python's audit
events, writes and syncs by functions in place of Python's own.
"""

import builtins
import errno
import functools
import io
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from chaos.attempts import Attempt, Ended, isolated
from chaos.conversions import jpeg, shard, tree
from pipelines.shards.manifest import MANIFEST

PROMISE = (
    "During `build`, `index` and `merge`, at a system call that changes a file, the process is killed, or the disk is "
    "full or fails. Errors are one line. The same command then gives every byte of an undisturbed conversion, leaves "
    "nothing else, and touches no other file."
)
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_NEEDS_ROOM = {"write", "open", "os.mkdir", "os.symlink"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Counter:
    """Counts the calls of this process that change files below a folder, and spoils one of them, or those from it on.

    Args:
      spoil: called before each call with its kind, `write`, `fsync` or an audit event, and its number. What it raises
        is what the call raises; ShortWriteError makes a write incomplete.
    """

    def __init__(self, folder: Path, spoil: Callable[[str, int], None]):
        self.folder, self.spoil, self.calls = f"{folder}/", spoil, 0
        sys.addaudithook(self._on_event)
        fsync, opened = os.fsync, builtins.open

        def counted_fsync(file) -> None:
            self.count("fsync")
            fsync(file)

        def counted_open(file, mode="r", buffering=-1, *rest, **options):
            if mode not in ("wb", "r+b", "ab") or not str(file).startswith(self.folder):
                return opened(file, mode, buffering, *rest, **options)
            raw = _CountedFile(file, mode.replace("b", ""))
            raw.count = self.count
            return raw if buffering == 0 else io.BufferedWriter(raw)

        os.fsync, builtins.open, io.open = counted_fsync, counted_open, counted_open

    def count(self, kind: str) -> None:
        self.calls += 1
        self.spoil(kind, self.calls)

    def _on_event(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and self._is_inside(path):
                self.count(event)
        elif event in _CHANGES and self._is_inside(arguments[0]):
            self.count(event)

    def _is_inside(self, path: object) -> bool:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return name.startswith(self.folder) or not name.startswith("/")  # relative to a folder that is being removed


class _CountedFile(io.FileIO):
    count: Callable[[str], None]

    def write(self, content) -> int:
        part = memoryview(content).cast("B")[: len(content) // 2]
        try:
            self.count("write")
        except ShortWriteError:
            return super().write(part) if len(part) else super().write(content)
        except OSError:
            super().write(part)  # a disk that fails has written something before
            raise
        return super().write(content)


class ShortWriteError(Exception):
    """The system has written a part."""


# --- faults: what happens at the n-th call ---


def kill(kind: str, call: int, n: int) -> None:
    """kill -9"""
    if call == n:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(kind: str, call: int, n: int, *, code: int) -> None:
    if call == n:
        raise OSError(code, os.strerror(code))


def fill(kind: str, call: int, n: int) -> None:
    """the disk is full from then on"""
    if call >= n and kind in _NEEDS_ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def shorten(kind: str, call: int, n: int) -> None:
    """a write is not complete"""
    if call >= n and kind == "write":
        raise ShortWriteError


FAULTS: dict[str, Callable[[str, int, int], None]] = {
    "kill -9": kill,
    "no space left": functools.partial(fail, code=errno.ENOSPC),
    "the disk is full from then on": fill,
    "a disk error": functools.partial(fail, code=errno.EIO),
    "the quota is exhausted": functools.partial(fail, code=errno.EDQUOT),
    "incomplete writes": shorten,
}


# --- commands: each prepares a folder and returns the arguments of the command and where the dataset will be ---


def _images(folder: Path) -> Path:
    for split, count in (("train", 7), ("val", 3)):
        for number in range(count):
            path = folder / "images" / split / f"c{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number + 100 * (split == "val")))
    return folder / "images"


_FEW = ("--samples-per-shard", 3, "--workers", 1)


def new(folder: Path) -> tuple[list, Path]:
    """build"""
    return ["build", _images(folder), folder / "out", *_FEW], folder / "out"


def into(folder: Path) -> tuple[list, Path]:
    """build into an empty folder"""
    (folder / "out").mkdir()
    return ["build", _images(folder), folder / "out", *_FEW], folder / "out"


def rows(folder: Path) -> tuple[list, Path]:
    """build from parquet"""
    (folder / "rows").mkdir()
    made = pa.table([[jpeg(i) for i in range(7)], [0, 1] * 3 + [0]], names=["image", "label"])
    parquet.write_table(made, folder / "rows" / "train-0.parquet")
    return ["build", folder / "rows", folder / "out", *_FEW], folder / "out"


def merged(folder: Path) -> tuple[list, Path]:
    """merge"""
    images = _images(folder)
    for part in ("1/2", "2/2"):
        ended = isolated(shard("build", images, folder / "out", *_FEW, "--part", part))
        assert ended.code == 0, ended.text
    return ["merge", folder / "out"], folder / "out"


def _tars(folder: Path) -> Path:
    ended = isolated(shard("build", _images(folder), folder / "built", *_FEW))
    assert ended.code == 0, ended.text
    for path in sorted((folder / "built").rglob("*.tar")):
        (folder / "tars" / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "tars" / path.parent.name / path.name)
    shutil.rmtree(folder / "built")
    return folder / "tars"


def indexed(folder: Path) -> tuple[list, Path]:
    """index"""
    return ["index", _tars(folder), "--workers", 1], folder / "tars"


def indexed_elsewhere(folder: Path) -> tuple[list, Path]:
    """index --out"""
    return ["index", _tars(folder), "--out", folder / "out", "--workers", 1], folder / "out"


COMMANDS = (new, indexed, rows, merged, into, indexed_elsewhere)
_STRANGERS = {"out.txt": b"mine", "out.partial.txt": b"mine", "tars.idx": b"mine", "0.0a1b2c3d.partial": b"mine"}


class Case:
    """A command, and what an undisturbed conversion by it looks like.

    Attributes:
      calls: how many calls of it change files.
    """

    def __init__(self, folder: Path, prepare: Callable[[Path], tuple[list, Path]]):
        self.home, self.prepared, self.what = folder / "work", folder / f"prepared-{prepare.__name__}", prepare.__doc__
        shutil.rmtree(self.home, ignore_errors=True)  # The case before has left it.
        self.home.mkdir()
        self.command, self.out = prepare(self.home)
        for name, content in _STRANGERS.items():
            (self.home / name).write_bytes(content)
        self.home.rename(self.prepared)
        self.calls = 0
        self.reset()
        ended = self.run(lambda kind, call: None, count=folder / "count")
        assert ended.code == 0, ended.text
        self.calls, self.undisturbed = int((folder / "count").read_text()), tree(self.home)

    def reset(self) -> None:
        """Put everything back as it was before the command; paths are always the same, as the manifest names them."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.prepared, self.home, symlinks=True)

    def run(self, spoil: Callable[[str, int], None], count: Path | None = None) -> Ended:
        """The command, with its calls spoiled."""

        def call() -> None:
            counter = Counter(self.home, spoil)
            shard(*self.command)()
            if count is not None:
                count.write_text(str(counter.calls))

        return isolated(call)

    def fell(self, spoil: Callable[[str, int], None]) -> str:
        """What is wrong after a call was spoiled and the command run again; "" if nothing is."""
        self.reset()
        ended = self.run(spoil)
        if ended.code != -signal.SIGKILL and (complaint := ended.complaint()):
            return complaint
        if ended.code:
            again = self.run(lambda kind, call: None)
            if again.code and not (self.command[0] == "index" and (self.out / MANIFEST).exists()):
                return f"does not resume: {again.complaint() or again.last_line[:300]} (after: {ended.last_line[:200]})"
        found = tree(self.home)
        found.pop(f"{self.out.name}/.index.lock", None)  # hidden, empty, and used again
        different = sorted(set(found.items()) ^ set(self.undisturbed.items()))
        return f"differs in {sorted({name for name, _ in different})[:6]}" if different else ""


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Spoil one conversion after the other."""
    cases = [Case(folder, prepare) for prepare in COMMANDS]
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        case = cases[number % len(cases)]
        name, fault = list(FAULTS.items())[number // len(cases) % len(FAULTS)]
        n = chance.randrange(1, case.calls + 1)
        fell = case.fell(functools.partial(fault, n=n))
        yield Attempt(name, f"seed {seed}, attempt {number}, {case.what}, call {n}: {fell}" if fell else "")
