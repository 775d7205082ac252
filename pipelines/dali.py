"""The executor on the GPU: DALI decodes and resizes, torch or Triton do the operations. Also on DALI's CPU backend."""

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from pipelines.batch import Batch, BatchMaker, Pipeline
from pipelines.common.errors import UserError
from pipelines.config import PipelineConfig
from pipelines.ops.pil_ops import augmented, decode_checked
from pipelines.ops.torch_ops import apply_ops, erase
from pipelines.plan.plan import BatchPlan
from pipelines.prefetch import PLANS_AHEAD, look_ahead, read_ahead
from pipelines.shards.damage import CheckedReader, OnDamage, lossless
from pipelines.shards.index import ShardIndex

TensorList = TensorListCPU | TensorListGPU

# DALI adds most names of these modules when it is imported, so its type stubs lack them.
_fn: Any = fn
_types: Any = types
_backend: Any = backend

_INTERPOLATION = {"bicubic": _types.INTERP_CUBIC, "bilinear": _types.INTERP_LINEAR}
# Default cap of the decoder's padding: 64 MiB holds a 22-megapixel RGB image; larger ones are rare.
_MOST_PADDING_MIB = 64
_IN_FLIGHT = 2  # DALI decodes one batch on the host while it finishes another one on the device.


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The properties of a plan that a DALI graph is built for. Another value needs another graph.

    Attributes:
      batch_size: the most rows of a plan; DALI takes fewer, too.
    """

    batch_size: int
    image_size: int
    interpolation: str

    @staticmethod
    def of(plan: BatchPlan) -> "_Shape":
        return _Shape(plan.capacity or len(plan), plan.image_size, plan.interpolation)


class DaliPipeline(Pipeline):
    """Carries plans out with DALI.

    Args:
      index: where the samples lie.
      config: how DALI decodes; `decode` is roi or full, and `threads` at least 1.
      device: where the batches go. On a GPU DALI decodes there ('mixed'), on the CPU its CPU backend does everything.
      on_damage: as for CheckedReader.
    """

    def __init__(self, index: ShardIndex, config: PipelineConfig, *, device: torch.device, on_damage: OnDamage):
        self._config = config
        self._device = device
        self._maker = BatchMaker(index, device)
        self._reader = CheckedReader(index, on_damage)
        self._padding = _padding(index, config.decoder_padding_mib)
        self._graphs: dict[_Shape, Future[_Graph]] = {}

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order, made ahead in the background.

        Raises:
          UserError: a shard is missing or shorter than the index says, or DALI fails on images that are not damaged.
        """
        return read_ahead(self._batches(plans), self._config.prefetch)

    def _batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        self._maker.use_device()
        with (
            ThreadPoolExecutor(1, "build-dali") as builder,
            ThreadPoolExecutor(self._config.threads, "augment") as pool,
        ):

            def graph_of(shape: _Shape) -> Future[_Graph]:
                if shape not in self._graphs:
                    self._graphs[shape] = builder.submit(self._build, shape)
                return self._graphs[shape]

            def announce(plan: BatchPlan) -> None:
                self._reader.will_need(plan.sample)
                graph_of(_Shape.of(plan))

            previous: _Shape | None = None
            for shape, same_shape in itertools.groupby(look_ahead(plans, PLANS_AHEAD, announce), _Shape.of):
                # Progressive resizing needs the memory, and does not return to a size before the epochs are repeated.
                if previous is not None:
                    self._graphs.pop(previous, None)
                previous = shape
                for plan, pixels in self._pixels(shape, same_shape, graph_of):
                    yield self._finish(plan, pixels, pool)

    def forget(self) -> None:
        """Give back the memory of the graphs that were built so far."""
        self._graphs.clear()
        _backend.ReleaseUnusedMemory()  # DALI keeps free memory for itself.

    def _build(self, shape: _Shape, encoded: np.ndarray | None = None, num_threads: int = 0) -> "_Graph":
        """A graph for plans of a shape; `encoded` takes the place of the image's bytes in plans of one row."""
        decoder = {"hw_decoder_load": self._config.hw_decoder_load, **self._padding} if self._on_gpu else {}

        def dali_graph(source: Callable[[], tuple]) -> Any:
            return _dali_graph(
                shape,
                source,
                decode=self._config.decode,
                decoder=decoder,
                batch_size=shape.batch_size,
                prefetch_queue_depth=_IN_FLIGHT,
                num_threads=num_threads or self._config.threads,
                device_id=(self._device.index or 0) if self._on_gpu else None,
            )

        if self._on_gpu:
            torch.cuda.empty_cache()  # DALI allocates on its own, and cannot have what PyTorch keeps for later.
        return _Graph(
            dali_graph,
            lambda plan: self._inputs(plan, self._reader.read(plan.sample) if encoded is None else [encoded]),
        )

    @staticmethod
    def _inputs(plan: BatchPlan, encoded: list[np.ndarray]) -> tuple:
        """Return what the graph takes of a plan and its images, in the order of its external source."""
        return (
            encoded,
            np.ascontiguousarray(plan.crop[:, :2]),
            np.ascontiguousarray(plan.crop[:, 2:]),
            plan.resize.astype(np.float32),
            plan.window,
            plan.flip.astype(np.int32),
        )

    def _pixels(
        self, shape: _Shape, plans: Iterator[BatchPlan], graph_of: "Callable[[_Shape], Future[_Graph]]"
    ) -> Iterator[tuple[BatchPlan, TensorList]]:
        """Plans of one shape and their pixels, which lie in DALI's memory."""
        while True:
            try:
                return (yield from graph_of(shape).result().run(plans, self._maker.stream))
            except _FailedBatchError as failed:
                del self._graphs[shape]
                in_work, reason = failed.plans, str(failed)
            except BaseException:
                # The consumer stopped early. Batches are still queued in the graph, so it cannot be used again.
                self._graphs.pop(shape, None)
                raise
            # This stands behind the handler, because the error's traceback keeps the dead graph and its memory alive.
            self._replace_damaged(in_work[0], reason)
            plans = itertools.chain(in_work, plans)

    def _finish(self, plan: BatchPlan, pixels: TensorList, pool: ThreadPoolExecutor) -> Batch:
        """Carry out the operations, into memory of the batch's own: DALI uses that of the pixels again."""
        if self._on_gpu:
            with torch.cuda.stream(self._maker.stream):
                images = apply_ops(torch.from_dlpack(pixels.as_tensor()), plan.ops, plan.args, plan.fill)
                if plan.erase.any():
                    images = erase(images, plan.erase, plan.fill)
        else:
            resized = np.asarray(pixels.as_tensor())
            rows = pool.map(lambda row: augmented(resized[row], plan, row), range(len(plan)))
            images = torch.from_numpy(np.stack(list(rows)))
        return self._maker.make(images, plan)

    def _replace_damaged(self, plan: BatchPlan, error: str) -> None:
        """Find the image that DALI failed on: it fails a complete batch and does not name the sample.

        PIL decodes them all, or the reader would have replaced them. So DALI gets each image alone. One that it fails
        on is replaced by PIL's pixels if DALI succeeds with those, which shows that the image was the cause.

        Raises:
          UserError: it was none of the images.
        """
        found, graph = False, None
        for row in dataclasses.replace(plan, capacity=0).split(1):
            sample = int(row.sample[0])
            known = self._reader.is_replaced(sample)
            # Each thread of the decoder takes its memory, so this graph has one alone.
            graph = graph or self._build(_Shape.of(row), num_threads=1)
            if reason := self._failure_on(row, graph):
                graph = None
                pixels = decode_checked(self._reader, sample)
                if known or self._failure_on(row, self._build(_Shape.of(row), lossless(pixels), 1)):
                    found = False
                    break
                self._reader.reject(sample, f"DALI cannot decode it, PIL can, whose pixels are used ({reason})", pixels)
                found = True
        if not found:
            del graph  # Otherwise the error's traceback keeps it and its memory alive.
            raise UserError(
                f"DALI failed on the batch of {len(plan)} images at position {plan.position}, not because of an image: "
                f"{error}. Look at the driver and at the memory that is left, or use "
                f"{self._config.option('pipeline', 'torchvision')}"
            )

    def _failure_on(self, row: BatchPlan, graph: "_Graph") -> str:
        """Why DALI cannot carry out a plan of one row, '' if it can; then the graph can be run again."""
        try:
            for _ in graph.run(iter([row]), self._maker.stream):
                pass
        except _FailedBatchError as failed:
            return str(failed)
        return ""


