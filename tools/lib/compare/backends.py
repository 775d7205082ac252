"""The runtimes: PyTorch, eager or compiled, ONNX Runtime, OpenVINO and TensorRT, each as its users run it.

A session is opened in a process of its own (measuring.py). It holds normalised images and shows them to the model again
and again: nothing is read, decoded or copied from a host.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from pipelines.common.errors import UserError, naming
from tools.lib.common.evaluation import in_memory_format
from tools.lib.common.hardware import check_backend
from tools.lib.common.onnx_file import IMAGES, LOGITS
from tools.lib.compare.candidates import HALF_ONNX, ONNX, OPENVINO, REFERENCE, Candidate, build
from trainer.update.compiler import compiled
from trainer.update.precision import resolve_precision


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the models are measured.

    Attributes:
      device: cpu or cuda.
      batch: images a call, where the backend takes several.
      repeats: rounds, in each of which every model is timed once.
      threads: cores of the CPU that a session may use.
    """

    device: str
    batch: int
    repeats: int
    threads: int


def _images(folder: Path, count: int) -> torch.Tensor:
    """float32 [count, 3, S, S] on the CPU: the reference's images, repeated."""
    images = torch.load(folder / REFERENCE, weights_only=True)["images"]
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count].contiguous()


class Session(ABC):
    """A model ready to run. It is opened with the model, the folder of the files that `prepare` wrote, and the plan.

    Attributes:
      batch: images a call.
      calls_at_once: calls that run beside each other; `run` is given multiples of it.
      precision: the number format in which it computes; the runtime reports it where it can.
    """

    batch: int
    calls_at_once: int = 1
    precision: str

    @abstractmethod
    def run(self, calls: int) -> None:
        """Make `calls` calls and wait for the last."""

    @abstractmethod
    def run_single(self) -> None:
        """Infer one image with all cores."""

    @abstractmethod
    def logits(self, images: torch.Tensor) -> np.ndarray:
        """float32 [n, classes] of normalised images, float32 [n, 3, S, S] on the CPU."""

    def peak_memory(self) -> int | None:
        """Bytes on the GPU since the session was opened, at most; None where the CPU's memory is what counts."""
        return None

    def rest(self) -> None:  # noqa: B027  (Not every session has something to give back.)
        """Give back what is not needed until the next timed run, while the other models are timed."""


