"""Reading JPEGs out of shards in the order of a plan, with one reading thread.

Our reader is compared with memory maps and plain reads, and with the readers of DALI and webdataset, which read the
shards from front to back.

Warm reads come from the page cache. Cold ones come after the shards' pages were dropped from it with `posix_fadvise`,
which other readers of the same files and some file systems may prevent; a cold row is then as fast as a warm one.
"""

import functools
import importlib.util
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from pipelines.plan import rng
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import PLANS_AHEAD, ShardReader, look_ahead, places
from tools.lib.benchmark.photographs import photograph_index
from tools.lib.benchmark.results import Row
from tools.lib.common.timing import interleaved, ratio, timed

COLUMNS = {"what": "what", "mb_per_s": "MB/s", "min": "min", "max": "max", "ratio": "ratio", "of": "of"}
OURS = "ours (pread, fadvise)"
_BATCH = 128


def read(images: int, repeats: int) -> list[Row]:
    """The rows of the benchmark, over `images` photographs; "augmentation" is warm or cold."""
    with tempfile.TemporaryDirectory() as scratch:
        index = photograph_index(Path(scratch), images, samples_per_shard=max(1, images // 8))
        order = rng.permute(0, rng.Stream.ORDER, 0, len(index), np.arange(len(index)))
        batches = np.array_split(order, max(1, len(order) // _BATCH))
        megabytes = int(index.samples["nbytes"].sum(dtype=np.int64)) / 1e6
        ways = {name: way for name, way in _WAYS.items() if _is_installed(_NEEDS.get(name, "numpy"))}
        rows: list[Row] = [
            {"what": name, "augmentation": "warm", "note": "not installed"} for name in _WAYS if name not in ways
        ]
        for temperature in ("warm", "cold"):
            candidates = {}
            for name, way in ways.items():
                read_all = timed(functools.partial(_read_all, way, index, batches))
                candidates[name] = functools.partial(_cold, index, read_all) if temperature == "cold" else read_all
            seconds = interleaved(candidates, repeats)
            for name, times in seconds.items():
                rows.append(
                    {
                        "what": name,
                        "augmentation": temperature,
                        "mb_per_s": round(megabytes / statistics.median(times)),
                        "min": round(megabytes / max(times)),
                        "max": round(megabytes / min(times)),
                        "ratio": ratio(seconds[OURS], times),
                        "of": OURS,
                    }
                )
    return rows


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Its parent package is missing, too.
        return False


def _drop(index: ShardIndex) -> None:
    """Drop the shards' pages from the page cache."""
    for path in index.paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cold(index: ShardIndex, read_all: Callable[[], float]) -> float:
    """The seconds of `read_all` after the pages were dropped; dropping them does not count."""
    _drop(index)
    return read_all()


def _read_all(way: Callable[..., Iterator], index: ShardIndex, batches: list[np.ndarray]) -> None:
    """Read every image. Each byte is looked at, because a memory map reads nothing before."""
    count = 0
    for content in way(index, batches):
        np.add.reduce(np.frombuffer(content, dtype=np.uint8))
        count += 1
    assert count == len(index), (way, count)


# --- the ways: each yields all images of an index; our own follow the order of the batches ---


def _ours(index: ShardIndex, batches: list[np.ndarray]) -> Iterator:
    reader = ShardReader(index)
    for batch in look_ahead(batches, PLANS_AHEAD, reader.will_need):
        yield from reader.read(batch)


def _pread(index: ShardIndex, batches: list[np.ndarray]) -> Iterator:
    reader = ShardReader(index)
    for batch in batches:
        yield from reader.read(batch)


def _mapped(index: ShardIndex, batches: list[np.ndarray], *, advise: bool) -> Iterator:
    maps = []
    for path in index.paths:
        with open(path, "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            maps[-1].madvise(mmap.MADV_RANDOM)

    def announce(batch: np.ndarray) -> None:
        for shard, offset, nbytes in places(index, batch) if advise else ():
            start = offset - offset % mmap.PAGESIZE
            maps[shard].madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)

    for batch in look_ahead(batches, PLANS_AHEAD, announce):
        for shard, offset, nbytes in places(index, batch):
            yield memoryview(maps[shard])[offset : offset + nbytes]


def _dali(index: ShardIndex, batches: list[np.ndarray]) -> Iterator:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def
    def graph():
        return fn.readers.webdataset(
            paths=[str(path) for path in index.paths],
            index_paths=[str(path.with_suffix(".idx")) for path in index.paths],
            ext=["jpg"],
        )

    pipeline = graph(batch_size=1, num_threads=1, device_id=None)
    pipeline.build()
    for _ in range(len(index)):
        (jpegs,) = pipeline.run()
        yield jpegs.at(0)


def _webdataset(index: ShardIndex, batches: list[np.ndarray]) -> Iterator:
    import webdataset

    shards = [str(path) for path in index.paths]
    with closing(iter(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))) as samples:
        for sample in samples:
            yield sample["jpg"]


_WAYS = {
    OURS: _ours,
    "pread": _pread,
    "memory map, madvise": functools.partial(_mapped, advise=True),
    "memory map": functools.partial(_mapped, advise=False),
    "DALI's reader": _dali,
    "webdataset": _webdataset,
}
_NEEDS = {"DALI's reader": "nvidia.dali", "webdataset": "webdataset"}
