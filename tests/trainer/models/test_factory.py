import re

import pytest
import timm
import torch

from conftest import train_here
from pipelines.common.errors import UserError
from support.models import logits
from trainer.config.sections import StudentConfig, TeacherConfig, parse
from trainer.evaluation import trained as inference
from trainer.models.checks import check_images, reporting_one_value_per_channel
from trainer.models.factory import all_weights_required
from trainer.models.files.weights import named_outputs, read_file, read_weights
from trainer.models.preprocessing import preprocessing
from trainer.models.student import build_student
from trainer.models.teacher import build_teacher, build_teachers

NAME = "test_resnet"


class WithPart(torch.nn.Linear):
    """A layer that loads a part of itself while it is loaded, without some of the part's weights."""

    def __init__(self):
        super().__init__(2, 2)
        self.part = torch.nn.BatchNorm1d(2)

    def _load_from_state_dict(self, state_dict, *args):
        super()._load_from_state_dict(state_dict, *args)
        self.part.load_state_dict({"weight": state_dict["part.weight"]}, strict=False)


def test_weights_are_required_of_the_whole_model_and_not_of_each_part_that_loads_itself():
    model = WithPart()
    weights = model.state_dict()
    load = torch.nn.Module.load_state_dict
    with all_weights_required():
        model.load_state_dict(weights)
        weights.pop("part.bias")
        with pytest.raises(RuntimeError, match="it lacks 'part.bias'"):
            model.load_state_dict(weights, strict=False)
    assert torch.nn.Module.load_state_dict is load


