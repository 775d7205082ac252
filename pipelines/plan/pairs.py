"""How ranks and micro-batches divide a global batch: by pairs of rows that are mixed with each other.

Within a group of g rows, row i is mixed with row g - 1 - i, under one lambda and one box. So a pair is all that has to
stay together. Where ranks and micro-batches do not take whole groups, a micro-batch has the first rows of its pairs,
then the second ones in reverse: row i of B is then mixed with row B - 1 - i, as in one group of B rows.
"""

import dataclasses

import numpy as np

from pipelines.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Division:
    """A global batch, divided among ranks and micro-batches.

    Attributes:
      global_batch: rows of an update, over all ranks.
      mix_group: rows of a group.
      ranks: at most one for each pair. Their rows differ by at most one pair.
      micro_batch: the most rows that a rank processes at a time, an even number, or whole groups; None is all of them.
        The micro-batches of a rank have at most two sizes, which differ by one pair. With two rows a rank may have one
        micro-batch more than another; otherwise all ranks have as many.
    Raises:
      UserError: there are more ranks than pairs.
    """

    global_batch: int
    mix_group: int
    ranks: int = 1
    micro_batch: int | None = None

    def __post_init__(self):
        num_pairs = -(-self.global_batch // 2)
        if not 1 <= self.ranks <= num_pairs:
            raise UserError(
                f"ranks is {self.ranks}; a global batch of {self.global_batch} rows has {num_pairs} pairs, one or more "
                "for each rank",
                argument="ranks",
            )

    @property
    def has_whole_groups(self) -> bool:
        """True if every micro-batch is made of whole groups, and all have one size. Their rows are then in order."""
        rows, rest = divmod(self.global_batch, self.ranks)
        return not (rest or rows % self.mix_group or self._limit % self.mix_group or rows % self._limit)

    @property
    def _limit(self) -> int:
        """The most rows of a micro-batch: `micro_batch`, but no more than a rank has."""
        rows = -(-self.global_batch // self.ranks)
        return min(self.micro_batch or rows, rows)

    def rows(self, rank: int) -> list[np.ndarray]:
        """The rows of the global batch in each micro-batch of a rank: int64 [B] each, in the order of mixing."""
        if self.has_whole_groups:
            rows = np.arange(self.global_batch).reshape(self.ranks, -1, self._limit)
            return list(rows[rank])
        pairs = self._pairs()
        bounds = _bounds(len(pairs), self.ranks)
        own = pairs[bounds[rank] : bounds[rank + 1]]
        largest = int(np.diff(bounds).max())
        num = -(-largest // max((self.micro_batch or 2 * largest) // 2, 1))
        parts = _bounds(len(own), min(num, len(own)))
        return [_in_order(own[start:stop]) for start, stop in zip(parts[:-1], parts[1:], strict=True)]

    def sizes(self, rank: int) -> list[int]:
        """Return the number of rows in each micro-batch of a rank."""
        return [len(rows) for rows in self.rows(rank)]

    @property
    def all_sizes(self) -> list[int]:
        """The different sizes of micro-batches on all ranks, in increasing order: at most two for an even batch."""
        return sorted({size for rank in range(self.ranks) for size in self.sizes(rank)})

    def unmixed(self) -> np.ndarray:
        """The rows that are their own partners, the middle ones of groups of an odd size: int64."""
        if self.mix_group % 2 == 0:
            return np.zeros(0, dtype=np.int64)
        return np.arange(self.mix_group // 2, self.global_batch, self.mix_group)

    def _pairs(self) -> np.ndarray:
        """The two rows of each pair: int64 [P, 2]. Rows that are their own partners come last, two by two.

        The last of them may be alone; its second row is then -1.
        """
        first = np.arange(self.global_batch).reshape(-1, self.mix_group)
        half = self.mix_group // 2
        pairs = np.stack([first[:, :half], first[:, ::-1][:, :half]], axis=-1).reshape(-1, 2)
        unmixed = self.unmixed()
        unmixed = np.append(unmixed, [-1] * (len(unmixed) % 2)).astype(np.int64)
        return np.concatenate([pairs, unmixed.reshape(-1, 2)])


def _bounds(count: int, parts: int) -> np.ndarray:
    """Return where each part begins, and the end. Sizes differ by at most one; the larger parts come first."""
    return -(-count * np.arange(parts + 1) // parts)


def _in_order(pairs: np.ndarray) -> np.ndarray:
    """The first rows of pairs, then the second ones in reverse."""
    rows = np.concatenate([pairs[:, 0], pairs[::-1, 1]])
    return rows[rows >= 0]
