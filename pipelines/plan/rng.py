"""Counter-based random numbers: every draw is a function of (seed, stream, position), never of history.

Only raw 64-bit words of Philox are used. NumPy guarantees that those stay the same over its versions, but not the
methods of Generator; a run resumed under another NumPy must not see other data.
"""

import enum

import numpy as np

_WORDS_PER_COUNT = 4  # Philox4x64 emits four 64-bit words for each value of its counter


class Stream(enum.IntEnum):
    """Independent sequences under one seed. The numbers are part of the plan: never renumber them."""

    ORDER = 0  # the permutation of an epoch: one row for each epoch
    CROP = 1  # crop and flip
    RANDAUGMENT = 2
    MIX = 3  # one row for each mixing group
    MODEL = 4  # seeds for dropout and the like
    SHARDS = 5  # the order in which samples are written to shards
    SYNTHETIC = 6
    SHARD_ORDER = 7  # the order of the shards in an epoch: one row for each epoch
    WINDOW_ORDER = 8  # the order of the samples in a window of shards: one row for each window of an epoch
    COLOR_JITTER = 9
    THREE_AUGMENT = 10
    ERASE = 11


def words(seed: int, stream: Stream, start: int, stop: int, k: int) -> np.ndarray:
    """Raw random words for rows [start, stop).

    Args:
      seed: 0 <= seed < 2**64.
      start, stop: absolute row numbers, 0 <= start <= stop.
      k: words a row, a multiple of 4 (Philox emits 4 words a count), the same for every use of a stream.
    Returns:
      uint64 [stop - start, k]. Row i depends only on (seed, stream, k, start + i).
    Source: Philox4x64-10, Salmon et al. 2011, as numpy.random.Philox.
    """
    assert k > 0 and k % _WORDS_PER_COUNT == 0 and 0 <= start <= stop
    # Seed and stream are the two words of the key: nothing is added up, so no two pairs share a sequence.
    key = np.array([seed, int(stream)], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=start * (k // _WORDS_PER_COUNT))
    return philox.random_raw((stop - start) * k).reshape(stop - start, k)


def uniforms(seed: int, stream: Stream, start: int, stop: int, k: int) -> np.ndarray:
    """Uniform draws for rows [start, stop).

    Args: as for `words`.
    Returns:
      float64 [stop - start, k] in [0, 1), multiples of 2**-53. Row i depends only on (seed, stream, k, start + i).
    """
    return (words(seed, stream, start, stop, k) >> np.uint64(11)) * 2.0**-53


def permute(seed: int, stream: Stream, epoch: int, n: int, index: np.ndarray, *, part: int = 0) -> np.ndarray:
    """The images of indices under a random permutation of range(n). Each part of each epoch has its own.

    The permutation is never held in memory: an index costs the same for a thousand samples and for a billion, and a run
    resumed in the middle of an epoch has nothing to catch up on.

    Args:
      epoch: 0 <= epoch < 2**63.
      index: integers [...] in [0, n).
      part: the number of one of an epoch's permutations, where there are several; 0 <= part < 2**64.
    Returns:
      int64, same shape; over all of range(n) each value occurs once. Depends only on (seed, stream, epoch, part, n,
      index).
    Source: a Feistel network (Luby & Rackoff 1988, four rounds suffice; eight here) over the next even number of bits,
      walked until the value falls below n (Black & Rogaway 2002); the round function is splitmix64's finalizer
      (Steele et al. 2014).
    """
    # Epoch and part fill words of their own in Philox's 256-bit counter, so no two pairs share a row.
    row = (part << 64) | epoch
    keys = words(seed, stream, row, row + 1, _ROUNDS)[0]
    half_bits = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    value = np.asarray(index).astype(np.uint64).ravel()
    value = _feistel(value, keys, half_bits)
    while (outside := np.flatnonzero(value >= n)).size:
        value[outside] = _feistel(value[outside], keys, half_bits)
    return value.astype(np.int64).reshape(np.shape(index))


_ROUNDS = 8


def _feistel(value: np.ndarray, keys: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    """Permute the numbers below 4**half_bits, with a round for each key: uint64 [n], uint64 [rounds] -> uint64 [n]."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, (left ^ mixed ^ (mixed >> np.uint64(31))) & mask
    return (left << half_bits) | right
