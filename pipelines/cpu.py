"""The executor on the CPU: the reference's pixels, made in a thread pool."""

import collections
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pipelines.batch import Batch, BatchMaker, Pipeline
from pipelines.config import PipelineConfig
from pipelines.ops.pil_ops import decode_checked, transform
from pipelines.plan.plan import BatchPlan
from pipelines.prefetch import PLANS_AHEAD, look_ahead, read_ahead
from pipelines.shards.damage import CheckedReader, OnDamage
from pipelines.shards.index import ShardIndex

_KEPT_BYTES = 512 << 20  # Most bytes of decoded images that are kept: a global batch of ImageNet has 192 MB.


class TorchvisionPipeline(Pipeline):
    """Carries plans out on the CPU, with the pixels of timm's transforms.

    Args:
      index: where the samples lie.
      config: its `threads`, at least 1, are those of the pool, which work outside Python's lock.
      device: where the batches go.
      on_damage: as for CheckedReader.
    """

    def __init__(self, index: ShardIndex, config: PipelineConfig, *, device: torch.device, on_damage: OnDamage):
        self._index = index
        self._config = config
        self._maker = BatchMaker(index, device)
        self._reader = CheckedReader(index, on_damage)

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order, made ahead in the background.

        Raises:
          UserError: a shard is missing or shorter than the index says.
        """
        return read_ahead(self._batches(plans), self._config.prefetch)

    def _batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        self._maker.use_device()
        images = _RepeatedImages(self._index, functools.partial(decode_checked, self._reader))

        def announce(plan: BatchPlan) -> None:
            self._reader.will_need(plan.sample)
            images.announce(plan.sample)

        with ThreadPoolExecutor(self._config.threads, thread_name_prefix="augment") as pool:
            try:
                announced = look_ahead(plans, PLANS_AHEAD, announce)
                begun = ((plan, self._submit(pool, plan, images)) for plan in announced)
                # The pool works on the next batch while the last images of this one are finished.
                for plan, rows in look_ahead(begun, 1):
                    pixels = np.stack([row.result() for row in rows])
                    yield self._maker.make(torch.from_numpy(pixels), plan)
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _submit(pool: ThreadPoolExecutor, plan: BatchPlan, images: "_RepeatedImages") -> list[Future[np.ndarray]]:
        """Begin with a plan's rows, each of which becomes uint8 [S, S, 3]."""

        def finished(row: int, image: Callable[[], np.ndarray]) -> np.ndarray:
            return transform(image(), plan, row)

        return [pool.submit(finished, row, images.take(sample)) for row, sample in enumerate(plan.sample.tolist())]


class _RepeatedImages:
    """Decoded images; one that upcoming plans show again is kept from its first use to its last.

    Repeated augmentation shows an image several times within a global batch, and it is decoded once for all of them.
    Keeping images changes no pixel.
    """

    def __init__(self, index: ShardIndex, decode: Callable[[int], np.ndarray]):
        self._index = index
        self._decode = decode
        # How often each sample was announced and has not been taken yet.
        self._uses: collections.Counter[int] = collections.Counter()
        self._kept: dict[int, Callable[[], np.ndarray]] = {}
        self._kept_bytes = 0

    def announce(self, samples: np.ndarray) -> None:
        """The samples will be taken, once for each time they are announced."""
        self._uses.update(samples.tolist())

    def take(self, sample: int) -> Callable[[], np.ndarray]:
        """A function that returns the decoded image. Its first call, in one of the pool's threads, decodes it."""
        self._uses[sample] -= 1
        image = self._kept.get(sample) or _once(functools.partial(self._decode, sample))
        if self._uses[sample] == 0:
            del self._uses[sample]
            if self._kept.pop(sample, None):
                self._kept_bytes -= self._nbytes(sample)
        elif sample not in self._kept and self._kept_bytes + self._nbytes(sample) <= _KEPT_BYTES:
            self._kept[sample] = image
            self._kept_bytes += self._nbytes(sample)
        return image

    def _nbytes(self, sample: int) -> int:
        row = self._index.samples[sample]
        return 3 * int(row["height"]) * int(row["width"])


def _once(decode: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """The function with its result kept; threads that ask while the first one decodes wait for it."""
    lock, kept = threading.Lock(), functools.cache(decode)

    def image() -> np.ndarray:
        with lock:
            return kept()

    return image
