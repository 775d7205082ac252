"""Work that is done ahead of its use: bytes that are asked for early, and items that a background thread makes."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

PLANS_AHEAD = 8  # micro-batches whose bytes are asked for: the recipe's step on one rank

T = TypeVar("T")


def look_ahead(items: Iterable[T], depth: int, announce: Callable[[T], None] = lambda item: None) -> Iterator[T]:
    """The items in order, each of them taken and announced while `depth` others are still before it."""
    waiting: collections.deque[T] = collections.deque()
    for item in items:
        announce(item)
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def read_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items, made in a background thread up to `depth` ahead of their use.

    Order and values are those of the plain loop; an exception comes out where the item would have. Closing the
    generator stops the thread after the item it is working on.
    """
    iterator, end = iter(items), object()
    waiting: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        try:
            waiting.extend(thread.submit(next, iterator, end) for _ in range(depth))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, iterator, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
            closing = None
            # At the end of Python no thread takes work any more, and the process frees what closing would.
            with contextlib.suppress(RuntimeError):
                closing = thread.submit(getattr(iterator, "close", lambda: None))
            if closing is not None:
                closing.result()
