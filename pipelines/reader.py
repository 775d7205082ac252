"""Bytes from shards, and work done ahead in the background."""

import mmap
import queue
import resource
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from pipelines.errors import UserError
from pipelines.index import ShardIndex

_files_needed = 512  # by the rest of the process, and then by every reader


class ShardReader:
    """JPEG bytes of samples as views into memory-mapped shards.

    Nothing is held: the pages belong to the system, which drops them when memory is short, so shards may be larger than
    memory. `will_need` asks for pages before they are read. Safe to call from several threads.
    """

    def __init__(self, index: ShardIndex):
        self._index = index
        self._maps: list[tuple[mmap.mmap, np.ndarray] | None] = [None] * len(index.paths)
        self._lock = threading.Lock()
        _allow_open_files(len(index.paths))

    def read(self, samples: np.ndarray) -> list[np.ndarray]:
        """The bytes of each sample: uint8 [nbytes] views, valid for as long as they are referenced.

        Raises:
          UserError: a shard is missing, or shorter than the index says.
        """
        rows = self._index.samples[samples]
        return [self._view(*row) for row in zip(*self._columns(rows), strict=True)]

    def will_need(self, samples: np.ndarray) -> None:
        """Start reading the samples' pages from storage; returns at once. Raises as `read`."""
        for shard, offset, nbytes in zip(*self._columns(self._index.samples[samples]), strict=True):
            self._view(shard, offset, nbytes)
            start = offset - offset % mmap.PAGESIZE
            self._open(shard)[0].madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)

    @staticmethod
    def _columns(rows: np.ndarray) -> list[list[int]]:
        return [rows[name].tolist() for name in ("shard", "offset", "nbytes")]

    def _view(self, shard: int, offset: int, nbytes: int) -> np.ndarray:
        content = self._open(shard)[1]
        if offset < 0 or offset + nbytes > len(content):
            raise UserError(
                f"{self._index.paths[shard]}: the index names bytes [{offset}, {offset + nbytes}), "
                f"the shard has {len(content)}. Restore the shard, or build the dataset again"
            )
        return content[offset : offset + nbytes]

    def _open(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        if (opened := self._maps[shard]) is not None:
            return opened
        with self._lock:
            if self._maps[shard] is None:
                path = self._index.paths[shard]
                try:
                    with open(path, "rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                    raise UserError(f"{path}: cannot be read ({error})") from error
                # Samples are read in random order; what is needed is asked for in `will_need`.
                mapped.madvise(mmap.MADV_RANDOM)
                self._maps[shard] = mapped, np.frombuffer(mapped, dtype=np.uint8)
            return self._maps[shard]


def _allow_open_files(num: int) -> None:
    """Raise the soft limit for `num` more open files: a mapped file stays open in Python, and a thousand shards exceed
    the usual limit of 1,024."""
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
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()
