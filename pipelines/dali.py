"""The DALI pipeline: everything on the GPU, or on DALI's CPU backend and PIL where there is none."""

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from pipelines.batch import Batch, BatchMaker
from pipelines.common.errors import UserError
from pipelines.cpu import augmented, decode_checked
from pipelines.ops.torch_ops import apply_ops, erase
from pipelines.plan.plan import BatchPlan
from pipelines.shards.damage import CheckedReader, lossless
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import PLANS_AHEAD, look_ahead, read_ahead

TensorList = TensorListCPU | TensorListGPU

_INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_MOST_PADDING_MIB = 64  # unless told otherwise: 22 megapixels; of larger images there are few
_IN_FLIGHT = 2  # batches DALI works on at a time: one is decoded on the host while one is finished on the device


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a DALI graph is built for; another value needs another graph."""

    batch_size: int
    image_size: int
    interpolation: str
    windowed: bool

    @staticmethod
    def of(plan: BatchPlan) -> "_Shape":
        return _Shape(len(plan), plan.image_size, plan.interpolation, plan.windowed)


class DaliPipeline:
    """Carries plans out with DALI.

    Args:
      index: where the samples lie.
      device: where the batches go. On a GPU DALI decodes there ('mixed'), on the CPU its CPU backend does everything.
      threads: DALI's host threads.
      prefetch: finished batches that wait for the training step.
      decode: 'roi' decodes the crop alone, 'full' the whole image before cropping; the pixels are the same.
      hw_decoder_load: share of the images given to the GPU's JPEG engine, where it has one.
      decoder_padding_mib: memory that each thread of the GPU's decoder takes at once, so that a large image does not
        make it allocate in the middle of a run; 0 is what the largest image of the index takes, 64 at the most.
      on_bad: told (sample, error) once for each sample that is replaced (CheckedReader).
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        device: torch.device,
        threads: int,
        prefetch: int,
        decode: str,
        hw_decoder_load: float,
        decoder_padding_mib: int,
        on_bad: Callable[[int, str], None],
    ):
        self._device = device
        self._maker = BatchMaker(index, device)
        self._threads = threads
        self._prefetch = prefetch
        self._reader = CheckedReader(index, on_bad)
        decoder = {"hw_decoder_load": hw_decoder_load, **_padding(index, decoder_padding_mib)}
        self._options = {
            "decode": decode,
            "decoder": decoder if self._on_gpu else {},
            "num_threads": threads,
            "device_id": (device.index or 0) if self._on_gpu else None,
        }
        self._graphs: dict[_Shape, Future[_Graph]] = {}

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order, made ahead in the background.

        Raises:
          UserError: a shard is missing or shorter than the index says, or DALI fails on images that are not damaged.
        """
        return read_ahead(self._batches(plans), self._prefetch)

    def _batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        self._maker.use_device()
        with ThreadPoolExecutor(1, "build-dali") as builder, ThreadPoolExecutor(self._threads, "augment") as pool:

            def announce(plan: BatchPlan) -> None:
                self._reader.will_need(plan.sample)
                if (shape := _Shape.of(plan)) not in self._graphs:
                    self._graphs[shape] = builder.submit(self._build, shape)

            previous = None
            for shape, same_shape in itertools.groupby(look_ahead(plans, PLANS_AHEAD, announce), _Shape.of):
                self._graphs.pop(previous, None)  # progressive resizing does not come back; its memory is needed
                previous = shape
                for plan, pixels in self._pixels(shape, same_shape):
                    yield self._finish(plan, pixels, pool)

    def forget(self) -> None:
        """Give back the memory of the graphs that were built so far."""
        self._graphs.clear()
        backend.ReleaseUnusedMemory()  # DALI keeps what is free for itself

    def _build(self, shape: _Shape) -> "_Graph":
        return _Graph(shape, lambda plan: self._inputs(plan, self._reader.read(plan.sample)), **self._options)

    @staticmethod
    def _inputs(plan: BatchPlan, encoded: list[np.ndarray]) -> tuple:
        """What the graph takes of a plan and its images, in the order of its external source."""
        inputs = (
            encoded,
            np.ascontiguousarray(plan.crop[:, :2]),
            np.ascontiguousarray(plan.crop[:, 2:]),
            plan.resize.astype(np.float32),
            plan.flip.astype(np.int32),
        )
        return (*inputs, plan.window) if plan.windowed else inputs

    def _pixels(self, shape: _Shape, plans: Iterator[BatchPlan]) -> Iterator[tuple[BatchPlan, TensorList]]:
        """Plans of one shape and their pixels, which lie in DALI's memory."""
        while True:
            if shape not in self._graphs:
                self._graphs[shape] = _done(self._build(shape))
            graph = None
            try:
                graph = self._graphs[shape].result()
                return (yield from graph.run(plans, self._maker.stream))
            except _FailedBatchError as failed:
                del self._graphs[shape]
                in_work, reason = failed.plans, str(failed)
            except BaseException:  # left early, with batches in work: of no more use
                self._graphs.pop(shape, None)
                raise
            # behind the handler: the error's traceback would keep the dead graph and its memory alive
            graph = None
            self._replace_damaged(in_work[0], reason)
            plans = itertools.chain(in_work, plans)

    def _finish(self, plan: BatchPlan, pixels: TensorList, pool: ThreadPoolExecutor) -> Batch:
        """The operations, into memory of the batch's own: DALI uses the pixels' again."""
        if self._on_gpu:
            with torch.cuda.stream(self._maker.stream):
                images = apply_ops(torch.from_dlpack(pixels.as_tensor()), plan.ops, plan.args, plan.fill)
                if plan.erase.any():
                    images = erase(images, plan.erase, plan.fill)
        else:
            images = torch.from_numpy(_augmented(np.asarray(pixels.as_tensor()), plan, pool))
        return self._maker.make(images, plan)

    def _replace_damaged(self, plan: BatchPlan, error: str) -> None:
        """Find what DALI failed on: it fails a whole batch and does not say which sample it was.

        PIL decodes them all, or the reader would have replaced them. So DALI is given each image alone; one that it
        fails on is replaced by PIL's pixels if it carries those out, which shows that it is the image's fault.

        Raises:
          UserError: it was none of the images.
        """
        found, graph = False, None
        for row in plan.split(1):
            sample = int(row.sample[0])
            known = self._reader.is_replaced(sample)
            graph = graph or self._alone(row)
            if reason := self._failure_on(row, graph):
                graph = None
                pixels = decode_checked(self._reader, sample)
                if known or self._failure_on(row, self._alone(row, lossless(pixels))):
                    found = False
                    break
                self._reader.reject(sample, f"DALI cannot decode it, PIL can, whose pixels are used ({reason})", pixels)
                found = True
        if not found:
            del graph  # or the error's traceback would keep it and its memory alive
            raise UserError(
                f"DALI failed on positions [{plan.position}, {plan.position + len(plan)}), not because of an image: "
                f"{error}. Look at the driver and at the memory that is left, or use --data.pipeline torchvision"
            )

    def _alone(self, row: BatchPlan, encoded: np.ndarray | None = None) -> "_Graph":
        """A graph for plans of one row, of this one's shape; `encoded` takes the place of the image's bytes."""

        def inputs(plan: BatchPlan) -> tuple:
            return self._inputs(plan, self._reader.read(plan.sample) if encoded is None else [encoded])

        return _Graph(_Shape.of(row), inputs, **{**self._options, "num_threads": 1})  # each thread takes its memory

    def _failure_on(self, row: BatchPlan, graph: "_Graph") -> str:
        """Why DALI cannot carry out a plan of one row, '' if it can; then the graph can be run again."""
        try:
            collections.deque(graph.run(iter([row]), self._maker.stream), maxlen=0)
        except _FailedBatchError as failed:
            return str(failed)
        return ""