class _FailedBatchError(Exception):
    """DALI could not carry out a batch.

    Attributes:
      plans: the one it failed on, and those that it had already taken after it.
    """

    def __init__(self, plans: list[BatchPlan], error: RuntimeError):
        super().__init__(" ".join(str(error).split()))
        self.plans = plans


class _Graph:
    """A DALI pipeline, built, and the plans it is working on.

    Args:
      dali_graph: makes the pipeline around its external source.
      inputs: returns what the external source gives for a plan.
    """

    def __init__(self, dali_graph: Callable[[Callable[[], tuple]], Any], inputs: Callable[[BatchPlan], tuple]):
        self._inputs = inputs
        self._plans: Iterator[BatchPlan] = iter(())
        # DALI asks for plans ahead and reads their bytes in place, so they stay alive until it is done.
        self._in_flight: collections.deque[tuple[BatchPlan, tuple]] = collections.deque()
        # The reference is weak: a graph that is dropped keeps itself and its memory alive in a cycle otherwise.
        source: Any = weakref.WeakMethod(self._next_inputs)
        self._pipeline: Any = dali_graph(lambda: source()())
        self._pipeline.build()

    def __del__(self):
        # Its destructor waits for the batches in work, which read the bytes in _in_flight: so it goes first.
        self._pipeline = None

    def run(
        self, plans: Iterator[BatchPlan], stream: torch.cuda.Stream | None
    ) -> Iterator[tuple[BatchPlan, TensorList]]:
        """The plans and their pixels, uint8 [B, S, S, 3] in the order of `stream`. At its end it can be run again.

        Raises:
          _FailedBatchError: a batch could not be carried out; then it cannot be run again.
        """
        self._plans = plans
        while True:
            try:
                (pixels,) = self._pipeline.run(stream)
            except StopIteration:
                return self._pipeline.reset()
            except RuntimeError as error:
                if not self._in_flight:
                    raise
                raise _FailedBatchError([plan for plan, _ in self._in_flight], error) from error
            plan, inputs = self._in_flight.popleft()
            yield plan, pixels
            del inputs

    def _next_inputs(self) -> tuple:
        plan = next(self._plans)
        self._in_flight.append((plan, self._inputs(plan)))
        return self._in_flight[-1][1]


