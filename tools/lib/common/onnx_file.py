"""Models as ONNX files for any number of images, and how far another runtime's logits are from PyTorch's."""

import contextlib
import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from pipelines.common.errors import UserError, clipped

OPSET = 18  # Torch's exporter writes no older one itself, so most runtimes read it.
TOLERANCE = 1e-4  # A larger Difference.relative is more than rounding.
IMAGES, LOGITS = "images", "logits"  # The file's input and output have these names.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Runnable = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one model's logits are from another's.

    Attributes:
      absolute: the largest difference of a logit; NaN if a logit is.
      largest: the largest absolute value among the reference's logits.
    """

    absolute: float
    largest: float

    @property
    def relative(self) -> float:
        """The largest difference as a fraction of the largest logit."""
        return self.absolute / (self.largest or 1.0)

    @property
    def is_small(self) -> bool:
        """Whether it may be rounding; False for NaN."""
        return self.relative <= TOLERANCE

    def __str__(self) -> str:
        return f"{self.absolute:.2g}, {self.relative:.2g} of the largest logit"


@torch.no_grad()
def export_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write a model with torch's exporter: input `images` float32 [batch, 3, S, S], output `logits` [batch, classes].

    The batch is open, the size of the images is not. torch puts weights of more than 1.5 GiB into a second file
    beside the first, `path` with `.data` behind it.

    Args:
      model: on the CPU in evaluation mode; it is not changed.
      images: float32 [B, 3, S, S], noise; torch takes a batch of one for a batch that is always one, so B is 2 or more.
    Raises:
      UserError: packages are missing, or the model cannot be exported.
    """
    require_onnx()
    with quiet(), in_one_line("exported to ONNX"):
        torch.onnx.export(
            model,
            (images,),
            path,
            input_names=[IMAGES],
            output_names=[LOGITS],
            opset_version=OPSET,
            dynamic_shapes=({0: Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def onnx_runtime(path: Path) -> Runnable:
    """The model of an ONNX file in onnxruntime on the CPU, from tensors to tensors."""
    require_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])


@torch.no_grad()
def largest_difference(reference: Runnable, other: Runnable, images: torch.Tensor) -> Difference:
    """Compare the logits of two models, for the first image alone and for all images at once.

    Args:
      images: float32 [B, 3, S, S], as both models take them.
    """
    absolute, largest = torch.tensor(0.0), torch.tensor(0.0)
    for batch in (images[:1], images):
        expected = reference(batch)
        absolute = torch.maximum(absolute, (other(batch) - expected).abs().max())
        largest = torch.maximum(largest, expected.abs().max())
    return Difference(absolute.item(), largest.item())


def require_onnx() -> None:
    """Raise a UserError if a package that ONNX needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}, not installed here. Run: pip install -e '.[export]'")


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turn the errors of an exporter or a runtime, which fill pages, into a UserError of one line."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # Exporters and runtimes raise errors of many kinds.
        first: BaseException = error
        while first.__cause__ is not None:  # The exporter's own error says what to report, its cause why.
            first = first.__cause__
        lines = [line.strip() for line in str(first).splitlines() if line.strip()] or [""]
        raise UserError(
            f"the model cannot be {what}: {type(first).__name__}: {clipped(lines[0], 180)}. Leave this file out, or "
            "use another model"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the messages of torch's exporters for their own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