class _FailedBatchError(Exception):
    """DALI could not carry out a batch.

    Attributes:
      plans: the one it failed on, and those it had been given after it.
    """

    def __init__(self, plans: list[BatchPlan], error: RuntimeError):
        super().__init__(" ".join(str(error).split()))
        self.plans = plans


class _Graph:
    """A DALI pipeline, built, and the plans it is working on.

    Args:
      inputs: what the external source gives for a plan.
    """

    def __init__(self, shape: _Shape, inputs: Callable[[BatchPlan], tuple], **options):
        self._inputs = inputs
        self._plans: Iterator[BatchPlan] = iter(())
        # DALI asks for plans ahead and reads their bytes where they are: they stay alive until it is done
        self._in_flight: collections.deque[tuple[BatchPlan, tuple]] = collections.deque()
        # weakly, or a graph that is dropped would keep itself and its memory until Python looks for cycles
        source = weakref.WeakMethod(self._next_inputs)
        if options["device_id"] is not None:
            torch.cuda.empty_cache()  # DALI allocates on its own, and cannot have what PyTorch keeps for later
        self._pipeline = _dali_graph(
            shape, lambda: source()(), batch_size=shape.batch_size, prefetch_queue_depth=_IN_FLIGHT, **options
        )
        self._pipeline.build()

    def __del__(self):
        self._pipeline = None  # its destructor waits for the batches in work, which read the bytes in _in_flight

    def run(
        self, plans: Iterator[BatchPlan], stream: torch.cuda.Stream | None
    ) -> Iterator[tuple[BatchPlan, TensorList]]:
        """The plans and their pixels, uint8 [B, S, S, 3] in the order of `stream`. To the end it can be run again.

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


def _done(graph: _Graph) -> "Future[_Graph]":
    future: Future[_Graph] = Future()
    future.set_result(graph)
    return future


def _augmented(pixels: np.ndarray, plan: BatchPlan, pool: ThreadPoolExecutor) -> np.ndarray:
    """The plan's operations on the CPU, where PIL is the fastest: a new array."""
    images = np.empty_like(pixels)

    def fill(row: int) -> None:
        images[row] = augmented(pixels[row], plan, row)

    collections.deque(pool.map(fill, range(len(plan))), maxlen=0)
    return images


def _padding(index: ShardIndex, mib: int) -> dict[str, int]:
    """How much memory each of the decoder's threads takes at once, on the device and pinned on the host."""
    rows = index.samples
    largest = 3 * int((rows["height"].astype(np.int64) * rows["width"]).max())
    nbytes = mib << 20 if mib else min(largest, _MOST_PADDING_MIB << 20)
    return {"device_memory_padding": nbytes, "host_memory_padding": nbytes}


@pipeline_def
def _dali_graph(shape: _Shape, next_inputs: Callable[[], tuple], *, decode: str, decoder: dict):
    """The graph; `decoder` are options of the GPU's decoder, {} without a GPU."""
    dtypes = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, *[types.INT32] * shape.windowed]
    jpeg, corner, extent, size, flip, *window = fn.external_source(
        next_inputs,
        num_outputs=len(dtypes),
        no_copy=True,
        dtype=dtypes,
        ndim=[1, 1, 1, 1, 0, *[1] * shape.windowed],
    )
    images = _decode(jpeg, corner, extent, decode, decoder)
    images = fn.resize(images, size=size, interp_type=_INTERPOLATION[shape.interpolation], antialias=True)
    if shape.windowed:
        side = [shape.image_size, shape.image_size]
        images = fn.slice(images, start=window[0], shape=side, axis_names="HW")
    return fn.flip(images, horizontal=flip)


def _decode(jpeg: DataNode, corner: DataNode, extent: DataNode, decode: str, decoder: dict) -> DataNode:
    """The region of each image, RGB."""
    # Fancy upsampling and the slow IDCT are what libjpeg does in PIL; PIL does not turn images by their EXIF tag.
    options = {
        "device": "mixed" if decoder else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        "use_fast_idct": False,
        "adjust_orientation": False,
        **decoder,
    }
    region = {"start": corner, "shape": extent, "axis_names": "HW"}
    if decode == "roi":
        return fn.decoders.image_slice(jpeg, **region, **options)
    return fn.slice(fn.decoders.image(jpeg, **options), **region)


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
        nodes = fn.external_source(lambda: inputs, num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT32])
        return _decode(*nodes, decode, {"hw_decoder_load": hw_decoder_load} if on_gpu else {})

    pipeline = graph(batch_size=len(crops), num_threads=2, device_id=(device.index or 0) if on_gpu else None)
    pipeline.build()
    (regions,) = pipeline.run()
    regions = regions.as_cpu()
    return [np.array(regions.at(i)) for i in range(len(crops))]
