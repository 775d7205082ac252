"""The rows of a plan: everything that an executor needs for B positions."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The rows of B positions, with all that an executor needs to carry them out.

    The order of the stages: decode, cut out `crop`, resize it to `resize`, cut out the square window of side
    `image_size` at `window`, flip, the operations from left to right, fill the box `erase`. Mixing follows in the
    training step.

    Attributes:
      positions: int64 [B], the position of each row.
      image_size: side of the square output, pixels.
      interpolation: filter of the resize, bicubic or bilinear, antialiased.
      fill: RGB that geometric operations put where the source has no pixel, and erasing everywhere in its box.
      mix_group: rows that are mixed with each other, partner = the group reversed; 0 where none of these rows are.
      sample: int32 [B], row of the ShardIndex.
      crop: int32 [B, 4], top, left, height, width in source pixels.
      resize: int32 [B, 2], height and width that the crop is resized to.
      window: int32 [B, 2], top and left of the window in the resized crop.
      flip: bool [B].
      ops: uint8 [B, L], values of draws.Op.
      args: float32 [B, L], their arguments.
      erase: int32 [B, 4], top, left, height, width of the box that becomes the fill colour; zeros erase nothing.
      lam: float32 [B], weight of the row's own label after mixing.
      box: int32 [B, 4], top, left, height, width of what comes from the partner; empty means mixup.
      valid: bool [B], False for rows that only fill up the batch; their pixels and labels mean nothing.
      partners: the rows that these are mixed with, where these are only a part of a group; then mix_group is 0. None
        elsewhere.
      capacity: the most rows of any plan that comes with this one, where their sizes differ; 0 elsewhere.
    """

    positions: np.ndarray
    image_size: int
    interpolation: str
    fill: tuple[int, int, int]
    mix_group: int
    sample: np.ndarray
    crop: np.ndarray
    resize: np.ndarray
    window: np.ndarray
    flip: np.ndarray
    ops: np.ndarray
    args: np.ndarray
    erase: np.ndarray
    lam: np.ndarray
    box: np.ndarray
    valid: np.ndarray
    partners: "BatchPlan | None" = None
    capacity: int = 0

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def position(self) -> int:
        """The position of the first row."""
        return int(self.positions[0])

    def split(self, size: int) -> Iterator["BatchPlan"]:
        """The same rows, `size` at a time: the fixed cost of planning is paid once for all of them."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def take(self, rows: slice | np.ndarray) -> "BatchPlan":
        """Some of the rows."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        partners = None if self.partners is None else self.partners.take(rows)
        return dataclasses.replace(self, partners=partners, **columns)

    @staticmethod
    def join(parts: Sequence["BatchPlan"]) -> "BatchPlan":
        """The rows of all parts, one after another. The parts are of one plan and image size, without partners."""
        columns = [name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
        return dataclasses.replace(parts[0], **joined)