class TorchSession(Session):
    """PyTorch: float32 on CPUs, half precision on GPUs (bf16, fp16 where there is none), channels-last."""

    def __init__(self, model: Candidate, folder: Path, plan: Plan, compiler: Callable = lambda network: network):
        torch.set_num_threads(plan.threads)
        self._device = torch.device(plan.device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        dtype = resolve_precision("auto", self._device)
        self.precision = str(dtype).removeprefix("torch.")
        self.batch = plan.batch
        self._model = compiler(in_memory_format(build(model).to(self._device, dtype), torch.channels_last))
        self._images = _images(folder, self.batch).to(self._device, dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def _called(self, images: torch.Tensor, calls: int = 1) -> torch.Tensor:
        """The logits of the last call, once the device has finished."""
        for _ in range(calls - 1):
            self._model(images)
        logits = self._model(images)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return logits

    @override
    def run(self, calls: int) -> None:
        self._called(self._images, calls)

    @override
    def run_single(self) -> None:
        self._called(self._single)

    @functools.cached_property
    def _single(self) -> torch.Tensor:
        return self._images[:1].clone(memory_format=torch.channels_last)

    @override
    def logits(self, images: torch.Tensor) -> np.ndarray:
        # Another batch would be compiled again, so it takes the one that it holds.
        return self._called(self._images).float().cpu().numpy()[: len(images)]

    @override
    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    @override
    def rest(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def compiled_session(model: Candidate, folder: Path, plan: Plan) -> TorchSession:
    """PyTorch with torch.compile."""
    return TorchSession(model, folder, plan, compiled)


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU in float32, like the file."""

    precision = "float32"

    def __init__(self, _: Candidate, folder: Path, plan: Plan):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = plan.threads
        options.log_severity_level = 3  # It logs errors alone.
        path = str(folder / ONNX)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.batch = plan.batch
        self._images = _images(folder, self.batch).numpy()

    @override
    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._session.run([LOGITS], {IMAGES: self._images})

    @override
    def run_single(self) -> None:
        self._session.run([LOGITS], {IMAGES: self._images[:1]})

    @override
    def logits(self, images: torch.Tensor) -> np.ndarray:
        return np.asarray(self._session.run([LOGITS], {IMAGES: images.numpy()})[0])


_IN_PLACE: dict[str, Any] = {"share_inputs": True}  # OpenVINO reads the images in place.


class OpenVinoSession(Session):
    """OpenVINO on the CPU as in the paper: an FP16 model, one image a call, as many streams as cores.

    FP16 is asked for; a CPU that cannot compute in it takes bfloat16 or float32, and the compiled model reports which.
    """

    batch = 1

    def __init__(self, _: Candidate, folder: Path, plan: Plan):
        import openvino

        self._core = openvino.Core()
        self._model = self._core.read_model(folder / OPENVINO)
        self._images = _images(folder, 1).numpy()
        self._model.reshape(list(self._images.shape))
        self._threads = plan.threads
        throughput = self._compiled("THROUGHPUT", plan.threads)
        self.precision = throughput.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.calls_at_once = throughput.get_property("NUM_STREAMS")
        self._queue = openvino.AsyncInferQueue(throughput, self.calls_at_once)

    def _compiled(self, hint: str, streams: int):
        how = {"PERFORMANCE_HINT": hint, "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self._threads}
        return self._core.compile_model(self._model, "CPU", {**how, "INFERENCE_PRECISION_HINT": "f16"})

    @override
    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._queue.start_async([self._images], **_IN_PLACE)
        self._queue.wait_all()

    @override
    def run_single(self) -> None:
        self._single.infer([self._images], **_IN_PLACE)

    @functools.cached_property
    def _single(self):
        """The model compiled for latency. It is made after the memory was measured."""
        return self._compiled("LATENCY", 1).create_infer_request()

    @override
    def logits(self, images: torch.Tensor) -> np.ndarray:
        shown = [self._single.infer([image[None]])[0].copy() for image in images.numpy()]
        return np.concatenate(shown)


class TensorRtSession(Session):
    """TensorRT in FP16 as in the paper. The ONNX file is in FP16 already, which every version of TensorRT takes.

    It follows the documentation of TensorRT 10 and 11 and is not tested.
    """

    precision = "float16"

    def __init__(self, _: Candidate, folder: Path, plan: Plan):
        self._free = torch.cuda.mem_get_info()[0]
        self.batch = plan.batch
        self._path = folder / HALF_ONNX
        self._reference = _images(folder, self.batch).to("cuda", torch.float16)
        self._stream = torch.cuda.Stream()
        self._many, self._logits = self._engine(self._reference)

    def _engine(self, images: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """A context that reads these images, and the tensor that it writes their logits to."""
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        strongly_typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse(self._path.read_bytes()):
            raise UserError(f"TensorRT cannot read the model: {parser.get_error(0)}")
        profile, config = builder.create_optimization_profile(), builder.create_builder_config()
        profile.set_shape(IMAGES, *[tuple(images.shape)] * 3)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UserError("TensorRT cannot build the model; its log says why")
        self._runtime = tensorrt.Runtime(logger)
        context = self._runtime.deserialize_cuda_engine(plan).create_execution_context()
        context.set_input_shape(IMAGES, tuple(images.shape))
        logits = torch.empty(tuple(context.get_tensor_shape(LOGITS)), dtype=torch.float16, device="cuda")
        context.set_tensor_address(IMAGES, images.data_ptr())
        context.set_tensor_address(LOGITS, logits.data_ptr())
        return context, logits

    @override
    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._many.execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()

    @override
    def run_single(self) -> None:
        self._single[0].execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()

    @functools.cached_property
    def _single(self) -> tuple[Any, torch.Tensor]:
        return self._engine(self._reference[:1])

    @override
    def logits(self, images: torch.Tensor) -> np.ndarray:
        self.run(1)
        return self._logits[: len(images)].float().cpu().numpy()

    @override
    def peak_memory(self) -> int | None:
        return self._free - torch.cuda.mem_get_info()[0]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run a model.

    Attributes:
      devices: on which it runs; defaults: on which it is measured unless others are named.
      open: opens a session; called in the session's own process.
      file: the one that it reads of those that `prepare` writes, "" for none.
      preload: modules that are imported before the memory of a session is counted.
    """

    name: str
    devices: tuple[str, ...]
    defaults: tuple[str, ...]
    open: Callable[[Candidate, Path, Plan], Session]
    file: str = ""
    preload: tuple[str, ...] = ()


_CPU, _GPU, _BOTH = ("cpu",), ("cuda",), ("cuda", "cpu")
_COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("openvino", _CPU, _CPU, OpenVinoSession, OPENVINO, ("openvino",)),
        Backend("onnxruntime", _CPU, _CPU, OnnxRuntimeSession, ONNX, ("onnxruntime",)),
        Backend("tensorrt", _GPU, _GPU, TensorRtSession, HALF_ONNX, ("tensorrt",)),
        # On a CPU, one is slow to compile and the other slower than the other runtimes.
        Backend("compiled", _BOTH, _GPU, compiled_session, preload=_COMPILER),
        Backend("eager", _BOTH, _GPU, TorchSession),
    )
}
BATCH = {"cpu": 4, "cuda": 256}


def choose_backends(names: list[str] | None, device: str) -> tuple[list[Backend], list[str]]:
    """The backends that are named, or those that are installed and sensible on a device, and notes on what is left out.

    Raises:
      UserError: one that is named is not installed, or not for this device.
    """
    found = [BACKENDS[name] for name in dict.fromkeys(names or ())]
    for backend in found:
        if device not in backend.devices:
            raise UserError(f"--backends: {backend.name} does not run on {device}. Use --device {backend.devices[0]}")
        with naming("--backends"):
            check_backend(backend.name)
    if found:
        return found, []
    usual = [backend for backend in BACKENDS.values() if device in backend.defaults]
    notes = []
    for backend in usual:
        try:
            check_backend(backend.name)
            found.append(backend)
        except UserError as error:
            notes.append(f"left out: {error}")
    return found or [BACKENDS["eager"]], notes
