"""The order of the images in an epoch, as pure functions of (seed, epoch, entry) in NumPy.

An entry is an index into the epoch's order, 0 <= entry < number of images. No order is ever held in memory: an entry
costs the same at the start of an epoch and deep inside one, whatever the number of images.
"""

import functools

import numpy as np

from pipelines.plan import rng
from pipelines.plan.rng import Stream
from pipelines.shards.index import ShardIndex


def global_order(seed: int, epoch: int, num_samples: int, entry: np.ndarray) -> np.ndarray:
    """The image at each entry where all images are shuffled together: int64, same shape as `entry`."""
    return rng.permute(seed, Stream.ORDER, epoch, num_samples, entry)


def shard_starts(index: ShardIndex) -> np.ndarray:
    """The first sample of each shard, and the number of all samples at the end: int64 [shards + 1].

    An index holds the samples of a shard together and the shards in order.
    """
    return np.cumsum([0, *np.bincount(index.samples["shard"], minlength=len(index.paths))])


def window_order(seed: int, epoch: int, starts: np.ndarray, window_shards: int, entry: np.ndarray) -> np.ndarray:
    """The image at each entry where only images of near shards are shuffled together.

    The shards are shuffled, `window_shards` shards that follow each other are a window (the last may have fewer), and
    the images of a window are shuffled. So a run reads from `window_shards` files at a time.

    Args:
      starts: as from `shard_starts`.
      entry: integers [n].
    Returns:
      int64 [n]; over an epoch's entries each image occurs once.
    """
    num_shards = len(starts) - 1
    shards = _shard_order(seed, epoch, num_shards)
    # The first entry of each shard in the epoch's order, and the number of all entries at the end: [shards + 1].
    firsts = np.concatenate([[0], np.cumsum(np.diff(starts)[shards])])
    window = (np.searchsorted(firsts, entry, side="right") - 1) // window_shards
    shuffled = np.empty(len(entry), dtype=np.int64)
    for w in np.unique(window).tolist():
        first, stop = firsts[w * window_shards], firsts[min((w + 1) * window_shards, num_shards)]
        inside = window == w
        offset = rng.permute(seed, Stream.WINDOW_ORDER, epoch, int(stop - first), entry[inside] - first, part=w)
        shuffled[inside] = first + offset
    shard = np.searchsorted(firsts, shuffled, side="right") - 1
    return starts[shards[shard]] + shuffled - firsts[shard]


# All steps of an epoch ask for the same order, and a reader may be an epoch ahead.
@functools.lru_cache(maxsize=2)
def _shard_order(seed: int, epoch: int, num_shards: int) -> np.ndarray:
    return rng.permute(seed, Stream.SHARD_ORDER, epoch, num_shards, np.arange(num_shards))
