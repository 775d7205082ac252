"""The DALI pipeline: decode, crop, resize and flip on the GPU, or on DALI's CPU backend where there is none."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.batch import Batch, make_batch
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
        decode: str = "roi",
        hw_decoder_load: float = 0.65,
    ):
        self._index = index
        self._device = device
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
        graph, pipeline = None, None
        in_flight: collections.deque[tuple[BatchPlan, dict]] = collections.deque()
        for plan in plans:
            if _graph(plan) != graph:
                while in_flight:
                    yield self._finish(pipeline, *in_flight.popleft())
                graph = _graph(plan)
                pipeline = self._build(graph)
            in_flight.append((plan, self._start(pipeline, plan)))
            if len(in_flight) == _IN_FLIGHT:
                yield self._finish(pipeline, *in_flight.popleft())
        while in_flight:
            yield self._finish(pipeline, *in_flight.popleft())

    def _build(self, graph: _Graph):
        on_gpu = self._device.type == "cuda"
        pipeline = _dali_graph(
            graph,
            on_gpu=on_gpu,
            decode=self._decode,
            hw_decoder_load=self._hw_decoder_load,
            batch_size=graph.batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_IN_FLIGHT,
        )
        pipeline.build()
        return pipeline

    def _start(self, pipeline, plan: BatchPlan) -> dict:
        """Give DALI a plan to work on. Returns what must stay alive until its batch is finished."""
        if plan.ops.any():
            raise UserError(
                "the DALI pipeline has no RandAugment: use --data.pipeline torchvision, or --augment.randaugment_ops 0"
            )
        self._reader.will_need(plan.sample)
        inputs = {
            "jpeg": self._reader.read(plan.sample),
            "start": plan.crop[:, :2].copy(),
            "shape": plan.crop[:, 2:].copy(),
            "size": plan.resize.astype(np.float32),
            "window": plan.window,
            "flip": plan.flip.astype(np.int32),
        }
        if not _graph(plan).windowed:
            del inputs["window"]
        for name, values in inputs.items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()
        return inputs

    def _finish(self, pipeline, plan: BatchPlan, inputs: dict) -> Batch:
        try:
            (output,) = pipeline.share_outputs()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"DALI failed on positions [{plan.position}, {plan.position + len(plan)}), "
                f"samples {self._index.name(int(plan.sample[0]))} and on: {reason}"
            ) from error
        shared = torch.from_dlpack(output.as_tensor())
        # DALI writes the next batch into the same memory, so the pixels are copied before it gets it back. On a GPU
        # that runs in a stream of its own: waiting for it does not wait for the training step.
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                images = shared.clone()
            stream.synchronize()
        else:
            images = shared.clone()
        pipeline.release_outputs()
        del inputs
        return make_batch(images, plan, self._index)


def _graph(plan: BatchPlan) -> _Graph:
    windowed = bool((plan.resize != plan.image_size).any())
    return _Graph(len(plan), plan.image_size, plan.interpolation, windowed)


@pipeline_def
def _dali_graph(graph: _Graph, *, on_gpu: bool, decode: str, hw_decoder_load: float):
    jpeg = fn.external_source(name="jpeg", no_copy=True, dtype=types.UINT8, ndim=1)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
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
        window = fn.external_source(name="window", dtype=types.INT32, ndim=1)
        side = [graph.image_size, graph.image_size]
        images = fn.slice(images, start=window, shape=side, axis_names="HW")
    return fn.flip(images, horizontal=flip)
