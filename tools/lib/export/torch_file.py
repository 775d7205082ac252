"""Models as torch.export's programs, which PyTorch runs without their Python code."""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from tools.lib.common.onnx_file import Runnable, in_one_line, quiet, two_or_more


@torch.no_grad()
def export_program(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write a model for any number of images of one size; arguments and errors are those of `export_onnx`."""
    with quiet(), in_one_line("exported with torch.export"):
        program = torch.export.export(model, (two_or_more(images),), dynamic_shapes=({0: Dim("batch")},))
        torch.export.save(program, path)


def torch_program(path: Path) -> Runnable:
    """The model of a file that `export_program` wrote, from tensors to tensors."""
    return torch.export.load(path).module()
