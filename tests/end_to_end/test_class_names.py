"""The order of classes on the model's side: outputs without names are refused where it is in doubt; names settle it."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from conftest import train_here
from pipelines.common.errors import UserError
from pipelines.shards.manifest import manifest_bytes, read_manifest, sorted_classes
from support.processes import without_workers
from tools import evaluate, predict
from tools.average import Scorer
from tools.lib.shards.build import BuildOptions, build
from trainer.cluster.world import World
from trainer.config.cli import parse_settings
from trainer.config.sections import StudentConfig, TeacherConfig, parse
from trainer.evaluation import trained as inference
from trainer.models.class_names import order_doubt
from trainer.models.student import build_student
from trainer.models.teacher import build_teacher, build_teachers

NAME, SIZE = "test_resnet", 32
NUMERIC = [str(label) for label in range(12)]
TEXT = sorted_classes(NUMERIC, "text")
DOUBT = "the order of the classes was not stated: class 2 is '10' in text order"
NAME_OR_REBUILD = r"Name the outputs in a file \(option classes\), or build the dataset with --class-order"


def pixels(label: int, i: int) -> np.ndarray:
    colour = np.array([label % 3, label // 3 % 2, label // 6]) * [100, 180, 180] + 30
    noise = np.random.default_rng(100 * label + i).normal(0, 6, (SIZE, SIZE, 3))
    return np.clip(colour + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory) -> Path:
    """A dataset of the classes 0 to 11, a colour each, in text order because nobody chose."""
    source, out = (tmp_path_factory.mktemp("colours") / name for name in ("source", "out"))
    for split, count in (("train", 12), ("val", 3)):
        for label, name in enumerate(NUMERIC):
            (source / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels(label, i)).save(source / split / name / f"{split}{label}_{i}.jpg", quality=95)
    with without_workers():
        build(source, out, BuildOptions())
    return out


@pytest.fixture
def stated(doubtful, tmp_path) -> Path:
    """The same dataset, but a person chose the text order."""
    shutil.copytree(doubtful, tmp_path / "stated")
    manifest = {**read_manifest(doubtful), "class_order": "text"}
    (tmp_path / "stated" / "manifest.json").write_bytes(manifest_bytes(manifest))
    return tmp_path / "stated"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights that know every colour, output k is class k: the order of a tool that sorts folders as numbers."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=12).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = np.stack([pixels(label, i) for label in range(12) for i in range(6)])
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True).double()
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        targets = torch.eye(12, dtype=torch.float64).repeat_interleave(6, 0) * 40
        solved = torch.linalg.lstsq(features.T @ features + 1e-6 * torch.eye(features.shape[1]), features.T @ targets)
        model.fc.weight.copy_(solved.solution[:-1].T)
        model.fc.bias.copy_(solved.solution[-1])
    torch.save(model.state_dict(), (folder := tmp_path_factory.mktemp("weights")) / "w.pth")
    return folder / "w.pth"


@pytest.fixture
def listed(tmp_path) -> Path:
    (tmp_path / "numeric.txt").write_text("\n".join(NUMERIC))
    return tmp_path / "numeric.txt"


def evaluated(root: Path, weights: Path, *more) -> dict:
    given = [
        "--data.root",
        root,
        "--student.name",
        NAME,
        "--student.checkpoint",
        weights,
        "--data.image_size",
        SIZE,
    ]
    config = parse_settings(evaluate.EvalConfig, [str(each) for each in (*given, *more)], prog="", description="")
    return evaluate.evaluate_dataset(config, World(0, 1, 1, torch.device("cpu")))


def refused(message: str):
    return pytest.raises(UserError, match=message)


# --- what is refused, and that its remedies help ---


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_run_refuses_outputs_without_names_and_takes_them_with_names(
    doubtful, stated, weights, listed, tmp_path, who
):
    given = [f"--{who}.name", NAME, f"--{who}.checkpoint", weights]
    steps = ["--run.global_batch", 48, "--augment.mix_group", 16, "--augment.repeats", 1, "--run.stop_after_steps", 1]
    with refused(f"w.pth: its outputs have no names, and {DOUBT}.*{NAME_OR_REBUILD}") as error:
        train_here(doubtful, tmp_path / "refused", *steps, *given)
    assert len(str(error.value)) - len(str(weights)) < 330 and not (tmp_path / "refused").exists()
    train_here(doubtful, tmp_path / "named", *steps, *given, f"--{who}.classes", listed)
    train_here(stated, tmp_path / "run", *steps, *given)


def test_every_teacher_is_asked(doubtful, weights, listed):
    first = ["--teacher.name", NAME, "--teacher.checkpoint", str(weights), "--teacher.classes", str(listed)]
    other = json.dumps([{"name": NAME, "checkpoint": str(weights)}])
    config = parse([*first, "--teacher.others", other])
    with refused(f"w.pth: its outputs have no names, and {DOUBT}"):
        build_teachers(config, 12, TEXT, order_doubt(doubtful))


def test_timms_own_weights_of_as_many_classes_are_refused_before_the_download():
    names = sorted_classes([str(i) for i in range(1000)], "text")
    with refused("timm's weights of 'resnet18': its outputs have no names, and DOUBT. Name the outputs in a file"):
        build_student(StudentConfig("resnet18", pretrained=True), 1000, 64, names, "DOUBT")
    with refused("timm's weights of 'resnet18': its outputs have no names, and DOUBT"):
        build_teacher(TeacherConfig("resnet18"), 1000, 64, names=names, doubt="DOUBT")


def test_an_evaluation_refuses_outputs_without_names_and_takes_them_with_names(doubtful, stated, weights, listed):
    with refused(f"w.pth: its outputs have no names, and {DOUBT}.*{NAME_OR_REBUILD}"):
        evaluated(doubtful, weights)
    right = evaluated(doubtful, weights, "--student.classes", listed)
    assert right["top1"] == 100


def test_predict_refuses_outputs_without_names_for_images_of_such_a_dataset_alone(doubtful, weights, listed, tmp_path):
    def say(*paths, classes=None):
        names = {"checkpoint": weights, "name": NAME, "classes": classes, "top_k": 1, "batch": 4}
        predict.predict(argparse.Namespace(paths=list(paths), out=tmp_path / "out.csv", **names))
        return (tmp_path / "out.csv").read_text()

    for path in (doubtful, doubtful / "val", next((doubtful / "val").glob("*.tar"))):
        with refused(f"w.pth: its outputs have no names, and {DOUBT}.*{NAME_OR_REBUILD}"):
            say(path)
    rows = [line.split(",") for line in say(doubtful / "val", classes=listed).splitlines()[1:]]
    assert len(rows) == 36 and all(Path(file).parts[-2] == best for file, _, best, *_ in rows)
    Image.fromarray(pixels(11, 0)).save(tmp_path / "loose.png")
    (tmp_path / "manifest.json").write_text("{}")  # Another program wrote this one.
    assert ",11," in say(tmp_path / "loose.png")


def test_a_greedy_soup_refuses_outputs_without_names(doubtful, stated, weights):
    trained = inference.load(NAME, weights, image_size=SIZE)
    with refused(f"w.pth: its outputs have no names, and {DOUBT}.*{NAME_OR_REBUILD}"):
        Scorer(doubtful).top1(trained)
    assert Scorer(stated).top1(trained) < 20


def test_guessed_names_count_only_where_they_are_the_datasets(doubtful):
    model = timm.create_model(NAME, num_classes=1000)
    transform = inference.EvalTransform(SIZE, 1.0, "center", "bicubic")
    guessed = [f"n{i}" for i in range(1000)]
    trained = inference.TrainedModel(model, NAME, {}, transform, guessed, "w.pth", classes_guessed=True)
    assert trained.order_of(guessed[::-1], "DOUBT")[:2] == [999, 998]
    with refused("w.pth: its outputs have no names, and DOUBT"):
        trained.order_of(sorted_classes([str(i) for i in range(1000)], "text"), "DOUBT")


# --- the student's classifier ---

CLASSIFIERS = ["test_resnet", "levit_128s", "levit_conv_128s", "crossvit_9_240", "mobilenetv3_small_050", "test_vit"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_is_put_into_the_datasets_order(tmp_path, name):
    """One layer, two of a distillation head, two branches, a convolution."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=12).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    size = timm.get_pretrained_cfg(name).input_size[-1]
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        expected = model(images)[:, [int(each) for each in TEXT]]
    torch.save({"student": model.state_dict(), "classes": NUMERIC}, tmp_path / "own.pt")
    student = build_student(StudentConfig(name, tmp_path / "own.pt"), 12, size, TEXT, "DOUBT")
    assert student.training and "in another order, so the classifier is put into" in student.start_note
    with torch.no_grad():
        assert torch.allclose(student.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_names_puts_the_classifier_into_the_datasets_order(weights, listed):
    student = build_student(StudentConfig(NAME, weights, classes=listed), 12, SIZE, TEXT, "DOUBT")
    plain = torch.load(weights, weights_only=True)
    assert "in another order, so the classifier is put into" in student.start_note
    assert torch.equal(student.fc.weight, plain["fc.weight"][[int(each) for each in TEXT]])


def test_a_student_starts_from_a_checkpoint_of_this_trainer_by_the_names_of_its_classes(
    stated, weights, tmp_path, capsys
):
    torch.save({"student": torch.load(weights, weights_only=True), "classes": NUMERIC}, tmp_path / "own.pt")
    settings = ["--optim.lr", 0, "--schedule.warmup_lr", 0, "--augment.repeats", 1]
    settings += ["--student.name", NAME, "--run.global_batch", 48, "--augment.mix_group", 16]
    settings += ["--run.stop_after_steps", 1, "--student.checkpoint", tmp_path / "own.pt"]
    train_here(stated, tmp_path / "run", *settings)
    assert "own.pt: their classes are in another order, so the classifier is put into" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-00000001.pt", weights_only=True)
    started = torch.load(weights, weights_only=True)["fc.weight"][[int(name) for name in TEXT]]
    assert saved["classes"] == TEXT and torch.equal(saved["student"]["fc.weight"], started)


def test_names_equal_to_the_datasets_change_no_bit(weights, tmp_path):
    plain = torch.load(weights, weights_only=True)
    torch.save({"student": plain, "classes": TEXT}, tmp_path / "own.pt")
    student = build_student(StudentConfig(NAME, tmp_path / "own.pt"), 12, SIZE, TEXT, "DOUBT")
    assert student.start_note == "" and all(
        torch.equal(plain[name], value) for name, value in student.state_dict().items()
    )


def test_weights_of_as_many_other_classes_get_a_new_classifier(weights, tmp_path):
    plain = torch.load(weights, weights_only=True)
    torch.save({"student": plain, "classes": [*TEXT[:-1], "other"]}, tmp_path / "own.pt")
    student = build_student(StudentConfig(NAME, tmp_path / "own.pt"), 12, SIZE, TEXT)
    assert student.start_note == (
        "they are of other classes, '9' of the dataset is not among them: the classifier (fc) starts from scratch"
    )
    changed = {name for name, value in student.state_dict().items() if not torch.equal(plain[name], value)}
    assert changed == {"fc.weight", "fc.bias"}


def test_a_classifier_that_cannot_be_moved_is_refused(weights, listed, monkeypatch):
    monkeypatch.setattr("trainer.models.student.classifier_layers", lambda model: ("conv1",))
    with refused("numeric.txt: names the classes in another order .* cannot be put into the dataset's. Build the"):
        build_student(StudentConfig(NAME, weights, classes=listed), 12, SIZE, TEXT)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NUMERIC[:-1], r"c.txt: names 11 classes, .*w.pth has 12 outputs. Name every output"),
        ([*NUMERIC[:-1], "10"], ""),
    ],
)
def test_a_file_of_names_must_name_every_output(weights, tmp_path, names, message):
    (tmp_path / "c.txt").write_text("\n".join(names))
    config = StudentConfig(NAME, weights, classes=tmp_path / "c.txt")
    if message:
        with refused(message):
            build_student(config, 12, SIZE, TEXT)
    else:
        assert "'11' of the dataset is not among them" in build_student(config, 12, SIZE, TEXT).start_note


