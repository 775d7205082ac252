"""Reading JPEGs out of shards in the order of a plan: our reader against memory maps and plain reads, and against the
readers of DALI and webdataset, which go through the shards from front to back; one reading thread each.

Warm means from the page cache. Cold means after the shards' pages were dropped from it (`posix_fadvise`, which other
readers of the same files and some file systems may prevent: a cold row that is as fast as a warm one says so).
"""

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
from pipelines.prefetch import PLANS_AHEAD, look_ahead
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader, places
from tools.lib.common.photos import write_common_photographs
from tools.lib.common.timing import interleaved, ratio, timed
from tools.lib.shards.job import BuildOptions, build

COLUMNS = {"what": "what", "mb_per_s": "MB/s", "min": "min", "max": "max", "ratio": "ratio", "of": "of"}
OURS = "ours (pread, fadvise)"
_BATCH = 128


def read(images: int, repeats: int) -> list[dict]:
    """The rows of the benchmark, over `images` photographs; "augmentation" is warm or cold."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "src", Path(scratch) / "out"
        write_common_photographs(folder, images)
        build(folder, out, BuildOptions(samples_per_shard=max(1, images // 8)), workers=2)
        index = read_index(out, "train")
        order = rng.permute(0, rng.Stream.ORDER, 0, len(index), np.arange(len(index)))
        batches = np.array_split(order, max(1, len(order) // _BATCH))
        nbytes = int(index.samples["nbytes"].sum(dtype=np.int64))
        ways = {name: way for name, way in _WAYS.items() if _is_installed(_NEEDS.get(name, "numpy"))}
        rows = [{"what": name, "augmentation": "warm", "note": "not installed"} for name in _WAYS if name not in ways]
        for temperature in ("warm", "cold"):
            drop = (lambda: _drop(index)) if temperature == "cold" else (lambda: None)
            candidates = {name: _after(drop, _total(function, index, batches)) for name, function in ways.items()}
            seconds = interleaved(candidates, repeats)
            rows += [
                {
                    "what": name,
                    "augmentation": temperature,
                    "mb_per_s": round(nbytes / statistics.median(times) / 1e6),
                    "min": round(nbytes / max(times) / 1e6),
                    "max": round(nbytes / min(times) / 1e6),
                    "ratio": ratio(seconds[OURS], times),
                    "of": OURS,
                }
                for name, times in seconds.items()
            ]
    return rows


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would lie in
        return False


def _drop(index: ShardIndex) -> None:
    """Have the system forget the shards' pages."""
    for path in index.paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _after(prepare: Callable[[], None], run: Callable[[], None]) -> Callable[[], float]:
    """`run` as a candidate; `prepare` comes before it and does not count."""
    measure = timed(run)

    def seconds() -> float:
        prepare()
        return measure()

    return seconds


def _total(function: Callable, index: ShardIndex, batches: list[np.ndarray]) -> Callable[[], None]:
    """Goes through every image; each byte is looked at, since a memory map reads nothing before."""

    def run() -> None:
        count = 0
        for content in function(index, batches):
            np.add.reduce(np.frombuffer(content, dtype=np.uint8))
            count += 1
        assert count == len(index), (function, count)

    return run


# --- the ways: all images of an index, some in the order of the batches ---


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


def _mapped_advised(index: ShardIndex, batches: list[np.ndarray]) -> Iterator:
    return _mapped(index, batches, advise=True)


def _mapped_plain(index: ShardIndex, batches: list[np.ndarray]) -> Iterator:
    return _mapped(index, batches, advise=False)


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
    "memory map, madvise": _mapped_advised,
    "memory map": _mapped_plain,
    "DALI's reader": _dali,
    "webdataset": _webdataset,
}
_NEEDS = {"DALI's reader": "nvidia.dali", "webdataset": "webdataset"}
