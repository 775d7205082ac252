"""Work done ahead gives the items of the plain loop."""

import subprocess
import sys

import pytest

from conftest import REPOSITORY
from pipelines.prefetch import read_ahead


def test_read_ahead_gives_the_same_items_in_order():
    assert list(read_ahead(range(100), depth=3)) == list(range(100))
    assert list(read_ahead([], depth=3)) == []


def test_read_ahead_raises_the_error_where_the_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise RuntimeError("third")

    ahead = read_ahead(items(), depth=1)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(RuntimeError, match="third"):
        next(ahead)


def test_read_ahead_stops_and_closes_its_source_when_its_user_stops():
    closed = []

    def items():
        try:
            yield from range(10**9)
        finally:
            closed.append(True)

    ahead = read_ahead(items(), depth=2)
    assert next(ahead) == 0
    ahead.close()
    assert closed == [True]


def test_read_ahead_that_is_in_use_when_python_ends_says_nothing():
    script = "from pipelines.prefetch import read_ahead; ahead = read_ahead(iter(range(9)), 3); next(ahead)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
