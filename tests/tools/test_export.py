"""tools/export.py: what is exported is the model, for timm alone, for onnxruntime and for torch.export."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from conftest import TINY
from pipelines.common.files import making
from support.models import with_statistics
from tools import compare, evaluate, export
from tools.lib.common.onnx_file import onnx_runtime
from tools.lib.export.card import card
from tools.lib.export.formats import FORMATS, export_program, torch_program
from tools.lib.export.timm_folder import timm_model
from trainer.config.recipe import audit
from trainer.config.sections import parse, to_dict
from trainer.evaluation import trained as inference
from trainer.models.preprocessing import preprocessing
from trainer.state import checkpoint
from trainer.state.checkpoint import best_content_of
from trainer.state.train_state import TrainState
from trainer.state.writer import Writer

pytestmark = pytest.mark.usefixtures("onnx_translations_read_once")
PICTURE = np.random.default_rng(0).integers(0, 256, (150, 211, 3), np.uint8)
DIGITS = [str(digit) for digit in range(10)]
CASES = {  # models of each way to be built: of any size, of one size that is not timm's, of any size by an argument
    "cnn": ("test_resnet", ["--data.image_size", "64", "--data.eval_image_size", "96", "--data.eval_crop_pct", "0.9"]),
    "sized": ("test_vit", ["--data.image_size", "96", "--student.kwargs.drop_path_rate", "0.1"]),
    "dynamic": (
        "test_vit",
        ["--data.image_size", "160", "--data.eval_image_size", "192", "--student.kwargs.dynamic_img_size", "true"],
    ),
}


def write_checkpoint(path: Path, name: str, settings: list[str], seed: int = 0) -> Path:
    """A best.pt of a model with random weights and statistics that recognises digits."""
    config = parse([*TINY, "--student.name", name, "--data.root", str(path.parent), *settings])
    torch.manual_seed(seed)
    size = {} if name != "test_vit" else {"img_size": config.data.train_sizes[-1]}
    model = with_statistics(timm.create_model(name, num_classes=10, **size, **config.student.kwargs), 0)
    state = TrainState(
        student=model,
        ema=None,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        scaler=torch.amp.GradScaler("cpu"),
        plan={"dataset": "a" * 64},
        config=to_dict(config),
        audit=audit(config),
        classes=DIGITS,
        best={"step": 1234, "weights": "raw", "top1": 61.25},
    )
    writer = Writer()
    writer.submit(path, best_content_of(state, {"top1": 61.25, "top5": 95.0, "loss": 1.5, "images": 80}))
    writer.wait()
    assert not writer.failure
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """For each case a checkpoint, and the folder that the tool makes of it; of the CNN with all there is."""
    folder, made = tmp_path_factory.mktemp("export"), {}
    for case, (name, settings) in CASES.items():
        path = write_checkpoint(folder / f"{case}.pt", name, settings)
        made[case] = (path, folder / case)
        export.main([str(path), str(folder / case), *(["--onnx", "--torch-export", "--fold"] if case == "cnn" else [])])
    return made


@pytest.fixture(scope="module")
def cnn(exported) -> tuple[Path, Path]:
    return exported["cnn"]


ALONE = """
import re, sys, timm, torch
from timm.data import resolve_model_data_config

found = {}
for folder in sys.argv[2:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_model_data_config(model, use_test_size=True)
    images = torch.randn(2, *config["input_size"], generator=torch.Generator().manual_seed(1))
    found[folder] = {"logits": model(images).detach(), "config": config, "own": model.pretrained_cfg}
for section in re.split("^With ", open("README.md").read(), flags=re.MULTILINE)[1:]:
    library, code = re.match(r"(\\w+).*?```python\\n(.*?)```", section, re.DOTALL).groups()
    names = {}
    exec(code, names)
    found[library] = torch.as_tensor(names["logits"])
torch.save(found, sys.argv[1])
assert not {"trainer", "tools", "pipelines"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def alone(exported, tmp_path_factory) -> dict:
    """What a process that cannot find this repository makes of the folders with timm, and of a card's snippets.

    Returns:
      by case what timm makes of it, by the name of a library the logits that its snippet gets for a picture.
    """
    folders = {case: folder for case, (_, folder) in exported.items()}
    place = shutil.copytree(folders["cnn"], tmp_path_factory.mktemp("alone") / "cnn")
    Image.fromarray(PICTURE).save(place / "image.png")
    (place / "image.png").rename(place / "image.jpg")  # Pillow goes by the content; these pixels stay what they are
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(place.parent / "found.pt"), *map(str, folders.values())]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(place.parent / "found.pt", weights_only=True)
    return {**found, **{case: found[str(folder)] for case, folder in folders.items()}}


@pytest.mark.parametrize("case", CASES)
def test_timm_alone_in_a_fresh_process_gives_the_same_logits_and_transform(exported, alone, case):
    trained, found = inference.load(None, exported[case][0]), alone[case]
    size = trained.transform.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found["logits"], trained.module(images))
    config = {**found["config"], "image_size": found["config"]["input_size"][-1]}
    assert {key: config[key] for key in dataclasses.asdict(trained.transform)} == dataclasses.asdict(trained.transform)
    assert tuple(config["mean"]) == trained.module.pretrained_cfg["mean"]
    assert found["own"]["label_names"] == DIGITS and found["own"]["num_classes"] == 10


