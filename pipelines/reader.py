"""Bytes from shards, and work done ahead in the background."""

import collections
import os
import queue
import resource
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from pipelines.errors import UserError
from pipelines.index import ShardIndex

PLANS_AHEAD = 8  # micro-batches whose bytes are asked for: the recipe's step on one rank
_files_needed = 512  # by the rest of the process, and then by every reader


class ShardReader:
    """JPEG bytes of samples, read where the index says they lie.

    `will_need` has the system read ahead what the plan needs next; `read` then copies it out of the page cache. That is
    as fast as memory maps (docs/performance.md), and a disk that fails is an error instead of a SIGBUS. Safe to call
    from several threads.
    """

    def __init__(self, index: ShardIndex):
        self._index = index
        self._files: list[int | None] = [None] * len(index.paths)
        self._lock = threading.Lock()
        _allow_open_files(len(index.paths))
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
            os.posix_fadvise(self._open(shard), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, shard: int, offset: int, nbytes: int) -> np.ndarray:
        content = np.empty(nbytes, dtype=np.uint8)
        done = 0
        while done < nbytes:
            count = os.preadv(self._open(shard), [content[done:]], offset + done)
            if count == 0:
                size = os.fstat(self._open(shard)).st_size
                raise UserError(
                    f"{self._index.paths[shard]}: the index names bytes [{offset}, {offset + nbytes}), "
                    f"the shard has {size}. Restore the shard, or build the dataset again"
                )
            done += count
        return content

    def _open(self, shard: int) -> int:
        if (opened := self._files[shard]) is not None:
            return opened
        with self._lock:
            if self._files[shard] is None:
                path = self._index.paths[shard]
                try:
                    file = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
                # Samples are read in random order; what is needed is asked for in `will_need`.
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
                self._files[shard] = file
            return self._files[shard]


def places(index: ShardIndex, samples: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(shard, offset, nbytes) of each sample."""
    rows = index.samples[samples]
    return zip(*(rows[name].tolist() for name in ("shard", "offset", "nbytes")), strict=True)


def _close(files: list[int | None]) -> None:
    global _files_needed
    _files_needed -= len(files)
    for file in files:
        if file is not None:
            os.close(file)


def _allow_open_files(num: int) -> None:
    """Raise the soft limit for `num` more open files: a thousand shards exceed the usual limit of 1,024."""
    global _files_needed
    _files_needed += num
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _files_needed:
        return
    if hard != resource.RLIM_INFINITY and hard < _files_needed:
        raise UserError(
            f"the dataset needs {_files_needed} open files, the system allows {hard}: raise it with "
            f"'ulimit -Hn {_files_needed}', or build the dataset with larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (_files_needed, hard))


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
