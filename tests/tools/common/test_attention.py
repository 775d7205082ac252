"""Models whose fused attention an exporter does not take are exported with plain attention."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from pipelines.common.errors import UserError
from support.models import tiny_hiera
from tools import export
from tools.lib.common.attention import fused_or_plain, has_fused_attention
from tools.lib.common.onnx_file import export_onnx, largest_difference, onnx_runtime
from tools.lib.export.formats import FORMATS, export_program
from tools.lib.export.timm_folder import timm_model

pytestmark = pytest.mark.usefixtures("onnx_translations_read_once")


class Undecided(nn.Module):
    """A model whose code asks for the value of a pixel, which no exporter can know."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_a_model_that_cannot_be_exported_is_one_line(tmp_path, write):
    with pytest.raises(UserError, match="^the model cannot be exported .*: .*Leave this file out, or use") as error:
        write(Undecided().eval(), torch.randn(2, 3, 8, 8), tmp_path / "file")
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_a_model_whose_fused_attention_is_not_exported_gets_plain_attention_and_output_and_card_say_so(tmp_path):
    trained = tiny_hiera()
    files = export.export(trained, tmp_path / "out", [*FORMATS.values()])
    said = "with timm's plain attention, because the fused one cannot be exported; its logits are off by up to "
    assert said in files["model.onnx"] and "attention" not in files["model.pt2"]
    assert (tmp_path / "out" / "README.md").read_text().count(said) == 1
    images = torch.randn(5, 3, 32, 32)
    assert largest_difference(trained.module, onnx_runtime(tmp_path / "out" / "model.onnx"), images).is_small
    assert has_fused_attention(trained.module) and has_fused_attention(timm_model(tmp_path / "out"))


class Windows(nn.Module):
    """Attention within windows, as timm's layers have it, whose tensors have five dimensions."""

    def __init__(self, mixes: bool = False):
        super().__init__()
        self.fused_attn, self.mixes = True, mixes

    def forward(self, images):
        x = images.unflatten(2, (2, -1)).transpose(1, 2)[:, None]  # [B, 1, windows, 3, H / 2, W] -> five below
        x = x.flatten(-2)
        mixed = nn.functional.scaled_dot_product_attention(x, x, x) if self.fused_attn else self._plain(x)
        return mixed.mean((1, 2, 3)) if not self.mixes or images.sum() > 0 else mixed.amax((1, 2, 3))

    @staticmethod
    def _plain(x):
        return (x * x.shape[-1] ** -0.5 @ x.transpose(-2, -1)).softmax(-1) @ x


class Reshaped(nn.Module):
    """A step between layers that a function of the tensor takes."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def nest_layer() -> nn.Module:
    """NesT's own attention, on rows of pixels in two blocks: its tensors have five dimensions."""
    blocks = Reshaped(lambda images: images.unflatten(2, (2, -1)).transpose(1, 2).flatten(2, 3))
    return nn.Sequential(blocks, nn.Linear(8, 8), timm.models.nest.Attention(dim=8, num_heads=2), nn.Flatten(1))


def sam_layer() -> nn.Module:
    """SAM's own attention, on pixels: its tensors have three dimensions."""
    layer = timm.models.vision_transformer_sam.Attention(dim=8, num_heads=2)
    return nn.Sequential(Reshaped(lambda images: images.permute(0, 2, 3, 1)), nn.Linear(3, 8), layer, nn.Flatten(1))


@pytest.mark.parametrize(
    "build", [sam_layer, *(pytest.param(layer, marks=pytest.mark.long) for layer in (Windows, nest_layer))]
)
def test_fused_attention_in_other_than_four_dimensions_falls_back_to_plain_attention_for_onnx(build, tmp_path):
    model, images, path = build().eval(), torch.randn(3, 3, 8, 8), tmp_path / "model.onnx"
    _, plain = fused_or_plain(model, lambda candidate: export_onnx(candidate, images, path))
    assert plain and has_fused_attention(model)
    assert largest_difference(model, onnx_runtime(path), images).is_small


def test_attention_that_is_exported_stays_fused(tmp_path):
    model = timm.create_model("test_vit", num_classes=10).eval()
    _, plain = fused_or_plain(
        model, lambda candidate: export_program(candidate, torch.randn(2, 3, 160, 160), tmp_path / "f")
    )
    assert has_fused_attention(model) and not plain


@pytest.mark.parametrize("fails", ["load", "run", "differ"])
def test_a_runtime_that_does_not_load_or_run_fused_attention_or_computes_something_else_gets_plain_attention(
    fails, tmp_path, monkeypatch
):
    model = Windows().eval()

    def read(path: Path):
        """A runtime that has no fused attention."""
        program = torch.export.load(path)
        if not any("scaled_dot_product" in str(node.target) for node in program.graph.nodes):
            return program.module()
        if fails == "load":
            raise RuntimeError("no kernel for this graph")
        return lambda images: program.module()(images[:, :2] if fails == "run" else -images)

    program = dataclasses.replace(FORMATS["model.pt2"], read=read)
    trained = dataclasses.replace(tiny_hiera(), module=model)
    files = export.computations(trained, tmp_path, [program], fold=False)
    assert "with timm's plain attention" in files["model.pt2"] and has_fused_attention(model)


@pytest.mark.parametrize("model", [Windows(mixes=True), Undecided()])
def test_a_model_that_fails_with_both_kinds_of_attention_keeps_its_one_line(model, tmp_path):
    trained = dataclasses.replace(tiny_hiera(), module=model.eval())
    with pytest.raises(
        UserError, match="^the model cannot be exported with torch.export: .*Leave this file out"
    ) as error:
        export.computations(trained, tmp_path, [FORMATS["model.pt2"]], fold=False)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300