def test_the_size_to_train_on_is_kept_beside_the_size_to_look_at(alone):
    own = alone["cnn"]["own"]
    assert (own["input_size"], own["test_input_size"]) == ([3, 64, 64], [3, 96, 96])


@pytest.mark.parametrize("case", CASES)
def test_an_exported_folder_opens_as_its_checkpoint_does(exported, case):
    before, after = (inference.load(None, path) for path in exported[case])
    assert (after.transform, after.classes, after.weights) == (before.transform, DIGITS, "raw")
    assert after.digest() == before.digest()
    images = torch.randn(1, 3, before.transform.image_size, before.transform.image_size)
    assert torch.equal(after.module(images), before.module(images))


def test_an_exported_folder_is_exported_again_as_it_is(exported, tmp_path):
    for case in CASES:
        export.main([str(exported[case][1]), str(tmp_path / case)])
        first, second = exported[case][1], tmp_path / case
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


@pytest.mark.parametrize(("file", "read"), [("model.onnx", onnx_runtime), ("model.pt2", torch_program)])
def test_the_computation_in_a_file_is_the_models_for_any_batch(cnn, file, read):
    reference, other = inference.load(None, cnn[0]).module, read(cnn[1] / file)
    for batch in (1, 2, 3, 7):
        images = torch.randn(batch, 3, 96, 96)
        expected = reference(images)
        assert (other(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_folding_leaves_no_batch_norm_in_the_program_and_all_of_it_in_the_weights(cnn):
    program = torch.export.load(cnn[1] / "model.pt2")
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    norms = inference.load(None, cnn[1]).module.modules()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in norms) == 15
    assert "15 BatchNorms folded" in (cnn[1] / "README.md").read_text()


def test_the_cards_snippets_work_as_they_stand_and_agree(cnn, alone):
    trained = inference.load(None, cnn[0])
    transform = create_transform(**resolve_model_data_config(timm_model(cnn[1]), use_test_size=True))
    expected = trained.module(transform(Image.fromarray(PICTURE))[None])
    for library in ("timm", "onnxruntime", "PyTorch"):
        assert (alone[library] - expected).abs().max() <= 1e-4 * expected.abs().max(), library


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("shape", [(211, 150), (150, 211), (90, 90), (301, 97)])
def test_the_cards_pixels_without_torch_are_timms(cnn, tmp_path, monkeypatch, mode, shape):
    trained = inference.load(None, cnn[0], crop_mode=mode, crop_pct=0.875, interpolation="bilinear")
    text = card(trained, {"model.onnx": ""}, ("", {}))
    code = re.search(r"```python\n(import numpy.*?)session = ", text, re.DOTALL)[1].replace("import onnxruntime\n", "")
    picture = Image.fromarray(PICTURE).resize(shape)
    picture.save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    fields = dataclasses.asdict(trained.transform)
    expects = preprocessing(trained.module)
    transform = create_transform(fields.pop("image_size"), **fields, mean=expects.mean, std=expects.std)
    expected = transform(Image.open(tmp_path / "image.jpg"))[None]
    assert np.array_equal(names["images"], expected.numpy())


def test_the_card_says_how_it_was_trained_and_measured_and_not_where(cnn):
    text = (cnn[1] / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n")
    assert "| teacher | none: labels alone |" in text
    assert "| `run.global_batch` | 1024 | 64 | images an update" in text
    assert "raw weights, not averaged, after step 1,234" in text
    assert "On the 80 validation images of the run" in text and "| 61.25 | 95.00 | 1.5000 |" in text
    assert "opset 18" in text and str(cnn[0].parent) not in text


def test_an_evaluation_stands_in_the_card_and_one_of_other_weights_is_refused(digits, tmp_path, capsys):
    settings = ["--data.image_size", "32"]
    path = write_checkpoint(tmp_path / "best.pt", "test_resnet", settings)
    other = write_checkpoint(tmp_path / "other.pt", "test_resnet", settings, seed=1)
    arguments = ["--data.root", str(digits), "--student.checkpoint", str(path), "--run.device", "cpu"]
    evaluate.main([*arguments, "--run.json", str(tmp_path / "evaluation.json")])
    export.main([str(path), str(tmp_path / "out"), "--evaluation", str(tmp_path / "evaluation.json")])
    report = json.loads((tmp_path / "evaluation.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    shown = f"On the 96 images of split `val` of digits (digest of that split `{report['digest'][:12]}`), 32 px, center"
    assert shown in text
    assert f"| {report['top1']:.2f} | {report['top5']:.2f} | {report['loss']:.4f} | {report['ece']:.2f} |" in text
    message = failed([other, tmp_path / "second", "--evaluation", tmp_path / "evaluation.json"], capsys)
    assert re.search(r"evaluation.json: is of other weights than .*other.pt", message)
    assert not (tmp_path / "second").exists()


def failed(arguments: list, capsys, tool=export) -> str:
    """What the tool says when it ends with an error: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main([*map(str, arguments)])
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "OUT", "--fold"], "--fold changes model.onnx and model.pt2 alone. Add one"),
        (["MODEL", "TMP"], "is there already and holds list.json, raw.pth, three.txt. Name a new or an empty folder"),
        (["MODEL", "TMP/none/out"], "none is not a folder. Make it, or name another"),
        (["MODEL", "OUT", "--name", "resnet18"], "is of model 'test_resnet', not of 'resnet18'. Leave the name out"),
        (["MODEL", "OUT", "--weights", "ema"], "holds no ema weights, only raw ones"),
        (["MODEL", "OUT", "--classes", "TMP/three.txt"], "three.txt: names 3 classes, .* has 10 outputs. Name every"),
        (["MODEL", "OUT", "--evaluation", "TMP/no.json"], "no.json: not an evaluation .No such file.* --run.json"),
        (["MODEL", "OUT", "--evaluation", "TMP/list.json"], "list.json: not an evaluation .* --run.json"),
        (["TMP/raw.pth", "OUT"], "does not say which model it is of. Name it .option name"),
        (["TMP/raw.pth", "OUT", "--name", "test_byobnet"], "does not fit model 'test_byobnet' .* it was saved from"),
        (["TMP/nothing.pt", "OUT"], "not found. Give a checkpoint, a run's folder, an exported folder, or timm's"),
        (["resnet8", "OUT"], "unknown model 'resnet8'; did you mean resnet18"),
        (["TMP", "OUT"], "neither a run's folder with checkpoints nor an exported one"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do_and_writes_nothing(cnn, tmp_path, capsys, arguments, message):
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "list.json").write_text("[]")
    torch.save(inference.load(None, cnn[0]).module.state_dict(), tmp_path / "raw.pth")
    before = sorted(tmp_path.iterdir())
    places = {"MODEL": str(cnn[0]), "OUT": str(tmp_path / "out"), "TMP": str(tmp_path)}
    words = [re.sub(r"^(MODEL|OUT|TMP)", lambda found: places[found[0]], word) for word in arguments]
    assert re.search(message, failed(words, capsys))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["", "train"])
@pytest.mark.parametrize("tool", [export, compare])
def test_a_dataset_in_place_of_a_model_is_one_line(digits, tmp_path, capsys, monkeypatch, tool, place):
    monkeypatch.chdir(tmp_path)
    arguments = [tmp_path / "out"] if tool is export else ["--device", "cpu", "--out", tmp_path / "out"]
    message = failed([digits / place, *arguments], capsys, tool)
    assert "neither a run's folder with checkpoints nor an exported one" in message
    assert "Give what --run.out was, a checkpoint in it" in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", [export, compare])
def test_what_is_too_long_to_be_a_path_is_a_short_line(cnn, tmp_path, capsys, tool):
    out = ["out"] if tool is export else []
    assert len(message := failed(["n" * 300, *out], capsys, tool)) < 300 and "unknown model" in message
    arguments = [cnn[0], "o" * 300] if tool is export else ["test_resnet", "--out", "o" * 300]
    assert len(message := failed(arguments, capsys, tool)) < 400 and "File name too long" in message


def altered(source: Path, path: Path, **changes) -> Path:
    """A checkpoint as the source, but for some entries; None leaves one out."""
    content = {**torch.load(source, weights_only=True), **changes}
    content.pop("digest")
    checkpoint.write(path, {key: value for key, value in content.items() if value is not None})
    return path


def test_a_checkpoint_with_fewer_settings_has_their_defaults(cnn, tmp_path):
    content = torch.load(cnn[0], weights_only=True)
    data = {key: value for key, value in content["config"]["data"].items() if key != "eval_image_size"}
    config = {"data": data, "student": content["config"]["student"]}
    young = altered(cnn[0], tmp_path / "young.pt", config=config, plan={}, audit=None, software=None)
    assert inference.load(None, young).transform.image_size == 64
    export.main([str(young), str(tmp_path / "out")])
    assert "| epochs + cool-down | 300 + 10 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_foreign_file_with_a_format_version_needs_a_name_as_any_other(cnn, tmp_path, capsys):
    foreign = altered(cnn[0], tmp_path / "foreign.pt", config=None)
    assert "does not say which model it is of. Name it (option name)" in failed([foreign, tmp_path / "out"], capsys)
    assert inference.load("test_resnet", foreign).origin == {}


def test_a_checkpoint_of_another_format_is_refused(cnn, tmp_path, capsys):
    newer = altered(cnn[0], tmp_path / "newer.pt", format_version=2)
    message = failed([newer, tmp_path / "out"], capsys)
    assert "newer.pt: format version 2, this program reads 1. Use the version of the program that wrote it" in message


def test_an_exported_folder_with_an_odd_configuration_or_other_weights_is_refused(cnn, tmp_path, capsys):
    folder = shutil.copytree(cnn[1], tmp_path / "folder")
    message = failed([folder, tmp_path / "out", "--weights", "ema"], capsys)
    assert "holds raw weights, and 'ema' was asked for. Leave that out" in message
    assert inference.load(None, folder, weights="raw").weights == "raw"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": []}))
    assert "config.json: not what timm writes for a model" in failed([folder, tmp_path / "out"], capsys)


def test_timms_name_has_one_kind_of_weights(tmp_path, capsys):
    message = failed(["resnet18", tmp_path / "out", "--weights", "raw"], capsys)
    assert "timm has one kind of weights for 'resnet18', and 'raw' was asked for. Leave that out" in message


def test_a_name_with_the_tag_of_pretrained_weights_is_the_same_model(cnn):
    assert inference.load("test_resnet.r160_in1k", cnn[0]).name == "test_resnet"


def test_what_a_checkpoint_says_is_text_in_the_card(cnn, tmp_path):
    content = torch.load(cnn[0], weights_only=True)
    bad = "</td>\n\n# Hi <img src=x> | `a` ![b](c)"
    config = {**content["config"], "teacher": {**content["config"]["teacher"], "name": bad}}
    audit = [{"key": bad, "usi": "/home/me/a.pth", "here": "on/off", "meaning": bad}]
    changes = {"config": config, "audit": audit, "software": {bad: bad}}
    trained = inference.load(None, altered(cnn[0], tmp_path / "a.pt", **changes))
    text = card(trained, {}, ("", {}))
    outside = re.sub("`[^`\n]*`", "", text.split("## Use")[0] + text.split("## Software")[1])
    assert "<" not in outside and "![" not in outside and "\n# Hi" not in outside
    assert "| a.pth | on/off | &#60;/td&#62; # Hi &#60;img src=x&#62; &#124; &#96;a&#96; !&#91;b&#93;(c) |" in text
    assert "| teacher | `</td> # Hi <img src=x> \\| 'a' ![b](c)` |" in text


@pytest.mark.parametrize("said", [True, False])
def test_whether_a_model_takes_one_size_alone_is_not_what_a_description_says(cnn, tmp_path, said):
    folder = shutil.copytree(cnn[1], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(fixed_input_size=said, input_size=[3, 96, 96])
    (folder / "config.json").write_text(json.dumps(config))
    export.main([str(folder), str(tmp_path / "out")])
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert again["pretrained_cfg"]["fixed_input_size"] is False and again["model_args"] == config["model_args"]


def test_weights_that_are_not_finite_are_not_exported(cnn, tmp_path, capsys):
    weights = torch.load(cnn[0], weights_only=True)["state_dict"]
    weights["fc.bias"][3] = torch.nan
    bad = altered(cnn[0], tmp_path / "nan.pt", state_dict=weights)
    assert "nan.pt: 'fc.bias' is not finite: it holds NaN" in failed([bad, tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_weights_of_a_file_without_a_name_and_classes_are_exported(cnn, tmp_path):
    model = inference.load(None, cnn[0]).module
    torch.save(model.state_dict(), tmp_path / "raw.pth")
    export.main([str(tmp_path / "raw.pth"), str(tmp_path / "out"), "--name", "test_resnet"])
    assert "label_names" not in json.loads((tmp_path / "out" / "config.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing names its outputs." in text and "raw.pth, which does not say how it was trained" in text
    assert "Not measured." in text and str(tmp_path) not in text


def test_a_missing_package_is_named_with_the_command_that_installs_it(cnn, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    message = failed([cnn[0], tmp_path / "out", "--onnx"], capsys)
    assert "ONNX needs onnxruntime, not installed here. Run: pip install -e '.[export]'" in message
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_the_model_is_refused_and_nothing_is_left(cnn, tmp_path, capsys, monkeypatch):
    def write_other(model, images, path):
        export_program(nn.Sequential(model, nn.Softmax(1)), images, path)

    monkeypatch.setitem(FORMATS, "model.pt2", dataclasses.replace(FORMATS["model.pt2"], write=write_other))
    message = failed([cnn[0], tmp_path / "out", "--torch-export"], capsys)
    assert re.search("model.pt2: its logits are off by up to .* more than 0.0001 of it. Leave this file out", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("off", [1e-6, 1e-2, "weight"])
def test_timm_must_make_the_same_weights_and_logits_but_for_rounding(cnn, tmp_path, capsys, monkeypatch, off):
    class Off(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def state_dict(self):
            return self.model.state_dict()

        def forward(self, images):
            logits = self.model(images)
            return logits + off * logits.abs().max()

    def made(folder: Path) -> nn.Module:
        model = timm_model(folder)
        if off != "weight":
            return Off(model)
        model.fc.bias.data[3] += 1e-7
        return model

    monkeypatch.setattr("tools.lib.export.timm_folder.timm_model", made)
    if off == 1e-6:
        export.main([str(cnn[0]), str(tmp_path / "out")])
        return
    other = r"logits: they are off by up to .* of the largest logit" if off == 1e-2 else r"weights: fc\.bias"
    assert re.search(f"of the exported files with other {other}", failed([cnn[0], tmp_path / "out"], capsys))
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_fails_without_any_attention_is_one_line(cnn, tmp_path, capsys, monkeypatch):
    def read(path: Path):
        raise RuntimeError(
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED\nCould not find an implementation " + "for X " * 99
        )

    monkeypatch.setitem(FORMATS, "model.pt2", dataclasses.replace(FORMATS["model.pt2"], read=read))
    message = failed([cnn[0], tmp_path / "out", "--torch-export"], capsys)
    assert message.startswith("error: the model cannot be run from model.pt2: RuntimeError: [ONNXRuntimeError] : 9")
    assert len(message) <= 310 and not list(tmp_path.iterdir())


def test_an_existing_folder_that_is_empty_but_for_hidden_entries_stays_the_same_folder(cnn, tmp_path, monkeypatch):
    """So a mount point can be filled, and `.` does not pull the folder from under the shell."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lost+found").mkdir()
    (tmp_path / "out" / ".git").write_text("hidden")
    inode = (tmp_path / "out").stat().st_ino
    monkeypatch.chdir(tmp_path / "out")
    export.main([str(cnn[0]), "."])
    assert sorted(os.listdir()) == [".git", "README.md", "config.json", "lost+found", "model.safetensors"]
    assert (tmp_path / "out").stat().st_ino == inode and os.listdir(tmp_path) == ["out"]
    assert inference.load(None, Path()).digest() == inference.load(None, cnn[0]).digest()


def test_what_a_killed_export_leaves_in_an_existing_folder_does_not_stop_the_next(cnn, tmp_path):
    pid = os.fork()
    if pid == 0:
        with making(tmp_path) as folder:
            (folder / "half").write_text("")
            os._exit(9)
    os.waitpid(pid, 0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    export.main([str(cnn[0]), str(tmp_path)])
    assert (tmp_path / "config.json").is_file()
