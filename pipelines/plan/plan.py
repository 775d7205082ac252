"""The plan: what every position of a run sees, as a pure function. NumPy only, no I/O, no state.

A position counts samples since the run began. Step s covers positions [s * G, (s + 1) * G) of the global batch G; an
epoch has len(index) // G steps, and the images that are left over are dropped. A global batch is made of groups of
`mix_group` positions, which share one mixing draw and are mixed with themselves reversed.

What a position sees is its view: image, crop, flip, operations and mixing. Where `augment.cycle_epochs` is set, later
positions repeat the views of earlier ones.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.settings import setting, values_in_old_plans
from pipelines.plan import draws, order, rng
from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.explain import explain, explain_mix
from pipelines.plan.pairs import Division
from pipelines.plan.rng import Stream
from pipelines.shards.index import ShardIndex

# Version of the arithmetic in this file, order.py and draws.py. Checkpoints of another version are refused.
PLAN_VERSION = 1
# Evaluation looks at the middle of images that are longer than this many of their short sides. At the usual 235 px a
# JPEG of 65,500 x 1 would become one of 11 GB.
LONGEST = 100
# The largest side of an output image, pixels: far above any of timm's, and a batch of larger ones fits no memory.
LARGEST_SIDE = 4096
IMAGENET_MEAN_RGB = (124, 116, 104)  # the colour that ImageNet's usual normalisation maps to nearly zero
_PLANNED_ROWS = 1024  # Small batches are planned together: NumPy takes as long for a few rows as for a thousand.


SizeSchedule = Sequence[tuple[int, int]]


def size_schedule(image_size: int | SizeSchedule) -> tuple[tuple[int, int], ...]:
    """The image sizes of a run: pairs (epoch, side in pixels), each size holds from its epoch until the next pair's.

    Raises:
      UserError: the first epoch is not 0, epochs do not increase, or a size is not in [1, LARGEST_SIDE].
    """
    pairs = ((0, image_size),) if isinstance(image_size, int) else tuple((epoch, size) for epoch, size in image_size)
    epochs, sizes = [epoch for epoch, _ in pairs], [size for _, size in pairs]
    if epochs[:1] != [0] or epochs != sorted({*epochs}) or not all(1 <= size <= LARGEST_SIDE for size in sizes):
        shown = image_size if isinstance(image_size, int) else [list(pair) for pair in pairs]
        raise UserError(
            f"image_size is {shown}; it must be a size from 1 to {LARGEST_SIDE}, or [epoch, size] pairs whose epochs "
            "increase from 0 on, like [[0,128],[100,160]]",
            argument="image_size",
        )
    return pairs


def check_cycle(image_size: int | SizeSchedule, cycle_epochs: int) -> None:
    """Raise a UserError if image sizes change in epochs whose views are those of earlier ones, of another size.

    Args:
      image_size: as for `size_schedule`.
      cycle_epochs: as for AugmentConfig.
    """
    epoch, size = size_schedule(image_size)[-1]
    if cycle_epochs and epoch >= cycle_epochs:
        raise UserError(
            f"image_size: {size} px begin with epoch {epoch}, but augment.cycle_epochs is {cycle_epochs}, so epoch "
            f"{epoch} repeats epoch {epoch % cycle_epochs}: let all sizes begin earlier, or raise augment.cycle_epochs",
            argument="image_size",
        )


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """The training set, augmented, as a function of the position.

    `plan[5]` and `plan[100:200]` are the rows of any positions. Where they hold only a part of a mixing group, they
    come with their partners, which lie in the rest of the group.

    Attributes:
      index: the images.
      augment: the recipe.
      seed: 0 <= seed < 2**64; everything that is drawn depends on it.
      global_batch: positions a step, over all ranks; a multiple of augment.mix_group.
      image_size: side of the square training image, pixels; or (epoch, size) pairs as for `size_schedule`.
      fill: see BatchPlan; the student's mean colour, which augment.fill replaces.
      window_shards: shards whose images are shuffled together (order.window_order); 0 shuffles all images together.
    Raises:
      UserError: the groups do not divide the global batch, the dataset is smaller than one global batch, or the sizes
        are no schedule, or change after the epochs that are repeated.
    """

    index: ShardIndex
    augment: AugmentConfig = AugmentConfig()
    seed: int = 0
    global_batch: int = 1024
    image_size: int | SizeSchedule = 224
    fill: tuple[int, int, int] = IMAGENET_MEAN_RGB
    window_shards: int = setting(0, in_old_plans=0)

    def __post_init__(self):
        check_cycle(self.image_size, self.augment.cycle_epochs)
        group = self.augment.mix_group
        if self.global_batch < 1 or self.global_batch % group:
            reason = f"it must be a multiple of augment.mix_group, {group}"
            raise UserError(f"global_batch is {self.global_batch}; {reason}", argument="global_batch")
        if len(self.index) < self.global_batch:
            raise UserError(
                f"global_batch: the training set has {len(self.index)} images, fewer than one global batch of "
                f"{self.global_batch}: lower it (and augment.mix_group), or use more images",
                argument="global_batch",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the images that are left over after the last one are dropped."""
        return len(self.index) // self.global_batch

    def image_size_at(self, epoch: int) -> int:
        """Side of the square training image in an epoch, pixels."""
        if self.augment.cycle_epochs:
            epoch %= self.augment.cycle_epochs
        return next(size for start, size in reversed(size_schedule(self.image_size)) if start <= epoch)

    def describe(self) -> dict:
        """Everything the plan depends on, as plain values. Equal descriptions mean equal plans."""
        sizes = size_schedule(self.image_size)
        augment = dataclasses.asdict(self.augment)
        del augment["fill"]  # The plan depends on the colour, whoever chose it.
        return {
            "plan_version": PLAN_VERSION,
            "dataset": self.index.digest,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "image_size": sizes[0][1] if len(sizes) == 1 else [list(pair) for pair in sizes],
            "fill": list(self._fill),
            "window_shards": self.window_shards,
            **{
                f"augment.{name}": list(value) if isinstance(value, tuple) else value for name, value in augment.items()
            },
        }

    @property
    def _fill(self) -> tuple[int, int, int]:
        return self.fill if self.augment.fill is None else self.augment.fill

    def views(self, positions: np.ndarray) -> np.ndarray:
        """The position whose view each position has: its own unless augment.cycle_epochs repeats an earlier one.

        Args:
          positions: int64 [...].
        Returns:
          int64, same shape. Rows of equal views are equal in all columns but `positions`.
        """
        return positions % self._cycle if self._cycle else positions

    @property
    def _cycle(self) -> int:
        """The number of positions whose views are repeated; 0 where each position has its own."""
        return self.augment.cycle_epochs * self.steps_per_epoch * self.global_batch

    def rows(self, start: int, stop: int) -> BatchPlan:
        """The plan for positions [start, stop), both multiples of augment.mix_group.

        Any split of a range gives the same rows: `rows(a, c)` is `rows(a, b)` followed by `rows(b, c)`.

        Raises:
          ValueError: the range is none, or its images are of two sizes.
        """
        group = self.augment.mix_group
        if start % group or stop % group or not 0 <= start < stop:
            raise ValueError(f"positions [{start}, {stop}) are not whole groups of {group}")
        image_size = self._size_of(start, stop)
        parts = [self._own_views(*views, image_size) for views in self._ranges_of_views(start, stop)]
        rows = parts[0] if len(parts) == 1 else BatchPlan.join(parts)
        return dataclasses.replace(rows, positions=np.arange(start, stop))

    def _ranges_of_views(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of positions whose views positions [start, stop) have, in their order."""
        cycle = self._cycle
        if not cycle:
            return [(start, stop)]
        seams = range((start // cycle + 1) * cycle, stop, cycle)
        ranges = itertools.pairwise([start, *seams, stop])
        return [(first % cycle, first % cycle + last - first) for first, last in ranges]

    def _own_views(self, start: int, stop: int, image_size: int) -> BatchPlan:
        """The rows of positions [start, stop), each of which has its own view."""
        group = self.augment.mix_group
        positions = np.arange(start, stop)
        sample = self._samples(positions)
        rows = self.index.samples[sample]
        u_crop = rng.uniforms(self.seed, Stream.CROP, start, stop, draws.CROP_DRAWS)
        ops, args = draws.operations(self.seed, start, stop, self.augment)
        u_mix = rng.uniforms(self.seed, Stream.MIX, start // group, stop // group, draws.MIX_DRAWS)
        lam, box = draws.mixes(u_mix, image_size, self.augment)
        num = len(sample)
        return BatchPlan(
            positions=positions,
            image_size=image_size,
            interpolation=self.augment.interpolation,
            fill=self._fill,
            mix_group=group,
            sample=sample,
            crop=draws.resized_crops(u_crop, rows["height"], rows["width"], self.augment),
            resize=np.full((num, 2), image_size, dtype=np.int32),
            window=np.zeros((num, 2), dtype=np.int32),
            flip=draws.flips(u_crop, self.augment),
            ops=ops,
            args=args,
            erase=self._erasures(start, stop, image_size),
            lam=np.repeat(lam, group),
            box=np.repeat(box, group, axis=0),
            valid=np.ones(num, dtype=bool),
        )

    def __getitem__(self, positions: int | slice) -> BatchPlan:
        """The rows of a position or of consecutive ones. Unlike for `rows`, they need not be whole groups."""
        start, stop = _range(positions)
        group = self.augment.mix_group
        first = start // group * group
        whole = self.rows(first, -(-stop // group) * group)
        if len(whole) == stop - start:
            return whole
        rows = np.arange(start - first, stop - first)
        whole = dataclasses.replace(whole, mix_group=0)
        return dataclasses.replace(whole.take(rows), partners=whole.take(self.partner(rows)))

    __iter__ = None  # A plan has no end: take plan[start:stop], or plan.batches(start_step, stop_step).

    def partner(self, positions: np.ndarray) -> np.ndarray:
        """The position that each position is mixed with: the groups reversed. Same shape."""
        group = self.augment.mix_group
        return positions // group * group + group - 1 - positions % group

    def batches(
        self, start_step: int, stop_step: int, *, rank: int = 0, ranks: int = 1, micro_batch: int | None = None
    ) -> Iterator[BatchPlan]:
        """The global batches [start_step, stop_step), or one rank's slice of each.

        Any number of ranks carries out the same plan: each row comes once, in a batch with its partner (pairs.py).

        Args:
          rank, ranks: whose slice it is, and of how many.
          micro_batch: the most rows at a time; the whole slice by default.
        Raises:
          UserError: there are more ranks than pairs of rows.
        """
        division = self.division(ranks, micro_batch)
        micro_batches, unmixed = division.rows(rank), division.unmixed()
        if not division.has_whole_groups:
            for step in range(start_step, stop_step):
                yield from self._paired(step * self.global_batch, micro_batches, unmixed)
            return
        rows = self.global_batch // ranks
        # The slices of one rank alone are without gaps, so several steps of an epoch can be planned together.
        together = max(1, _PLANNED_ROWS // self.global_batch) if ranks == 1 else 1
        step = start_step
        while step < stop_step:
            end_of_epoch = (step // self.steps_per_epoch + 1) * self.steps_per_epoch
            num_steps = min(together, end_of_epoch - step, stop_step - step)
            first = step * self.global_batch + rank * rows
            yield from self.rows(first, first + num_steps * rows).split(len(micro_batches[0]))
            step += num_steps

    def division(self, ranks: int, micro_batch: int | None = None) -> Division:
        """Divide the global batch among ranks and micro-batches. Raises a UserError as Division."""
        return Division(self.global_batch, self.augment.mix_group, ranks, micro_batch)

    def _paired(self, start: int, micro_batches: list[np.ndarray], unmixed: np.ndarray) -> Iterator[BatchPlan]:
        """The rows of micro-batches in the global batch at position `start`, each of which is mixed as one group."""
        group = self.augment.mix_group
        rows = np.concatenate(micro_batches)
        first = int(rows.min()) // group * group
        planned = self.rows(start + first, start + (int(rows.max()) // group + 1) * group)
        # A row that is its own partner here lies beside another one, which it must not be mixed with.
        alone = unmixed[(unmixed >= first) & (unmixed < first + len(planned))] - first
        planned.lam[alone], planned.box[alone] = 1, 0
        capacity = max(map(len, micro_batches))
        for part in micro_batches:
            rows = planned.take(part - first)
            yield dataclasses.replace(rows, mix_group=len(part), capacity=capacity)

    def explain(self, position: int) -> str:
        """What a position sees, in words: image, crop, flip, operations with arguments, mixing and partner."""
        rows, partner = self[position], int(self.partner(np.array(position)))
        lines = [*explain(rows, self.index), explain_mix(rows, self.index, partner)]
        original = int(self.views(np.array(position)))
        if original != position:
            epoch = original // (self.steps_per_epoch * self.global_batch)
            lines.append(f"  repeats: the view of position {original}, in epoch {epoch}")
        return "\n".join(lines)

    def _erasures(self, start: int, stop: int, image_size: int) -> np.ndarray:
        if not self.augment.erase_prob:
            return np.zeros((stop - start, 4), dtype=np.int32)
        u = rng.uniforms(self.seed, Stream.ERASE, start, stop, draws.ERASE_DRAWS)
        return draws.erasures(u, image_size, self.augment)

    def _size_of(self, start: int, stop: int) -> int:
        """The one image size of positions [start, stop)."""
        per_epoch = self.steps_per_epoch * self.global_batch
        sizes = {self.image_size_at(epoch) for epoch in range(start // per_epoch, (stop - 1) // per_epoch + 1)}
        if len(sizes) > 1:
            raise ValueError(f"positions [{start}, {stop}) are of two image sizes; ask for each epoch alone")
        return sizes.pop()

    def _samples(self, positions: np.ndarray) -> np.ndarray:
        """The image at each position: int32, same shape.

        Repeated augmentation as published: the epoch's order, every entry `repeats` times in a row, is dealt out to
        the groups in turn, so the copies of an image are mixed with different partners under different lambdas.
        """
        num_groups = self.global_batch // self.augment.mix_group
        step, within = np.divmod(positions, self.global_batch)
        epoch, batch = np.divmod(step, self.steps_per_epoch)
        group, place = np.divmod(within, self.augment.mix_group)
        entry = batch * self.global_batch + place * num_groups + group
        sample = np.empty(positions.shape, dtype=np.int32)
        for e in np.unique(epoch):
            image = entry[epoch == e] // self.augment.repeats
            sample[epoch == e] = self._images(int(e), image)
        return sample

    def _images(self, epoch: int, entry: np.ndarray) -> np.ndarray:
        """The image at each entry of an epoch's order: int64 [n]."""
        if not self.window_shards:
            return order.global_order(self.seed, epoch, len(self.index), entry)
        return order.window_order(self.seed, epoch, self._shard_starts, self.window_shards, entry)

    @functools.cached_property
    def _shard_starts(self) -> np.ndarray:
        return order.shard_starts(self.index)


# The values of fields of TrainPlan.describe() that files of this version's first plans lack.
BEFORE = {
    **values_in_old_plans(TrainPlan),
    **{f"augment.{name}": value for name, value in values_in_old_plans(AugmentConfig).items()},
}


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """The validation set in order, each image once, resized and centre-cropped.

    If an image is more than LONGEST times as long as it is wide, only its middle is resized, in which the crop lies.
    This bounds the memory.

    Attributes:
      index: the images.
      image_size: side of the square crop, pixels.
      crop_pct: an image is resized to floor(image_size / crop_pct) pixels before the crop.
      interpolation: of the resize, the model's own.
      crop_mode: the side that is resized: center resizes the short one, squash both.
    Source: timm.data.transforms_factory.transforms_imagenet_eval.
    """

    index: ShardIndex
    image_size: int = 224
    crop_pct: float = 0.95
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __getitem__(self, positions: int | slice) -> BatchPlan:
        """As `rows`, of a position or of consecutive ones."""
        return self.rows(*_range(positions))

    __iter__ = None  # Positions beyond the last image are filled up, without end.

    def explain(self, position: int) -> str:
        """What a position sees, in words: image, resized part and window."""
        return "\n".join(explain(self[position], self.index))

    def first(self, count: int) -> "EvalPlan":
        """The plan of the first `count` images, or of all images if there are fewer."""
        return dataclasses.replace(self, index=dataclasses.replace(self.index, samples=self.index.samples[:count]))

    def rows(self, start: int, stop: int) -> BatchPlan:
        """The plan for positions [start, stop). Positions beyond the last image are filled up and not valid."""
        num = stop - start
        positions = np.arange(start, stop)
        valid = positions < len(self.index)
        sample = np.where(valid, positions, 0).astype(np.int32)
        rows = self.index.samples[sample]
        crop = _middle(rows["height"].astype(np.int64), rows["width"].astype(np.int64), self.crop_mode)
        height, width = crop[:, 2], crop[:, 3]
        short = math.floor(self.image_size / self.crop_pct)
        if self.crop_mode == "squash":
            resize = np.full((num, 2), short)
        else:
            resize = np.stack([_scaled(height, width, short), _scaled(width, height, short)], axis=1)
        return BatchPlan(
            positions=positions,
            image_size=self.image_size,
            interpolation=self.interpolation,
            fill=(0, 0, 0),
            mix_group=0,
            sample=sample,
            crop=crop.astype(np.int32),
            resize=resize.astype(np.int32),
            window=np.rint((resize - self.image_size) / 2).astype(np.int32),
            flip=np.zeros(num, dtype=bool),
            ops=np.zeros((num, 0), dtype=np.uint8),
            args=np.zeros((num, 0), dtype=np.float32),
            erase=np.zeros((num, 4), dtype=np.int32),
            lam=np.ones(num, dtype=np.float32),
            box=np.zeros((num, 4), dtype=np.int32),
            valid=valid,
        )


def _middle(height: np.ndarray, width: np.ndarray, crop_mode: str) -> np.ndarray:
    """The part of each image that is resized, int64 [n, 4]: all of it, or its middle where it is very long."""
    longest = LONGEST * np.minimum(height, width)
    if crop_mode == "squash":  # This makes a square of any image.
        longest = np.maximum(height, width)
    seen = np.minimum(height, longest), np.minimum(width, longest)
    return np.stack([(height - seen[0]) // 2, (width - seen[1]) // 2, *seen], axis=1)


def _scaled(side: np.ndarray, other: np.ndarray, short: int) -> np.ndarray:
    """A side's length after the shorter of the two became `short` pixels; the longer one is rounded down."""
    return np.where(side <= other, short, short * side // other)


def _range(positions: int | slice) -> tuple[int, int]:
    """Start and stop of an index into a plan. Raises an IndexError unless it is a position or consecutive ones."""
    if not isinstance(positions, slice):
        positions = slice(positions, positions + 1)
    start, stop = 0 if positions.start is None else positions.start, positions.stop
    if stop is None or positions.step not in (None, 1) or not 0 <= start < stop:
        raise IndexError(f"positions [{start}, {stop}): give a start of at least 0, a larger stop, and no step")
    return int(start), int(stop)
