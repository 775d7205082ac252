"""Files of weights as other programs write them: what is taken, what is refused, and that nothing in them runs."""

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3

from pipelines.common.errors import UserError
from trainer.config.sections import TeacherConfig
from trainer.models.files.torch_files import PlainData
from trainer.models.files.weights import read_file, read_weights, select_weights, unwrapped
from trainer.models.teacher import build_teacher

NAME = "test_resnet"


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(3)
    return tuple(timm.create_model(NAME, num_classes=7) for _ in range(2))


def is_of(path, model) -> bool:
    found, expected = read_weights(path), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- what lies beside the weights ---


def test_checkpoints_of_timms_training_script_are_taken_by_their_average(models, tmp_path):
    model, other = models
    ema = ModelEmaV3(model)
    ema.module.load_state_dict(other.state_dict())
    args = argparse.Namespace(model=NAME, lr=0.1, output=pathlib.Path("out"), opt_betas=None)
    optimizer = torch.optim.AdamW(model.parameters())
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, **folders)
    saver.save_checkpoint(3, metric=np.float64(55.0))
    assert is_of(tmp_path / "model_best.pth.tar", other)
    weights, kind = select_weights(tmp_path, read_file(tmp_path / "model_best.pth.tar"), "raw")
    assert kind == "raw" and torch.equal(weights["fc.bias"], model.fc.bias)
    assert build_teacher(TeacherConfig(NAME, tmp_path / "model_best.pth.tar"), 7, 64).model.num_classes == 7


class CfgNode(dict):
    """As yacs has it, in Swin's checkpoints."""


def other_module(monkeypatch, full_name: str, made: type) -> type:
    """A class as if a package that is not installed had it."""
    module, _, name = full_name.rpartition(".")
    for each in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, each, types.SimpleNamespace(**{name: made}))
    made.__module__, made.__qualname__ = module, name
    return made


@pytest.mark.parametrize("beside", ["DeiT", "numpy", "paths", "Swin", "Lightning", "dates", "defaultdict"])
def test_plain_data_of_other_types_beside_the_weights_does_no_harm(models, tmp_path, monkeypatch, beside):
    model, _ = models
    with_state = {**model.state_dict()}
    content = {
        "DeiT": {"model": with_state, "model_ema": None, "args": argparse.Namespace(lr=1e-3), "scaler": {}},
        "numpy": {"state_dict": with_state, "metric": np.float32(7), "best": np.arange(3), "kind": np.dtype("f8")},
        "paths": {"model": with_state, "out": pathlib.Path("a/b"), "far": pathlib.PureWindowsPath("C:/x")},
        "Swin": {"model": with_state, "config": other_module(monkeypatch, "yacs.config.CfgNode", CfgNode)(A=1)},
        "Lightning": {
            "state_dict": {f"model.{name}": value for name, value in with_state.items()},
            "hyper_parameters": collections.OrderedDict(lr=1.0),
            "callbacks": {"best": torch.tensor(1.0)},
        },
        "dates": {"model": with_state, "when": datetime.datetime(2024, 1, 2), "took": datetime.timedelta(seconds=3)},
        "defaultdict": {"model": collections.defaultdict(list, with_state)},
    }[beside]
    torch.save(content, tmp_path / "w.pth")
    assert is_of(tmp_path / "w.pth", model)


class Runs:
    def __init__(self, what, *arguments):
        self.what = what, arguments

    def __reduce__(self):
        return self.what


def test_nothing_that_a_file_names_is_built_or_run(models, tmp_path, capsys):
    """Values beside the weights are ignored; a model that was saved whole has no tensors by name."""
    beside = [Runs(print, "ran"), Runs(exec, "print('ran')"), Runs(pickle.loads, b"x"), pathlib.Path("x"), models[1]]
    torch.save({"state_dict": models[0].state_dict(), "more": beside}, tmp_path / "w.pth")
    assert is_of(tmp_path / "w.pth", models[0])
    assert all(isinstance(value, PlainData) for value in read_file(tmp_path / "w.pth")["more"])
    torch.save(models[0], tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w.pth: holds no weights, .*torch.save\(model.state_dict\(\), 'weights.pth'\)"
    ):
        read_weights(tmp_path / "w.pth")
    torch.save({"more": Runs(os.system, "echo ran")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: damaged, or no file of weights .UnpicklingError"):
        read_weights(tmp_path / "w.pth")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_program_of_torchscript_is_refused(models, tmp_path):
    torch.jit.save(torch.jit.trace(models[0].eval(), torch.rand(1, 3, 64, 64)), tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt: damaged, or no file of weights .its record"):
        read_weights(tmp_path / "w.pt")


# --- names and places ---


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "net.module."],
)
@pytest.mark.parametrize("nest", ["", "model_ema", "ema_state_dict", "model_state_dict"])
def test_what_wrappers_put_before_names_is_taken_away(models, tmp_path, prefix, nest):
    weights = {f"{prefix}{name}": value for name, value in models[0].state_dict().items()}
    torch.save({nest: weights, "epoch": 3} if nest else weights, tmp_path / "w.pth")
    assert is_of(tmp_path / "w.pth", models[0])


def test_torchs_averaged_model_and_models_compiled_in_parts_are_taken(models, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(models[0])
    torch.save({"model": models[1].state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "torchvision.pth")
    assert is_of(tmp_path / "torchvision.pth", models[0])
    named = {name.replace("layer1.", "layer1._orig_mod."): value for name, value in models[0].state_dict().items()}
    torch.save(named, tmp_path / "part.pth")
    assert is_of(tmp_path / "part.pth", models[0])


def test_names_stay_where_not_all_have_the_prefix_or_two_would_become_one():
    one = torch.zeros(1)
    for names in (["model.a", "b"], ["module.a", "a"], ["network.0", "patch_embed"]):
        assert [*unwrapped(dict.fromkeys(names, one))] == names


@pytest.mark.parametrize("empty", [None, {}, {"decay": 0.99}])
@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema"])
def test_an_average_that_is_not_there_is_passed_over(models, tmp_path, key, empty):
    torch.save({key: empty, "model": models[0].state_dict(), "weights": {"a": 1}}, tmp_path / "w.pth")
    assert is_of(tmp_path / "w.pth", models[0])
