"""Models named by a folder (local-dir:) or a repository of the hub (hf-hub:, hf_hub:), wherever timm's names are."""

import math
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from conftest import train_here
from pipelines.common.errors import UserError
from support.model_folder import CLASSES, NAME, write_folder
from tools.lib.common.evaluation import EvalStudentConfig
from tools.lib.compare import candidates
from trainer.config.sections import StudentConfig, TeacherConfig, parse, to_dict
from trainer.evaluation import trained
from trainer.models.files import model_folders
from trainer.models.files.model_folders import named_folder, source_name
from trainer.models.student import build_student
from trainer.models.teacher import build_teacher

pytest_plugins = ["support.model_folder"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(params=["hf-hub:", "hf_hub:", "HF_HUB:", "local-dir:", "local_dir:"])
def named(request, hub, folder) -> str:
    return f"{request.param}{folder if 'local' in request.param else hub}"


def test_a_name_with_a_source_is_taken_however_it_is_spelled(named, model):
    """By student, teacher, evaluate and predict (load), and compare and export (load_model)."""
    expected = logits(model)
    teacher = build_teacher(TeacherConfig(named), 7, 160, names=CLASSES)
    student = build_student(StudentConfig(named, pretrained=True), 7, 160, CLASSES)
    loaded = trained.load(named, None)
    by_word = trained.load_model(named)
    (candidate,) = candidates.choose([named], [])
    for found in (teacher.model, student, loaded.module, by_word.module):
        assert torch.equal(logits(found), expected)
    assert torch.allclose(logits(candidates.build(candidate)), expected, atol=1e-4)
    assert (loaded.name, loaded.classes, loaded.kwargs["depth"]) == (NAME, CLASSES, 2)
    random = build_student(StudentConfig(named), 5, 160)
    assert len(random.blocks) == 2 and random.num_classes == 5


def test_a_run_learns_from_a_folder_and_is_evaluated_by_its_own_name(digits, tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model(NAME, num_classes=10, depth=1, img_size=32)
    own = {"model_args": {"depth": 1, "img_size": 32}, "num_classes": 10, "label_names": None}
    name = f"local-dir:{write_folder(tmp_path / 'teacher', teacher, **own)}"
    settings = ["--teacher.name", name, "--student.name", name, "--run.stop_after_steps", 1]
    train_here(digits, tmp_path / "run", *settings)
    assert trained.load(None, tmp_path / "run" / "checkpoints" / "step-00000001.pt").name == NAME


def test_a_new_classifier_replaces_that_of_a_folder_of_other_classes(folder, model):
    student = build_student(StudentConfig(f"local-dir:{folder}", pretrained=True), 5, 160, list("vwxyz"))
    assert student.start_note == "they are of 7 classes, the dataset has 5: the classifier (head) starts from scratch"
    assert torch.equal(student.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


RESERVED = {
    "pretrained_strict": False,
    "pretrained_filter_fn": "x",
    "pretrained_cfg": {"file": "x"},
    "pretrained_cfg_overlay": {"url": "x"},
    "pretrained": False,
    "checkpoint_path": "/etc/passwd",
    "cache_dir": "/",
    "kwargs_filter": ["depth"],
    "model_cfg": {},
    "feature_cfg": {},
    "features_only": True,
    "out_indices": [0],
    "num_classes": 21_841,
    "device": "meta",
}


def test_what_a_folder_says_is_not_passed_to_timm_where_it_decides_what_is_read(model, tmp_path):
    folder = named_folder(f"local-dir:{write_folder(tmp_path / 'evil', model, model_args={'depth': 2, **RESERVED})}")
    assert folder.kwargs == {"depth": 2}
    assert torch.equal(logits(trained.load(f"local-dir:{folder.path}", None).module), logits(model))


def test_what_a_checkpoint_says_is_not_passed_to_timm_either(model, tmp_path):
    """For evaluate, predict and export (load), average (check_fits) and compare; a run's own settings are refused."""
    config = to_dict(parse(["--student.name", NAME, "--data.image_size", "160"]))
    reserved = {name: value for name, value in RESERVED.items() if not isinstance(value, dict)}
    config["student"]["kwargs"] = {"depth": 2, **reserved, "in_chans": 1}
    saved = {"format_version": 1, "step": 1, "config": config, "student": model.state_dict(), "classes": CLASSES}
    torch.save(saved, tmp_path / "own.pt")
    found = trained.load(None, tmp_path / "own.pt")
    assert found.kwargs["depth"] == 2 and not {*RESERVED, "in_chans"} & {*found.kwargs}
    assert torch.equal(logits(found.module), logits(model))
    trained.check_fits(tmp_path / "own.pt", saved)
    assert candidates.choose([str(tmp_path / "own.pt")], [])[0].name == NAME
    assert build_teacher(TeacherConfig(NAME, tmp_path / "own.pt", {"depth": 2}), 7, 160).model.num_classes == 7


@pytest.mark.parametrize("missing", ["blocks.1.mlp.fc1.weight", "patch_embed.proj.bias", "norm.weight"])
def test_weights_that_are_not_all_there_are_refused_whatever_the_files_say(model, tmp_path, missing):
    weights = {name: value for name, value in model.state_dict().items() if name != missing}
    loose = {"depth": 2, "pretrained_strict": False}
    folder = write_folder(tmp_path / "there", model, model_args=loose)
    save_file(weights, folder / "model.safetensors")
    config = to_dict(parse(["--student.name", NAME]))
    config["student"]["kwargs"] = loose
    saved = {"format_version": 1, "step": 1, "config": config, "student": weights, "ema": None, "classes": CLASSES}
    torch.save(saved, tmp_path / "own.pt")
    for opened in (
        lambda: build_teacher(TeacherConfig(f"local-dir:{folder}"), 7, 160),
        lambda: build_student(StudentConfig(f"local-dir:{folder}", pretrained=True), 7, 160),
        lambda: trained.load(f"local-dir:{folder}", None),
        lambda: trained.load(None, folder),
        lambda: trained.load(None, tmp_path / "own.pt"),
    ):
        with pytest.raises(UserError, match=f"does not fit model '{NAME}' .*it lacks '{missing}'"):
            opened()
    torch.save({**saved, "student": model.state_dict()}, tmp_path / "own.pt")
    assert "pretrained_strict" not in trained.load(None, tmp_path / "own.pt").kwargs


@pytest.mark.parametrize("name", ["dla34", "convnextv2_atto.fcmae"])
def test_weights_are_required_also_of_models_for_which_timm_does_not(name, tmp_path):
    made = timm.create_model(name, num_classes=7)
    missing = [*made.state_dict()][-1]
    torch.save({key: value for key, value in made.state_dict().items() if key != missing}, tmp_path / "w.pth")
    load = torch.nn.Module.load_state_dict
    for opened in (
        lambda: build_teacher(TeacherConfig(name, tmp_path / "w.pth"), 7, 64),
        lambda: build_student(StudentConfig(name, tmp_path / "w.pth"), 7, 64),
        lambda: trained.load(name, tmp_path / "w.pth"),
    ):
        with pytest.raises(UserError, match=f"w.pth: does not fit model '{name}' .*it lacks '{missing}'"):
            opened()
    assert torch.nn.Module.load_state_dict is load
    torch.save(made.state_dict(), tmp_path / "w.pth")
    found = build_teacher(TeacherConfig(name, tmp_path / "w.pth"), 7, 64).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in made.state_dict().items())


def spoiled(model: torch.nn.Module, value: float) -> dict[str, torch.Tensor]:
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    weights["norm.weight"][3] = value
    return weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_whoever_reads_them(model, tmp_path, value):
    folder = write_folder(tmp_path / "there", model)
    save_file(spoiled(model, value), folder / "model.safetensors")
    config = to_dict(parse(["--student.name", NAME, "--student.kwargs.depth", "2"]))
    saved = {"format_version": 1, "step": 1, "config": config, "student": spoiled(model, value), "classes": CLASSES}
    torch.save(saved, tmp_path / "own.pt")
    torch.save(spoiled(model, value), tmp_path / "plain.pth")
    two = {"depth": 2}
    for opened in (
        lambda: build_teacher(TeacherConfig(f"local-dir:{folder}"), 7, 160),
        lambda: build_teacher(TeacherConfig(NAME, tmp_path / "plain.pth", two), 7, 160),
        lambda: build_student(StudentConfig(NAME, tmp_path / "own.pt", kwargs=two), 7, 160, CLASSES),
        lambda: trained.load(None, folder),
        lambda: trained.load(None, tmp_path / "own.pt"),
        lambda: trained.load(NAME, tmp_path / "plain.pth", kwargs=two),
        lambda: candidates.choose([str(folder)], []),
    ):
        with pytest.raises(
            UserError, match="(there|safetensors|own.pt|plain.pth): 'norm.weight' is not finite: it holds NaN"
        ):
            opened()


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.complex64])
def test_weights_of_another_kind_of_number_are_named(model, tmp_path, kind):
    torch.save({**model.state_dict(), "norm.bias": model.norm.bias.detach().to(kind)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: 'norm.bias' holds .*, not floating numbers. Give the file as it was"):
        build_teacher(TeacherConfig(NAME, tmp_path / "w.pth", {"depth": 2}), 7, 160)


@pytest.mark.parametrize("value", [None, [1.0], "text"])
def test_something_else_among_weights_is_named(model, tmp_path, value):
    torch.save({**model.state_dict(), "head.weight": value}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: 'head.weight' among its weights is .*, not a tensor with a name"):
        build_teacher(TeacherConfig(NAME, tmp_path / "w.pth", {"depth": 2}), 7, 160)


@pytest.mark.parametrize("num_classes", [8, 10**5 + 1, 999_999])
def test_a_description_with_more_outputs_than_its_weights_have_makes_no_classifier(model, tmp_path, num_classes):
    own = {"num_classes": num_classes, "label_names": None}
    folder = write_folder(tmp_path / "there", model, **own)
    with pytest.raises(UserError, match="there: does not fit model"):
        trained.load(None, folder)
    assert build_teacher(TeacherConfig(f"local-dir:{folder}"), 7, 160).model.num_classes == 7


@pytest.mark.parametrize(
    "arguments", [{"depth": 10**9}, {"mlp_ratio": 1e300}, {"depth": [10**6]}, {"a": math.nan}, {"a": {"b": 10**9}}]
)
def test_arguments_with_numbers_that_no_model_has_are_named(model, tmp_path, arguments):
    name = next(iter(arguments))
    folder = write_folder(tmp_path / "there", model, model_args=arguments)
    with pytest.raises(
        UserError, match=f"config.json: the model's argument {name} is .* numbers up to 16,384. Correct"
    ):
        trained.load(None, folder)
    config = to_dict(parse(["--student.name", NAME]))
    config["student"]["kwargs"] = arguments
    torch.save({"format_version": 1, "step": 1, "config": config, "student": model.state_dict()}, tmp_path / "own.pt")
    with pytest.raises(UserError, match="own.pt: (the model's argument .* up to 16,384|.*holds student.kwargs)"):
        trained.load(None, tmp_path / "own.pt")


@pytest.mark.parametrize("value", [16_385, -1e5, [1, 10**6]])
def test_an_argument_that_could_not_be_taken_from_a_checkpoint_is_refused_before_a_run_begins(value):
    for settings in (StudentConfig, TeacherConfig, EvalStudentConfig):
        with pytest.raises(UserError, match=r"(student|teacher).kwargs.depth is .* up to 16,384. Use a smaller model"):
            settings(name=NAME, kwargs={"depth": value})
        settings(name=NAME, kwargs={"depth": 16_384})


@pytest.mark.parametrize("names", [CLASSES[:6], [*CLASSES, "h"], [[1]] * 7, "abc", 7, True])
def test_names_that_are_not_one_for_each_output_are_refused(model, tmp_path, names):
    folder = write_folder(tmp_path / "there", model, label_names=names)
    with pytest.raises(UserError, match="config.json: (label_names is|has . label_names for 7 outputs)"):
        trained.load(None, folder)


@pytest.mark.parametrize("name", RESERVED)
def test_arguments_that_are_decided_elsewhere_are_refused_in_the_settings(name):
    for settings in (StudentConfig, TeacherConfig, EvalStudentConfig):
        with pytest.raises(
            UserError, match=rf"(student|teacher).kwargs.{name}: decided by the dataset, .* Leave it out"
        ):
            settings(name=NAME, kwargs={"depth": 2, name: str(RESERVED[name])})
        settings(name=NAME, kwargs={"depth": 2})


@pytest.mark.parametrize(
    "name", ["hf-hub:nobody/nothing", "hf_hub:no name at all", "hf-hub:", "hf-hub:someone/small@v2"]
)
def test_a_repository_that_cannot_be_had_is_one_line(hub, name):
    for opened in (
        lambda: build_teacher(TeacherConfig(name), 7, 160),
        lambda: build_student(StudentConfig(name), 7, 160),
        lambda: trained.load(name, None),
        lambda: trained.load_model(name),
    ):
        with pytest.raises(
            UserError, match=r"config.json cannot be had from Hugging Face's hub \(.*local-dir:FOLDER"
        ) as error:
            opened()
        assert str(error.value).startswith(source_name(name)) and len(str(error.value)) < 330


def test_the_advice_about_a_repository_helps(hub, tmp_path):
    shutil.copytree(tmp_path / "hub" / "models--someone--small" / "snapshots" / ("a" * 40), tmp_path / "copied")
    assert trained.load(f"local-dir:{tmp_path / 'copied'}", None).num_outputs == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet51"}, "unknown model 'resnet51'; did you mean"),
        ({"pretrained_cfg": []}, "config.json: not what timm writes"),
        ({"pretrained_cfg": 7}, "config.json: not what timm writes"),
        ({"architecture": ["resnet18"]}, "config.json: architecture is"),
        ({"model_args": 7}, "config.json: model_args is 7"),
        ({"model_args": {"depth": "two"}}, "model 'test_vit' cannot be built"),
        ({"model_args": {"depth": 1}}, "there(/model.safetensors)?: does not fit model 'test_vit'"),
    ],
)
def test_a_folder_that_is_not_as_timm_writes_it_is_one_line(model, tmp_path, change, message):
    name = f"local-dir:{write_folder(tmp_path / 'there', model, **change)}"
    for opened in (lambda: build_teacher(TeacherConfig(name), 7, 160), lambda: trained.load(name, None)):
        with pytest.raises(UserError, match=message):
            opened()


NONSENSE = {
    "mean": ([0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [math.nan] * 3, [123.7, 116.3, 103.5], ["a", "b", "c"], 0.5),
    "std": ([0.2] * 4, [0, 0.2, 0.2], [-1, 1, 1], [math.inf] * 3, [True] * 3, {"r": 1}, []),
    "input_size": ([], [3, 160], [3, 0, 0], [3, 160.5, 160.5], [3, -160, -160], "160", [3, 10**400, 7], [3, 99999, 9]),
    "test_input_size": ([160], [3, "160", "160"]),
    "min_input_size": ([3, 0, 0], 7),
    "fixed_input_size": ("no", math.nan, 1),
    "crop_pct": ("a", 0, -0.9, math.nan, [0.9], True),
    "test_crop_pct": ("0.9", math.inf),
    "interpolation": (3, ["bicubic"]),
    "crop_mode": (False, {"center": 1}),
    "classifier": (7, [["head"]]),
    "first_conv": ({"a": 1}, [0]),
    "num_classes": ("many", -1, 7.5, True, 10**30, math.nan, [7]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NONSENSE.items() for value in values])
def test_a_value_in_a_description_that_cannot_be_used_is_named(model, tmp_path, key, value):
    own = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 160, 160], key: value}
    changed = {"pretrained_cfg": own, **({key: value} if key == "num_classes" else {})}
    folder = write_folder(tmp_path / "there", model, **changed)
    with pytest.raises(
        UserError, match=rf"config.json: {key} is .*, which timm never writes. Correct it, or export"
    ) as error:
        named_folder(f"local-dir:{folder}")
    assert len(str(error.value)) - len(str(tmp_path)) < 300


