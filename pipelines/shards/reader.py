"""Reads the bytes of samples from shards."""

import contextlib
import os
import resource
import sys
import threading
import weakref
from collections.abc import Iterator

import numpy as np

from pipelines.common.errors import UserError, advice_against
from pipelines.shards.index import ShardIndex

# File descriptors that are left to the rest of the process; half of the limit, where that is less.
_OTHER_FILES = 512


class ShardReader:
    """JPEG bytes of samples, read where the index says they lie.

    `will_need` has the system read ahead what the plan needs next; `read` then copies it out of the page cache. That is
    as fast as memory maps (docs/performance.md), and a disk that fails is an error instead of a SIGBUS. Safe to call
    from several threads.

    A shard stays open once it was read. Where the system allows too few open files for that, the others are opened for
    each read.
    """

    def __init__(self, index: ShardIndex):
        self._index = index
        self._files: list[int | None] = [None] * len(index.paths)
        self._lock = threading.Lock()
        # The system gives the lowest free number to a file, so one with a high number says that few are left.
        self._highest = _allow_open_files(len(index.paths))
        weakref.finalize(self, _close, self._files)

    def read(self, samples: np.ndarray) -> list[np.ndarray]:
        """The bytes of each sample: uint8 [nbytes].

        Raises:
          UserError: a shard is missing, or shorter than the index says.
          OSError: the storage fails.
        """
        return [self._read(*place) for place in places(self._index, samples)]

    def will_need(self, samples: np.ndarray) -> None:
        """Start reading the samples from storage into the page cache; returns at once. Raises UserError as `read`."""
        for shard, offset, nbytes in places(self._index, samples):
            with self._file(shard) as file:
                os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, shard: int, offset: int, nbytes: int) -> np.ndarray:
        content = np.empty(nbytes, dtype=np.uint8)
        done = 0
        with self._file(shard) as file:
            while done < nbytes:
                count = os.preadv(file, [content.data[done:]], offset + done)
                if count == 0:
                    raise UserError(
                        f"{self._index.paths[shard]}: the index names bytes [{offset}, {offset + nbytes}), "
                        f"the shard has {os.fstat(file).st_size}. Restore the shard, or build the dataset again"
                    )
                done += count
        return content

    @contextlib.contextmanager
    def _file(self, shard: int) -> Iterator[int]:
        """The shard's open file. One that stays open is never closed while another thread may read it."""
        with self._lock:
            kept = self._files[shard]
            file = self._open(shard) if kept is None else kept
            stays = self._files[shard] is not None
        try:
            yield file
        finally:
            if not stays:
                os.close(file)

    def _open(self, shard: int) -> int:
        """Open a shard; it stays open where the system allows that many files."""
        path = self._index.paths[shard]
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            advice = advice_against(error, "Restore the shard")
            raise UserError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
        # Samples are read in random order, and `will_need` asks for those that are needed.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        if file <= self._highest:
            self._files[shard] = file
        return file


def places(index: ShardIndex, samples: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(shard, offset, nbytes) of each sample."""
    rows = index.samples[samples]
    return zip(*(rows[name].tolist() for name in ("shard", "offset", "nbytes")), strict=True)


def _close(files: list[int | None]) -> None:
    for file in files:
        if file is not None:
            os.close(file)


def _allow_open_files(num: int) -> int:
    """Raise the soft limit of open files by `num`, as far as the hard limit goes.

    A thousand shards exceed the usual soft limit of 1,024.

    Returns:
      the highest file descriptor that may stay open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    soft = soft + num if hard == resource.RLIM_INFINITY else min(soft + num, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft - min(_OTHER_FILES, soft // 2)