@pytest.fixture
def source():
    """A model with weights and statistics of its own."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=7)
    with torch.no_grad():
        model(torch.rand(8, 3, 64, 64))
    return model.eval()


def teacher(path, num_classes=7, name=NAME):
    return build_teacher(TeacherConfig(name=name, checkpoint=path), num_classes, image_size=64).model


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "student", "ema", "state_dict_ema"])
def test_a_teacher_loads_however_its_weights_are_nested(source, tmp_path, nest):
    weights = source.state_dict()
    torch.save(weights if nest is None else {"epoch": 3, nest: weights}, tmp_path / "teacher.pth")
    loaded = teacher(tmp_path / "teacher.pth")
    assert torch.equal(logits(loaded), logits(source))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_teacher_loads_from_safetensors_and_from_ddp(source, tmp_path):
    from safetensors.torch import save_file

    save_file(source.state_dict(), tmp_path / "teacher.safetensors")
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "ddp.pth")
    for name in ("teacher.safetensors", "ddp.pth"):
        assert torch.equal(logits(teacher(tmp_path / name)), logits(source))


def test_the_average_is_preferred_as_in_timm(source, tmp_path):
    other = timm.create_model(NAME, num_classes=7)
    torch.save({"student": other.state_dict(), "ema": source.state_dict()}, tmp_path / "run.pt")
    assert torch.equal(logits(teacher(tmp_path / "run.pt")), logits(source))


def authors_format(weights: dict) -> dict:
    """timm's TResNet v2 weights under the names, and with the InplaceABN scales, of the authors' file."""
    renamed = {}
    for name, value in weights.items():
        if name.endswith("bn.weight"):
            value = value - 1e-5  # InplaceABN uses |weight| + eps
        name = re.sub(r"downsample\.(\d+)\.conv", r"downsample.\1.0", name)
        name = re.sub(r"downsample\.(\d+)\.bn", r"downsample.\1.1", name)
        name = re.sub(r"conv(\d+)\.conv", r"conv\1.0", name)
        name = re.sub(r"conv(\d+)\.bn", r"conv\1.1", name)
        renamed[name] = value
    return renamed


def test_the_authors_tresnet_file_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("tresnet_v2_l", num_classes=5).eval()
    for module in source.modules():  # scales away from zero, where |weight| is not the same
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    authors = authors_format(source.state_dict())
    assert not set(authors) & {"body.conv1.conv.weight"} and "body.conv1.0.weight" in authors
    torch.save({"state_dict": authors}, tmp_path / "tresnet_l_v2_83_9.pth")
    loaded = teacher(tmp_path / "tresnet_l_v2_83_9.pth", num_classes=5, name="tresnet_l_v2")
    assert torch.allclose(logits(loaded), logits(source), rtol=1e-4, atol=1e-5)
    expects = preprocessing(loaded)
    assert expects.mean == (0.0, 0.0, 0.0) and expects.std == (1.0, 1.0, 1.0) and expects.fill == (0, 0, 0)


def test_another_number_of_classes_is_refused_with_both_numbers(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="teacher.pth: its weights have 7 classes, the dataset has 10"):
        teacher(tmp_path / "teacher.pth", num_classes=10)


def test_another_models_weights_are_refused(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(UserError) as error:
        teacher(tmp_path / "teacher.pth", name="test_vit")
    assert str(error.value) == (
        f"{tmp_path / 'teacher.pth'}: does not fit model 'test_vit' (it lacks 'cls_token', 'pos_embed' and 78 more; it "
        "has 'conv1.0.weight', 'conv1.1.weight' and 90 more, which the model has not). Give the model it was saved "
        "from, or a file of this one"
    )


class Payload:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "pickle"])
def test_files_that_hold_no_weights_are_refused_and_nothing_in_them_runs(tmp_path, capsys, content):
    path = tmp_path / "teacher.pth"
    if content is None:
        torch.save({"model": Payload()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="teacher.pth: (damaged, or no file of weights|holds no weights)"):
        read_weights(path)
    assert "never run" not in capsys.readouterr().out


def test_a_missing_file_and_a_file_without_tensors(tmp_path):
    with pytest.raises(UserError, match="none.pth: cannot be read"):
        read_weights(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="empty.pth: holds no weights"):
        read_weights(tmp_path / "empty.pth")


def test_a_checkpoint_of_this_trainer_has_the_names_of_its_classes(source, tmp_path):
    content = {"student": source.state_dict(), "ema": None, "classes": list("abcdefg")}
    torch.save(content, tmp_path / "run.pt")
    assert named_outputs(read_file(tmp_path / "run.pt")) == list("abcdefg")
    for classes in (None, 7, {"a": 0}, [0, 1]):  # A synthetic dataset has no names, nor have files of others.
        torch.save({**content, "classes": classes}, tmp_path / "other.pt")
        assert named_outputs(read_file(tmp_path / "other.pt")) is None
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    assert named_outputs(read_file(tmp_path / "plain.pt")) is None


def test_an_unknown_model_names_its_neighbours():
    with pytest.raises(UserError, match=r"unknown model 'resnet5O'; did you mean .*resnet50"):
        build_student(StudentConfig(name="resnet5O"), 10, 224)


def test_a_models_own_arguments_are_passed_on_and_wrong_ones_refused():
    model = build_student(StudentConfig(name="test_vit", kwargs={"depth": 2}), 10, 64)
    assert len(model.blocks) == 2
    with pytest.raises(UserError, match=r"model 'test_resnet' cannot be built .*no_such"):
        build_student(StudentConfig(name=NAME, kwargs={"no_such": 1}), 10, 64)


def test_models_of_fixed_size_are_built_for_the_image_size():
    model = build_student(StudentConfig(name="test_vit"), 10, image_size=96)
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 10)


def test_a_teacher_without_weights_to_download_is_refused():
    without = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(UserError, match="has no pretrained weights for it. Give a file with its weights"):
        build_teacher(TeacherConfig(name=without), 1000, 224)


def test_downloaded_weights_of_other_classes_are_refused_before_the_download():
    with pytest.raises(
        UserError, match="timm's weights of 'tresnet_v2_l': its weights have 1000 classes, the dataset has 10"
    ):
        build_teacher(TeacherConfig(name="tresnet_v2_l"), 10, 64)


def test_the_fill_colour_is_the_students_mean():
    assert preprocessing(timm.create_model("resnet18")).fill == (124, 116, 104)


# --- arguments and images that a model cannot take ---

# Every model refuses these.
REFUSED = {
    "in_chans": [1, 4, 0, "abc"],
    "device": ["nope"],
    "features_only": [True],
    "pretrained_cfg": ["x"],
    "pretrained_strict": [False],
    "global_pool": ["nope"],
    "drop_rate": [5, "abc"],
    "block_fn": ["x"],
    "no_such": [1, "x"],
}
OWN = {  # some models have such an argument, which they may take
    "depth": ["abc", -1, 1.5],
    "num_heads": [0, -1],
    "embed_dim": [7, -3, "x"],
    "global_pool": [""],
    "act_layer": ["nope"],
    "norm_layer": ["nope"],
    "img_size": [-1, "abc", [1, 2, 3]],
    "patch_size": [1000, 0],
}
TAKEN = {
    "test_resnet": {"drop_rate": [0.5], "global_pool": ["max"], "no_such": [None]},
    "test_vit": {"drop_rate": [0.5], "depth": [1, 2], "num_heads": [1], "patch_size": [32]},
    "levit_128s": {"drop_rate": [0.0], "no_such": [None]},
}


def made(name: str, key: str, value) -> str:
    """The message about an argument of a student; "" if it is taken."""
    try:
        student = build_student(StudentConfig(name, kwargs={key: value}), 10, 64)
        check_images(student, name, 64, "")
    except UserError as error:
        assert len(str(error)) < 320, str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("name", TAKEN)
def test_arguments_that_a_model_cannot_take_are_one_line(name):
    """Whatever a person writes in student.kwargs: the model is made, or a short line says why not."""
    for key, values in OWN.items():
        for value in values:
            made(name, key, value)
    for key, values in REFUSED.items():
        assert all(made(name, key, value) for value in values), key
    for key, values in TAKEN[name].items():
        assert not any(made(name, key, value) for value in values), key


@pytest.mark.parametrize("section", ["student", "teacher"])
def test_models_of_images_of_one_channel_are_refused_with_the_reason(section):
    with pytest.raises(UserError, match=f"{section}.kwargs.in_chans: decided by the dataset, whose images have 3 chan"):
        parse([f"--{section}.name", NAME, f"--{section}.kwargs.in_chans", "1"])


SMALL = ["--run.global_batch", 4, "--augment.mix_group", 1, "--augment.repeats", 1, "--data.image_size", 32]


@pytest.mark.parametrize("more", [["--run.micro_batch", 2], ["--data.image_size", 96]], ids=["images", "pixels"])
def test_batch_norm_over_one_value_is_one_line_and_the_advice_helps(digits, tmp_path, more):
    settings = [*SMALL, "--student.name", NAME, "--run.stop_after_steps", 1]
    message = "BatchNorm would see a single value of a channel"
    with pytest.raises(UserError, match=message), reporting_one_value_per_channel():
        train_here(digits, tmp_path / "run", *settings)
    train_here(digits, tmp_path / "more", *settings, *more)


def test_a_teacher_that_gives_features_is_refused(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=10, global_pool="").state_dict(), tmp_path / "w.pth")
    teacher = ["--teacher.name", "test_vit", "--teacher.checkpoint", str(tmp_path / "w.pth")]
    config = parse([*teacher, "--teacher.kwargs.global_pool", "", "--data.image_size", "64"])
    with pytest.raises(
        UserError, match=r"model 'test_vit' gives \[2, 17, 10\] for 2 images in evaluation, not \[2, 10\]: it is no"
    ):
        build_teachers(config, 10, None)


def test_a_file_that_names_its_model_and_its_classes_is_opened_by_both(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    names = ["owl", "dog", "cat"]
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict(), "classes": names}, tmp_path / "named.pth")
    trained = inference.load(None, tmp_path / "named.pth")
    assert (trained.name, trained.classes, trained.classes_guessed) == ("test_resnet", names, False)
    torch.save({"state_dict": model.state_dict(), "classes": names[:2]}, tmp_path / "short.pth")
    with pytest.raises(UserError, match="names 2 classes, and its weights have 3 outputs"):
        inference.load("test_resnet", tmp_path / "short.pth")


OTHER_FILES = {
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(64), "damaged, or no file of weights"),
}


@pytest.mark.parametrize(("content", "message"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind_in_place_of_weights_is_called_what_it_is(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.pth")