@pytest.mark.parametrize(
    "text", ["", "{", "7", "null", "[]", '"text"', "[" * 100_000, "\xff", "{}", '{"architecture": 1}']
)
def test_a_description_that_is_none_is_one_line(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    for opened in (lambda: trained.load(f"local-dir:{folder}", None), lambda: trained.load(None, folder)):
        with pytest.raises(UserError, match="config.json: (not what timm writes|architecture is 1)") as error:
            opened()
        assert len(str(error.value)) - 2 * len(str(folder)) < 300


def test_null_in_a_description_is_as_if_the_key_were_not_there(model, tmp_path):
    own = {"std": [0.5] * 3, "input_size": [3, 160, 160], "num_classes": 1000, "classifier": ["head"]}
    null = dict.fromkeys(("mean", "crop_pct", "interpolation", "test_input_size", "first_conv"))
    folders = {
        "absent": write_folder(tmp_path / "absent", model, pretrained_cfg=own),
        "null": write_folder(tmp_path / "null", model, pretrained_cfg={**own, **null}, model_args={"depth": 2}),
    }
    found = {name: trained.load(None, folder) for name, folder in folders.items()}
    assert found["null"].transform == found["absent"].transform and found["null"].num_outputs == 7
    for name, folder in folders.items():
        assert torch.equal(logits(found[name].module), logits(model))
        assert build_teacher(TeacherConfig(f"local-dir:{folder}"), 7, 160, names=CLASSES).model.num_classes == 7


def test_a_folder_without_weights_or_description_is_one_line(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="there: has no weights .model.safetensors, pytorch_model.bin"):
        build_teacher(TeacherConfig(f"local-dir:{folder}"), 7, 160)
    with pytest.raises(UserError, match="local-dir:.*: there is no config.json. Give a folder that timm or"):
        build_teacher(TeacherConfig(f"local-dir:{folder.parent}"), 7, 160)


def test_a_model_is_built_from_one_reading_of_its_description(folder, model, tmp_path, monkeypatch):
    """A description that vanishes once it has been read does no harm, so one that changes cannot mix two models."""
    name, text = f"local-dir:{folder}", (folder / "config.json").read_text()
    config = to_dict(parse(["--student.name", name, "--data.image_size", "160"]))
    saved = {"format_version": 1, "step": 1, "config": config, "student": model.state_dict(), "classes": CLASSES}
    torch.save(saved, tmp_path / "own.pt")
    read = model_folders.read_folder

    def read_once(path, name):
        found = read(path, name)
        (path / "config.json").unlink()
        return found

    monkeypatch.setattr(model_folders, "read_folder", read_once)
    for opened in (
        lambda: build_teacher(TeacherConfig(name), 7, 160, names=CLASSES).model,
        lambda: build_student(StudentConfig(name, pretrained=True), 7, 160, CLASSES),
        lambda: build_student(StudentConfig(name, tmp_path / "own.pt"), 7, 160, CLASSES),
        lambda: trained.load(name, None).module,
        lambda: trained.load(None, tmp_path / "own.pt").module,
    ):
        (folder / "config.json").write_text(text)
        assert torch.equal(logits(opened()), logits(model))
    (folder / "config.json").write_text(text)
    assert build_student(StudentConfig(name, pretrained=True), 7, 160, list("hijklmn")).num_classes == 7
    (folder / "config.json").write_text(text)
    assert len(build_student(StudentConfig(name), 5, 160).blocks) == 2
