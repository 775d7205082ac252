"""Folders are exported in full or not at all, and families of models within the tolerance."""

import copy

import pytest
import timm
import torch
from torch import nn

from pipelines.common.files import is_empty, making
from support.models import with_statistics
from tools.lib.common.onnx_file import export_onnx, largest_difference, onnx_runtime
from tools.lib.export.formats import export_program, torch_program
from trainer.models.fold_batch_norm import fold_batch_norms


def test_a_folder_is_made_in_full_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), making(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with making(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_nothing_half_is_seen_in_an_existing_folder_and_a_failure_leaves_it_as_empty_as_before(tmp_path):
    with pytest.raises(ZeroDivisionError), making(tmp_path) as folder:
        (folder / "half").write_text("")
        assert is_empty(tmp_path) and folder.parent == tmp_path
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileExistsError), making(tmp_path) as folder:
        for name in "abc":
            (folder / name).write_text("mine")
        (tmp_path / "b").write_text("another process's")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b", "another process's")]


FAMILIES = (
    *("resnet18", "resnet50", "tresnet_m", "regnety_002", "repvgg_a0", "densenet121", "mobilenetv3_small_100"),
    *("efficientnet_b0", "tf_efficientnet_b0", "convnext_atto", "edgenext_xx_small", "mobilevit_xxs"),
    *("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s", "mixer_s32_224", "coatnet_nano_rw_224"),
)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_models_are_exported_folded_within_the_tolerance(name, tmp_path):
    """Prints a row of the table in docs/after-training.md (pytest -m long -s)."""
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"][-1]
    model = with_statistics(model, size)
    for layer in model.modules():  # classifiers that start at zero would agree in any file
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    images = torch.randn(3, 3, size, size)
    folded = copy.deepcopy(model)
    count, row = fold_batch_norms(folded, images), [f"{size} px"]
    for file, write, read in (("a.onnx", export_onnx, onnx_runtime), ("a.pt2", export_program, torch_program)):
        write(folded, images, tmp_path / file)
        found = largest_difference(model, read(tmp_path / file), images)
        row += [f"{found.absolute:.1e}", f"{found.relative:.1e}"]
        assert found.is_small and found.largest > 0
    print(f"\n| `{name}` | {' | '.join([row[0], str(count), *row[1:]])} |")
