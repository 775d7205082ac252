"""Bytes from shards, and work done ahead in the background."""

import collections
import errno
import os
import queue
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from pipelines.common.errors import UserError
from pipelines.shards.index import ShardIndex

PLANS_AHEAD = 8  # micro-batches whose bytes are asked for: the recipe's step on one rank
_OTHER_FILES = 512  # that the rest of the process may open; half of the limit, where that is less
_allowed = 0  # files that all readers together may keep open


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
        self._room = _allow_open_files(len(index.paths))  # files that may still stay open
        weakref.finalize(self, _close, self._files, self._room)

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
            file = self._open(shard)
            try:
                os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                self._done(shard, file)

    def _read(self, shard: int, offset: int, nbytes: int) -> np.ndarray:
        content = np.empty(nbytes, dtype=np.uint8)
        file = self._open(shard)
        try:
            done = 0
            while done < nbytes:
                count = os.preadv(file, [content[done:]], offset + done)
                if count == 0:
                    raise UserError(
                        f"{self._index.paths[shard]}: the index names bytes [{offset}, {offset + nbytes}), "
                        f"the shard has {os.fstat(file).st_size}. Restore the shard, or build the dataset again"
                    )
                done += count
        finally:
            self._done(shard, file)
        return content

    def _open(self, shard: int) -> int:
        """The shard's file; `_done` must follow its use."""
        if (opened := self._files[shard]) is not None:
            return opened
        with self._lock:
            if self._files[shard] is not None:
                return self._files[shard]
            path = self._index.paths[shard]
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                more = ". Allow more open files: 'ulimit -n 4096'" if error.errno == errno.EMFILE else ""
                raise UserError(f"{path}: cannot be read ({error.strerror}){more}") from error
            # Samples are read in random order; what is needed is asked for in `will_need`.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            if self._room:
                self._room -= 1
                self._files[shard] = file
            return file

    def _done(self, shard: int, file: int) -> None:
        """Close a file that does not stay open. One that does is never closed while another thread may read it."""
        if self._files[shard] != file:
            os.close(file)


def places(index: ShardIndex, samples: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(shard, offset, nbytes) of each sample."""
    rows = index.samples[samples]
    return zip(*(rows[name].tolist() for name in ("shard", "offset", "nbytes")), strict=True)


def _close(files: list[int | None], room: int) -> None:
    global _allowed
    _allowed -= room
    for file in files:
        if file is not None:
            os.close(file)


def _allow_open_files(num: int) -> int:
    """How many of `num` files a new reader may keep open. The soft limit is raised where that is needed and possible.

    A thousand shards exceed the usual soft limit of 1,024. Under a hard limit that is too low a reader gets half of
    what is left for all readers.
    """
    global _allowed
    soft, hard = (sys.maxsize if x == resource.RLIM_INFINITY else x for x in resource.getrlimit(resource.RLIMIT_NOFILE))
    needed = _allowed + num + _OTHER_FILES
    if soft < needed and soft < hard:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    left = soft - min(_OTHER_FILES, soft // 2) - _allowed
    room = num if soft >= needed else max(0, min(num, left // 2))
    _allowed += room
    return room


T = TypeVar("T")


def look_ahead(items: Iterable[T], depth: int, announce: Callable[[T], None]) -> Iterator[T]:
    """The items, each announced `depth` items before its turn (the first ones at once)."""
    waiting: collections.deque[T] = collections.deque()
    for item in items:
        announce(item)
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


class _End:
    """Closes the queue; carries the error that ended the work, if one did."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def read_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items, made in a background thread up to `depth` ahead of their use.

    Order and values are those of the plain loop; an exception comes out where the item would have. Closing the
    generator stops the thread after the item it is working on.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                put(item)
                if stop.is_set():
                    break
            put(_End())
        except BaseException as error:
            put(_End(error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        error, item = item.error, None  # the end and this frame would keep the error alive, and it them
        if error is not None:
            try:
                raise error
            finally:
                del error
    finally:
        stop.set()
        thread.join()
