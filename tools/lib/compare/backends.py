"""What runs a model: PyTorch as it is or compiled, ONNX Runtime, OpenVINO, TensorRT; each as its users run it.

A session is opened in a process of its own (tools/lib/compare/measuring.py). It holds normalised images and shows them
to
the model again and again: nothing is read, decoded or copied from a host.
"""

import dataclasses
import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipelines.common.errors import UserError
from tools.lib.common.onnx_file import IMAGES, LOGITS
from tools.lib.compare.candidates import HALF_ONNX, ONNX, OPENVINO, REFERENCE, Candidate, build
from trainer.update.compiler import compiled
from trainer.update.precision import resolve_precision


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a session is opened with.

    Attributes:
      folder: where `prepare` wrote the model's files.
      device: cpu or cuda.
      batch: images a call, where the backend takes several.
      threads: cores of the CPU that a session may use.
    """

    model: Candidate
    folder: Path
    device: str
    batch: int
    threads: int

    def images(self, count: int) -> torch.Tensor:
        """float32 [count, 3, S, S] on the CPU, the reference's again and again."""
        images = torch.load(self.folder / REFERENCE, weights_only=True)["images"]
        return images.repeat(-(-count // len(images)), 1, 1, 1)[:count].contiguous()


class Session(ABC):
    """A model ready to run.

    Attributes:
      batch: images a call.
      calls_at_once: calls that run beside each other; `run` is given multiples of it.
      precision: in which it computes, as the runtime itself tells where it can be asked.
    """

    batch: int
    calls_at_once: int = 1
    precision: str

    @abstractmethod
    def run(self, calls: int) -> None:
        """Carry out so many calls, to the end of the last."""

    @abstractmethod
    def run_single(self) -> None:
        """One image, with all cores for it, to its end."""

    @abstractmethod
    def logits(self, images: torch.Tensor) -> np.ndarray:
        """float32 [n, classes] of normalised images, float32 [n, 3, S, S] on the CPU."""

    def peak_memory(self) -> int | None:
        """Bytes on the GPU since the session was opened, at most; None where the CPU's memory is what counts."""
        return None

    def rest(self) -> None:  # noqa: B027  not every session has something to give back
        """Give back what is not needed until the next turn, as the other models take theirs."""


class TorchSession(Session):
    """PyTorch: float32 on CPUs, half precision on GPUs (bf16, fp16 where there is none), channels-last."""

    def __init__(self, opening: Opening, compiler: Callable = lambda model: model):
        torch.set_num_threads(opening.threads)
        self._device = torch.device(opening.device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._dtype = resolve_precision("auto", self._device)
        self.precision = str(self._dtype).removeprefix("torch.")
        self.batch = opening.batch
        model, _ = build(opening.model)
        self._model = compiler(model.to(self._device, self._dtype, memory_format=torch.channels_last))
        self._images = self._placed(opening.images(self.batch))

    def _placed(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self._device, self._dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._model(self._images)
        self._finish()

    @torch.inference_mode()
    def run_single(self) -> None:
        self._model(self._single)
        self._finish()

    @functools.cached_property
    def _single(self) -> torch.Tensor:
        return self._images[:1].clone(memory_format=torch.channels_last)

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> np.ndarray:
        # the batch that is there already: another one would be compiled anew
        return self._model(self._images).float().cpu().numpy()[: len(images)]

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def rest(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def compiled_session(opening: Opening) -> TorchSession:
    """PyTorch with torch.compile."""
    return TorchSession(opening, compiled)


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU: float32, as the file is."""

    precision = "float32"

    def __init__(self, opening: Opening):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = opening.threads
        options.log_severity_level = 3  # errors
        path = str(opening.folder / ONNX)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.batch = opening.batch
        self._images = opening.images(self.batch).numpy()

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._session.run([LOGITS], {IMAGES: self._images})

    def run_single(self) -> None:
        self._session.run([LOGITS], {IMAGES: self._images[:1]})

    def logits(self, images: torch.Tensor) -> np.ndarray:
        return self._session.run([LOGITS], {IMAGES: images.numpy()})[0]


class OpenVinoSession(Session):
    """OpenVINO on the CPU as in the paper: an FP16 model, one image a call, as many streams as cores.

    FP16 is asked for; a CPU that cannot compute in it takes bfloat16 or float32, and the compiled model says which.
    """

    batch = 1

    def __init__(self, opening: Opening):
        import openvino

        self._core = openvino.Core()
        self._model = self._core.read_model(opening.folder / OPENVINO)
        self._images = opening.images(1).numpy()
        self._model.reshape(list(self._images.shape))
        self._threads = opening.threads
        throughput = self._compiled("THROUGHPUT", opening.threads)
        self.precision = throughput.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.calls_at_once = throughput.get_property("NUM_STREAMS")
        self._queue = openvino.AsyncInferQueue(throughput, self.calls_at_once)

    def _compiled(self, hint: str, streams: int):
        return self._core.compile_model(
            self._model,
            "CPU",
            {
                "PERFORMANCE_HINT": hint,
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": self._threads,
                "INFERENCE_PRECISION_HINT": "f16",
            },
        )

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._queue.start_async([self._images], share_inputs=True)
        self._queue.wait_all()

    def run_single(self) -> None:
        self._single.infer([self._images], share_inputs=True)

    @functools.cached_property
    def _single(self):
        """Compiled for latency, apart: made after the memory was measured."""
        return self._compiled("LATENCY", 1).create_infer_request()

    def logits(self, images: torch.Tensor) -> np.ndarray:
        shown = [self._single.infer([image[None]])[0].copy() for image in images.numpy()]
        return np.concatenate(shown)


class TensorRtSession(Session):
    """TensorRT as in the paper: FP16, which the ONNX file is already in, so that every version of TensorRT takes it.

    Written after the documentation of TensorRT 10 and 11; not tested.
    """

    precision = "float16"

    def __init__(self, opening: Opening):
        self._free = torch.cuda.mem_get_info()[0]
        self.batch = opening.batch
        self._path = opening.folder / HALF_ONNX
        self._reference = opening.images(self.batch).to("cuda", torch.float16)
        self._stream = torch.cuda.Stream()
        self._many, self._logits = self._engine(self._reference)

    def _engine(self, images: torch.Tensor) -> tuple[object, torch.Tensor]:
        """A context that reads these images, and where its logits will be."""
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

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._many.execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()

    def run_single(self) -> None:
        self._single[0].execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()

    @functools.cached_property
    def _single(self) -> tuple[object, torch.Tensor]:
        return self._engine(self._reference[:1])

    def logits(self, images: torch.Tensor) -> np.ndarray:
        self.run(1)
        return self._logits[: len(images)].float().cpu().numpy()

    def peak_memory(self) -> int | None:
        return self._free - torch.cuda.mem_get_info()[0]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run a model.

    Attributes:
      devices: on which it runs here.
      open: gives a session; called in the session's own process.
      package: what must be installed, as Python imports it, "" for nothing more; install: how.
      file: of those that `prepare` writes, "" for none.
      preload: modules that are imported before the memory of a session is counted.
    """

    name: str
    devices: tuple[str, ...]
    open: Callable[[Opening], Session]
    package: str = ""
    install: str = ""
    file: str = ""
    preload: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        """Whether its package can be found."""
        return not self.package or importlib.util.find_spec(self.package) is not None


EXTRA = "pip install -e '.[compare]'"
_COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("openvino", ("cpu",), OpenVinoSession, "openvino", EXTRA, OPENVINO, ("openvino",)),
        Backend("onnxruntime", ("cpu",), OnnxRuntimeSession, "onnxruntime", EXTRA, ONNX, ("onnxruntime",)),
        Backend("tensorrt", ("cuda",), TensorRtSession, "tensorrt", "pip install tensorrt", HALF_ONNX, ("tensorrt",)),
        Backend("compiled", ("cuda", "cpu"), compiled_session, preload=_COMPILER),
        Backend("eager", ("cuda", "cpu"), TorchSession),
    )
}
_ON_REQUEST = {("compiled", "cpu"), ("eager", "cpu")}  # slow to compile; slower than what there is besides
BATCH = {"cpu": 4, "cuda": 256}


def choose_backends(names: list[str] | None, device: str) -> tuple[list[Backend], list[str]]:
    """The backends that are named, or those that are installed and sensible on a device; and what is worth saying.

    Raises:
      UserError: one that is named is unknown, not installed, or not for this device.
    """
    if names is not None:
        return [_named(name, device) for name in dict.fromkeys(names)], []
    here = [backend for backend in BACKENDS.values() if device in backend.devices]
    here = [backend for backend in here if (backend.name, device) not in _ON_REQUEST]
    notes = [
        f"{backend.name} is left out: not installed. Run: {backend.install}"
        for backend in here
        if not backend.is_installed
    ]
    return [backend for backend in here if backend.is_installed] or [BACKENDS["eager"]], notes


def _named(name: str, device: str) -> Backend:
    if name not in BACKENDS:
        raise UserError(f"--backends: '{name}' is not one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    if device not in backend.devices:
        raise UserError(
            f"--backends: {name} runs on {backend.devices[0]}, not on {device}. Add --device {backend.devices[0]}"
        )
    if not backend.is_installed:
        raise UserError(f"--backends: {name} is not installed. Run: {backend.install}")
    return backend