def _padding(index: ShardIndex, mib: int) -> dict[str, int]:
    """The memory that each of the decoder's threads takes at once, on the device and pinned on the host: bytes."""
    rows = index.samples
    largest = 3 * int((rows["height"].astype(np.int64) * rows["width"]).max())
    nbytes = mib << 20 if mib else min(largest, _MOST_PADDING_MIB << 20)
    return {"device_memory_padding": nbytes, "host_memory_padding": nbytes}


@pipeline_def
def _dali_graph(shape: _Shape, source: Callable[[], tuple], *, decode: str, decoder: dict):
    """The graph; `decoder` are options of the GPU's decoder, {} without a GPU."""
    # The inputs are the JPEG's bytes, the crop's corner and extent, the size after the resize, the window's corner, and
    # whether to flip.
    jpeg, corner, extent, size, window, flip = _fn.external_source(
        source,
        num_outputs=6,
        no_copy=True,
        dtype=[_types.UINT8, _types.INT32, _types.INT32, _types.FLOAT, _types.INT32, _types.INT32],
        ndim=[1, 1, 1, 1, 1, 0],
    )
    images = _decode(jpeg, corner, extent, decode, decoder)
    images = _fn.resize(images, size=size, interp_type=_INTERPOLATION[shape.interpolation], antialias=True)
    images = _fn.slice(images, start=window, shape=[shape.image_size, shape.image_size], axis_names="HW")
    return _fn.flip(images, horizontal=flip)


def _decode(jpeg: DataNode, corner: DataNode, extent: DataNode, decode: str, decoder: dict) -> DataNode:
    """The region of each image, RGB."""
    # In PIL libjpeg does fancy upsampling and the slow IDCT; PIL does not turn images by their EXIF tag.
    options = {
        "device": "mixed" if decoder else "cpu",
        "output_type": _types.RGB,
        "jpeg_fancy_upsampling": True,
        "use_fast_idct": False,
        "adjust_orientation": False,
        **decoder,
    }
    region = {"start": corner, "shape": extent, "axis_names": "HW"}
    if decode == "roi":
        return _fn.decoders.image_slice(jpeg, **region, **options)
    return _fn.slice(_fn.decoders.image(jpeg, **options), **region)


def decoded_regions(
    jpeg: np.ndarray, crops: np.ndarray, device: torch.device, decode: str, hw_decoder_load: float
) -> list[np.ndarray]:
    """Regions of one image as this machine's DALI decodes them: uint8 [height, width, 3] each.

    Args:
      crops: int32 [n, 4], top, left, height, width.
    """
    on_gpu = device.type == "cuda"

    @pipeline_def
    def graph():
        inputs = ([jpeg] * len(crops), np.ascontiguousarray(crops[:, :2]), np.ascontiguousarray(crops[:, 2:]))
        dtypes = [_types.UINT8, _types.INT32, _types.INT32]
        image, corner, extent = _fn.external_source(lambda: inputs, num_outputs=3, dtype=dtypes)
        return _decode(image, corner, extent, decode, {"hw_decoder_load": hw_decoder_load} if on_gpu else {})

    pipeline: Any = graph(batch_size=len(crops), num_threads=2, device_id=(device.index or 0) if on_gpu else None)
    pipeline.build()
    (regions,) = pipeline.run()
    regions = regions.as_cpu()
    return [np.array(regions.at(i)) for i in range(len(crops))]