@pytest.mark.parametrize("names", [[*TEXT, "more"], TEXT[:-1], [*TEXT, *TEXT], []], ids=len)
def test_a_checkpoint_must_name_every_output_and_the_advice_helps(weights, listed, tmp_path, names):
    torch.save({"student": torch.load(weights, weights_only=True), "classes": names}, tmp_path / "own.pt")
    for num_classes, dataset in ((12, TEXT), (5, TEXT[:5])):
        with refused(rf"own.pt: names {len(names)} classes, .*own.pt has 12 outputs. .* in a file .option classes"):
            build_student(StudentConfig(NAME, tmp_path / "own.pt"), num_classes, SIZE, dataset)
    student = build_student(StudentConfig(NAME, tmp_path / "own.pt", classes=listed), 12, SIZE, TEXT)
    assert torch.equal(student.fc.bias, torch.load(weights, weights_only=True)["fc.bias"][[int(each) for each in TEXT]])


def test_student_classes_without_weights_are_refused():
    with refused("student.classes is c.txt, and there are no weights whose outputs it could name"):
        parse(["--student.classes", "c.txt"])


# --- names that occur twice ---

CRANES = ["tench", "crane", "jay", "crane"]


def test_classes_of_one_name_are_matched_by_place_where_both_lists_are_equal(tmp_path):
    model = timm.create_model(NAME, num_classes=4)
    torch.save({"student": model.state_dict(), "classes": CRANES}, tmp_path / "own.pt")
    teacher = build_teacher(TeacherConfig(NAME, tmp_path / "own.pt"), 4, SIZE, names=CRANES)
    assert teacher.order is None
    student = build_student(StudentConfig(NAME, tmp_path / "own.pt"), 4, SIZE, CRANES)
    assert torch.equal(student.fc.weight, model.fc.weight) and student.start_note == ""
    transform = inference.EvalTransform(SIZE, 1.0, "center", "bicubic")
    assert inference.TrainedModel(model, NAME, {}, transform, CRANES, "own.pt").order_of(CRANES, "") is None


@pytest.mark.parametrize(
    "other", [CRANES[::-1], ["crane", "tench", "crane", "jay"], ["tench", "jay", "crane", "crane"]]
)
def test_classes_of_one_name_in_another_order_are_refused(tmp_path, other):
    torch.save({"student": timm.create_model(NAME, num_classes=4).state_dict(), "classes": other}, tmp_path / "own.pt")
    for made in (
        lambda: build_teacher(TeacherConfig(NAME, tmp_path / "own.pt"), 4, SIZE, names=CRANES),
        lambda: build_student(StudentConfig(NAME, tmp_path / "own.pt"), 4, SIZE, CRANES),
    ):
        with refused("class 'crane' of the dataset is 2 times among the model's 4, not once"):
            made()
