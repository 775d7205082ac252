"""The student starts from weights: of its own classes, of others, or of the same in another order."""

import re
from pathlib import Path

import pytest
import timm
import torch

from pipelines.common.errors import UserError
from support.models import logits
from trainer.config.sections import StudentConfig
from trainer.models.student import build_student

NAME = "test_resnet"


@pytest.fixture
def source():
    """A model with weights and statistics of its own."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=7)
    with torch.no_grad():
        model(torch.rand(8, 3, 64, 64))
    return model.eval()


def test_a_student_may_start_from_a_checkpoint(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "start.pth")
    student = build_student(StudentConfig(name=NAME, checkpoint=tmp_path / "start.pth"), 7, 64)
    assert student.training
    assert torch.equal(logits(student), logits(source))


# one classifier, two of a distillation head, two of branches, a convolution
CLASSIFIERS = {
    "test_resnet": ["fc"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "levit_conv_128s": ["head.linear", "head_dist.linear"],
    "resnetv2_50": ["head.fc"],
    "crossvit_9_240": ["head.0", "head.1"],
    "mobilenetv3_small_050": ["classifier"],
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_fine_tuning_on_other_classes_takes_all_weights_but_the_classifiers(tmp_path, name):
    torch.manual_seed(1)
    torch.save(timm.create_model(name, num_classes=7).state_dict(), tmp_path / "start.pth")
    start = torch.load(tmp_path / "start.pth")
    size = timm.get_pretrained_cfg(name).input_size[-1]
    student = build_student(StudentConfig(name=name, checkpoint=tmp_path / "start.pth"), 10, size)
    weights = student.state_dict()
    replaced = {f"{layer}.{part}" for layer in CLASSIFIERS[name] for part in ("weight", "bias")}
    assert {key for key in start if start[key].shape != weights[key].shape} == replaced
    assert all(torch.equal(start[key], weights[key]) for key in start.keys() - replaced)
    assert all(len(weights[key]) == 10 and weights[key].isfinite().all() for key in replaced)
    layers = re.escape(", ".join(CLASSIFIERS[name]))
    assert re.fullmatch(
        rf"they are of 7 classes, the dataset has 10: the classifier \({layers}\) starts from scratch",
        student.start_note,
    )


def test_fine_tuning_starts_from_safetensors_and_from_the_average_of_a_run(source, tmp_path):
    from safetensors.torch import save_file

    save_file(source.state_dict(), tmp_path / "start.safetensors")
    other = timm.create_model(NAME, num_classes=7)
    torch.save({"student": other.state_dict(), "ema": source.state_dict()}, tmp_path / "run.pt")
    for file in ("start.safetensors", "run.pt"):
        student = build_student(StudentConfig(name=NAME, checkpoint=tmp_path / file), 10, 64)
        assert torch.equal(student.conv1[0].weight, source.conv1[0].weight), file
        assert student.fc.out_features == student.num_classes == 10


def test_the_new_classifier_is_as_random_as_one_that_is_trained_from_scratch(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "start.pth")
    tuned = build_student(StudentConfig(name=NAME, checkpoint=tmp_path / "start.pth"), 1000, 64).fc.weight
    scratch = build_student(StudentConfig(name=NAME), 1000, 64).fc.weight
    assert tuned.std().item() == pytest.approx(scratch.std().item(), rel=0.05)
    assert not torch.equal(tuned[:7], source.fc.weight)


def test_weights_of_as_many_classes_keep_their_classifier_without_a_note(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "start.pth")
    student = build_student(StudentConfig(name=NAME, checkpoint=tmp_path / "start.pth"), 7, 64)
    assert student.start_note == ""


@pytest.mark.parametrize("classes", [7, 10])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("conv1.0.weight"), "\\(it lacks 'conv1.0.weight'\\). Give the model it was"),
        (lambda weights: weights.update(more=torch.zeros(1)), "\\(it has 'more', which the model has not\\). Give"),
        (
            lambda weights: weights.update({"bn1.weight": torch.ones(3)}),
            r"'bn1.weight' is \[3\] and the model's is \[32\]",
        ),
        (lambda weights: weights.pop("fc.bias"), "it lacks 'fc.bias'"),
    ],
    ids=["missing", "unexpected", "shape", "half a classifier"],
)
def test_other_differences_are_refused_with_the_keys_name_whatever_the_classes(
    source, tmp_path, classes, change, message
):
    weights = source.state_dict()
    change(weights)
    torch.save(weights, tmp_path / "start.pth")
    with pytest.raises(UserError, match=rf"start.pth: does not fit model '{NAME}' .*{message}"):
        build_student(StudentConfig(name=NAME, checkpoint=tmp_path / "start.pth"), classes, 64)


def test_a_student_starts_from_timms_weights(source, monkeypatch):
    """The download is replaced; what timm does with the weights is not."""
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(downloaded))
    downloaded = timm.create_model("resnet18", num_classes=1000).state_dict()
    student = build_student(StudentConfig(name="resnet18", pretrained=True), 10, 64)
    assert torch.equal(student.layer4[1].conv2.weight, downloaded["layer4.1.conv2.weight"])
    assert student.fc.out_features == 10 and student.training
    assert student.start_note.startswith("they are of 1000 classes, the dataset has 10")
    assert build_student(StudentConfig(name="resnet18", pretrained=True), 1000, 64).start_note == ""


def test_timms_weights_that_cannot_be_had_are_one_line(monkeypatch):
    def offline(*arguments, **kwargs):
        raise OSError("no route to host\nTraceback ...")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    message = r"model 'resnet18': its weights cannot be downloaded \(OSError: no route to host .*\). Give"
    with pytest.raises(UserError, match=message):
        build_student(StudentConfig(name="resnet18", pretrained=True), 10, 64)
    without = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(UserError, match=f"model '{without}': timm has no pretrained weights for it"):
        build_student(StudentConfig(name=without, pretrained=True), 10, 64)


def test_a_student_starts_from_one_place():
    with pytest.raises(UserError, match="student.pretrained is true and student.checkpoint is a.pt: start from one"):
        StudentConfig(checkpoint=Path("a.pt"), pretrained=True)
