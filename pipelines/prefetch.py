"""Work that is done ahead of its use: bytes that are asked for early, and items that a background thread makes."""

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

PLANS_AHEAD = 8  # micro-batches whose bytes are asked for: the recipe's step on one rank

T = TypeVar("T")


def look_ahead(items: Iterable[T], depth: int, announce: Callable[[T], None]) -> Iterator[T]:
    """The items in order, each of them announced while `depth` others are still before it."""
    waiting: collections.deque[T] = collections.deque()
    for item in items:
        announce(item)
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


class _End:
    """Closes the queue, and holds the error that ended the work, if one did."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def read_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items, made in a background thread up to `depth` ahead of their use.

    Order and values are those of the plain loop; an exception comes out where the item would have. Closing the
    generator stops the thread after the item it is working on.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(ready, items, stop), name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        error = item.error
        del item
        if error is not None:
            try:
                raise error
            finally:
                # This breaks the reference cycle error -> traceback -> this frame -> error.
                del error
    finally:
        stop.set()
        thread.join()


def _fill(ready: "queue.Queue[T | _End]", items: Iterable[T], stop: threading.Event) -> None:
    """Put the items and an end into a queue, unless `stop` is set before."""
    iterator = iter(items)
    try:
        for item in iterator:
            _put(ready, item, stop)
            if stop.is_set():
                break
        _put(ready, _End(), stop)
    except BaseException as error:
        _put(ready, _End(error), stop)
    finally:
        if close := getattr(iterator, "close", None):
            close()


def _put(ready: "queue.Queue[T | _End]", item: T | _End, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue
