"""The DALI pipeline: decode, crop, resize and flip on the GPU, or on DALI's CPU backend where there is none."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines import NO_RANDAUGMENT
from pipelines.batch import Batch, BatchMaker
from pipelines.errors import UserError
from pipelines.index import ShardIndex
from pipelines.plan import BatchPlan
from pipelines.reader import ShardReader, read_ahead

_INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_IN_FLIGHT = 2  # batches DALI works on at a time: one is decoded on the host while one is finished on the device


@dataclasses.dataclass(frozen=True)
class _Graph:
    """What a DALI graph is built for; another value needs another graph."""

    batch_size: int
    image_size: int
    interpolation: str
    windowed: bool


class DaliPipeline:
    """Carries plans out with DALI.

    Args:
      index: where the samples lie.
      device: where the batches go. On a GPU DALI decodes there ('mixed'), on the CPU its CPU backend does everything.
      threads: DALI's host threads.
      prefetch: finished batches that wait for the training step.
      decode: 'roi' decodes the crop alone, 'full' the whole image before cropping; the pixels are the same.
      hw_decoder_load: share of the images given to the GPU's JPEG engine, where it has one.
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
    ):
        self._index = index
        self._device = device
        self._maker = BatchMaker(index, device)
        self._threads = threads
        self._prefetch = prefetch
        self._decode = decode
        self._hw_decoder_load = hw_decoder_load
        self._reader = ShardReader(index)

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """The batch of each plan, in order, made ahead in the background. All plans have the same shape.

        Raises:
          UserError: a plan asks for RandAugment.
          UserError: a sample cannot be read or decoded.
        """
        return read_ahead(self._batches(plans), self._prefetch)

    def _batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this background thread
        for graph, same_shape in itertools.groupby(plans, _graph):
            yield from self._run(graph, same_shape)

    def _run(self, graph: _Graph, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """The batches of plans of one shape. DALI asks for plans ahead; what it was given stays alive until its batch
        is finished, because it reads the shards' memory itself."""
        in_flight: collections.deque[tuple[BatchPlan, tuple]] = collections.deque()

        def next_inputs() -> tuple:
            plan = next(plans)
            in_flight.append((plan, self._inputs(plan)))
            return in_flight[-1][1]

        on_gpu = self._device.type == "cuda"
        pipeline = _dali_graph(
            graph,
            next_inputs,
            on_gpu=on_gpu,
            decode=self._decode,
            hw_decoder_load=self._hw_decoder_load,
            batch_size=graph.batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_IN_FLIGHT,
        )
        pipeline.build()
        while True:
            try:
                (output,) = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._failure(in_flight[0][0], error) from error
            with self._maker.stream():
                shared = torch.from_dlpack(output.as_tensor())
            # DALI writes a later batch into the same memory: the maker copies what is on a GPU, this what is not.
            images = shared if shared.is_cuda else shared.clone()
            plan, _ = in_flight.popleft()
            yield self._maker.make(images, plan)

    def _inputs(self, plan: BatchPlan) -> tuple:
        """What the graph takes of a plan, in the order of its external source."""
        if plan.ops.any() or plan.erase.any():
            raise UserError(NO_RANDAUGMENT)
        self._reader.will_need(plan.sample)
        inputs = (
            self._reader.read(plan.sample),
            np.ascontiguousarray(plan.crop[:, :2]),
            np.ascontiguousarray(plan.crop[:, 2:]),
            plan.resize.astype(np.float32),
            plan.flip.astype(np.int32),
        )
        return (*inputs, plan.window) if plan.windowed else inputs

    def _failure(self, plan: BatchPlan, error: RuntimeError) -> UserError:
        """DALI fails a whole batch and does not say which sample it was; the reference decoder does."""
        from pipelines.cpu import try_decode

        for sample, jpeg in zip(plan.sample.tolist(), self._reader.read(plan.sample), strict=True):
            try_decode(jpeg, self._index, sample)
        reason = " ".join(str(error).split())
        return UserError(
            f"DALI failed on positions [{plan.position}, {plan.position + len(plan)}), "
            f"whose images PIL can decode: {reason}"
        )


def _graph(plan: BatchPlan) -> _Graph:
    return _Graph(len(plan), plan.image_size, plan.interpolation, plan.windowed)


@pipeline_def
def _dali_graph(graph: _Graph, next_inputs: Callable[[], tuple], *, on_gpu: bool, decode: str, hw_decoder_load: float):
    dtypes = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, *[types.INT32] * graph.windowed]
    jpeg, start, shape, size, flip, *window = fn.external_source(
        next_inputs,
        num_outputs=len(dtypes),
        no_copy=True,
        dtype=dtypes,
        ndim=[1, 1, 1, 1, 0, *[1] * graph.windowed],
    )
    # Fancy upsampling and the slow IDCT are what libjpeg does in PIL; PIL does not turn images by their EXIF tag.
    options = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        "use_fast_idct": False,
        "adjust_orientation": False,
    }
    if on_gpu:
        options["hw_decoder_load"] = hw_decoder_load
    region = {"start": start, "shape": shape, "axis_names": "HW"}
    if decode == "roi":
        images = fn.decoders.image_slice(jpeg, **region, **options)
    else:
        images = fn.slice(fn.decoders.image(jpeg, **options), **region)
    images = fn.resize(images, size=size, interp_type=_INTERPOLATION[graph.interpolation], antialias=True)
    if graph.windowed:
        side = [graph.image_size, graph.image_size]
        images = fn.slice(images, start=window[0], shape=side, axis_names="HW")
    return fn.flip(images, horizontal=flip)
