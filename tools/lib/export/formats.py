"""The files that hold a model's computation beside its weights: a new format is a row of FORMATS."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from tools.lib.common.onnx_file import (
    IMAGES,
    LOGITS,
    OPSET,
    Runnable,
    export_onnx,
    in_one_line,
    onnx_runtime,
    quiet,
)


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      file: its name; option: the command's option that asks for it.
      title: its name for people.
      write: the model as a file of this format, with images of its size.
      read: the model of a file, from images to logits.
      needs: what it runs with, for the card; imports and code: the lines of Python that run it there.
      package: the one that writes it, besides PyTorch; "" for none.
    """

    file: str
    option: str
    title: str
    write: Callable[[nn.Module, torch.Tensor, Path], None]
    read: Callable[[Path], Runnable]
    needs: str
    imports: str
    code: str
    package: str = ""


@torch.no_grad()
def export_program(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write a model for any number of images of one size; arguments and errors are those of `export_onnx`."""
    with quiet(), in_one_line("exported with torch.export"):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
        torch.export.save(program, path)


def torch_program(path: Path) -> Runnable:
    """The model of a file that `export_program` wrote, from tensors to tensors."""
    return torch.export.load(path).module()


_ONNX, _PROGRAM = "model.onnx", "model.pt2"
_RUN_ONNX = f"""\
session = onnxruntime.InferenceSession("{_ONNX}", providers=["CPUExecutionProvider"])
logits = session.run(["{LOGITS}"], {{"{IMAGES}": images}})[0]
print(logits[0].argmax())"""
_RUN_PROGRAM = f"""\
model = torch.export.load("{_PROGRAM}").module()
with torch.no_grad():
    logits = model(torch.from_numpy(images))
print(logits[0].argmax().item())"""
FORMATS = {
    _ONNX: Format(
        file=_ONNX,
        option="--onnx",
        title=f"ONNX, opset {OPSET}",
        write=export_onnx,
        read=onnx_runtime,
        needs=f"onnxruntime, without PyTorch (opset {OPSET}; input `{IMAGES}`, output `{LOGITS}`, any batch)",
        imports="import numpy as np\nimport onnxruntime",
        code=_RUN_ONNX,
        package="onnx",
    ),
    _PROGRAM: Format(
        file=_PROGRAM,
        option="--torch-export",
        title="torch.export's program",
        write=export_program,
        read=torch_program,
        needs="PyTorch, without timm",
        imports="import numpy as np\nimport torch",
        code=_RUN_PROGRAM,
    ),
}
