"""What the student learns from: several teachers, their image sizes, their orders of classes, and how they do."""

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

from conftest import TINY
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.manifest import read_manifest
from support.ranks import run_ranks
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import Config, DistillConfig, OtherTeacher, TeacherConfig, parse, to_yaml
from trainer.feed import dataset_classes, rank_plans
from trainer.loop import train
from trainer.models.class_names import class_order, read_classes
from trainer.models.factory import preprocessing
from trainer.models.teacher import (
    agreement,
    build_teacher,
    build_teachers,
    chance_warning,
    mean_logits,
    resize_pixels,
    teacher_warning,
)
from trainer.update.loss import usi_loss
from trainer.update.mixing import mix_pixels, partners

ONE = World(0, 1, 1, torch.device("cpu"))
VIT = {"depth": 1}  # of vit_tiny_patch16_224, which takes one size of image


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Weights of three models of ten classes, none of which has learned anything."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(5)
    models = {
        "test_resnet": timm.create_model("test_resnet", num_classes=10),
        "resnet18": timm.create_model("resnet18", num_classes=10),
        "vit_tiny_patch16_224": timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=48, **VIT),
    }
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in models}


def arguments(digits: Path, out: Path, *more) -> list[str]:
    return [*TINY, "--data.root", str(digits), "--run.out", str(out), *map(str, more)]


def train_here(digits: Path, out: Path, *more) -> list[dict]:
    """The train lines of a run in this process."""
    train(build(parse(arguments(digits, out, "--run.log_every", 1, *more)), ONE))
    return [line for line in read_json_lines(out / "metrics.jsonl") if line["kind"] == "train"]


def first_teacher(files, name="test_resnet") -> list[str]:
    return ["--teacher.name", name, "--teacher.checkpoint", str(files[name])]


def other(files, name, **more) -> str:
    return json.dumps([{"name": name, "checkpoint": str(files[name]), **more}])


def first_batch(run):
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 1, ONE, 64))) as batches:
        return next(batches)


# --- several teachers ---


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_target_is_the_mean_of_the_teachers_probabilities_at_the_temperature(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = [5 * torch.randn(6, 10, generator=generator) for _ in range(3)]
    mean = torch.stack([(each.double() / temperature).softmax(1) for each in logits]).mean(0)
    found = mean_logits(logits, temperature)
    assert found.dtype == torch.float32
    assert torch.allclose((found.double() / temperature).softmax(1), mean, atol=1e-6)
    student = torch.randn(6, 10, generator=generator)
    labels, lam = torch.arange(6), torch.full((6,), 0.7)
    config = DistillConfig(weight=2.0, label_weight=0.0, temperature=temperature)
    loss = usi_loss(student, found, labels, labels, lam, config)
    log_p = (student.double() / temperature).log_softmax(1)
    expected = 2 * temperature**2 * (mean * (mean.log() - log_p)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_of_one_teacher_is_that_teacher_to_the_bit():
    logits = torch.randn(4, 10)
    assert mean_logits([logits], 3.0) is logits


@pytest.mark.parametrize("scale", [1e-4, 60.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_finite_where_teachers_are_certain_of_different_classes(scale, dtype):
    """The probabilities themselves are 0 and 1 there, and their logarithm is not finite."""
    certain = scale * torch.eye(10)
    found = mean_logits([certain.to(dtype), certain.flip(1).to(dtype)], 1.0)
    assert found.isfinite().all()
    if scale > 1:
        expected = torch.full((10,), 0.5)
        assert torch.allclose(found.softmax(1).diagonal(), expected, atol=1e-5)


def test_every_teacher_sees_the_pixels_under_its_own_normalisation_and_in_its_own_size(digits, files, tmp_path):
    """test_resnet's mean and std are 0.5, resnet18's are ImageNet's."""
    more = ["--teacher.others", other(files, "resnet18", image_size=40)]
    run = build(parse(arguments(digits, tmp_path, *first_teacher(files), *more, "--run.micro_batch", 64)), ONE)
    batch, seen = first_batch(run), {}
    models = {"student": run.state.student, **{str(i): each.model for i, each in enumerate(run.step.teacher.members)}}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _, images, name=name: seen.update({name: images[0].detach().clone()}))
    run.step(iter([batch]), 0)
    mixed = mix_pixels(batch)
    for name, pixels in (("student", mixed), ("0", mixed), ("1", resize_pixels(mixed, 40))):
        expects = preprocessing(models[name])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (expects.mean, expects.std))
        raw = 255 * (seen[name] * std + mean)
        assert torch.allclose(raw, pixels.permute(0, 3, 1, 2).float(), atol=1e-3), name
    assert seen["1"].shape[2:] == (40, 40) and seen["0"].shape[2:] == (32, 32)
    assert not any(model.training for name, model in models.items() if name != "student")
    assert not any(parameter.requires_grad for parameter in run.step.teacher.parameters())


def test_what_the_teachers_saw_is_gone_before_the_student_sees_its_images(digits, files, tmp_path):
    """So it takes no memory beside what the student keeps for its backward pass. One teacher has a size of its own."""
    more = ["--teacher.others", other(files, "resnet18", image_size=40), "--run.micro_batch", 64]
    run = build(parse(arguments(digits, tmp_path, *first_teacher(files), *more)), ONE)
    storages, gone = [], []
    for teacher in run.step.teacher.members:
        teacher.model.register_forward_pre_hook(
            lambda _, images: storages.append(StorageWeakRef(images[0].untyped_storage()))
        )
    run.state.student.register_forward_pre_hook(lambda *_: gone.extend(each.expired() for each in storages))
    run.step(iter([first_batch(run)]), 0)
    assert gone == [True, True]


def test_a_run_learns_from_the_mean_of_its_teachers(digits, files, tmp_path):
    """The first step's loss is the formula, with the probabilities of two plain timm models."""
    more = ["--teacher.others", other(files, "resnet18"), "--distill.temperature", 2, "--run.micro_batch", 64]
    setting = [*first_teacher(files), *more, "--student.name", "test_vit"]
    run = build(parse(arguments(digits, tmp_path / "run", *setting)), ONE)
    batch = first_batch(run)
    pixels = mix_pixels(batch).permute(0, 3, 1, 2).double() / 255

    def logits(name, model):
        expects = preprocessing(model)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (expects.mean, expects.std))
        return model.double()((pixels - mean) / std)

    with torch.no_grad():
        probabilities = 0
        for name in ("test_resnet", "resnet18"):
            model = timm.create_model(name, num_classes=10).eval()
            model.load_state_dict(torch.load(files[name], weights_only=True))
            probabilities = probabilities + (logits(name, model) / 2).softmax(1) / 2
        student = logits("test_vit", run.state.student)
    own = F.cross_entropy(student, batch.labels, reduction="none")
    partner = F.cross_entropy(student, partners(batch.labels, batch.mix_group), reduction="none")
    lam = batch.lam.double()
    divergence = (probabilities * (probabilities.log() - (student / 2).log_softmax(1))).sum(1).mean()
    expected = (lam * own + (1 - lam) * partner).mean() + 5 * 4 * divergence
    lines = train_here(digits, tmp_path / "run", *setting, "--run.stop_after_steps", 1)
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"] == "test_resnet + resnet18"
    assert "teacher.others" in [item["key"] for item in summary["deviations"]]


def test_a_run_with_several_teachers_resumes_bit_equal_and_tells_that_they_changed(digits, files, tmp_path, capsys):
    setting = [*first_teacher(files), "--teacher.others", other(files, "resnet18", image_size=24)]
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            train_here(digits, tmp_path / name, *setting, "--run.stop_after_steps", steps)
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000004.pt", weights_only=True)["student"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    train_here(digits, tmp_path / "stopped", *first_teacher(files), "--run.stop_after_steps", 5)
    assert "changed since the checkpoint: teacher.others was [{'name': 'resnet18'" in capsys.readouterr().out


def test_teachers_are_listed_in_a_file_and_on_the_command_line_and_read_back(tmp_path):
    text = "teacher:\n  name: resnet50\n  others:\n  - {name: a, kwargs: {depth: 2}, checkpoint: x.pth}\n  - name: b\n"
    (tmp_path / "my.yaml").write_text(text)
    config = parse(["--config", str(tmp_path / "my.yaml")])
    listed = '[{"name": "a", "kwargs": {"depth": 2}, "checkpoint": "x.pth"}, {"name": "b"}]'
    assert parse(["--teacher.name", "resnet50", "--teacher.others", listed]) == config
    assert config.teacher.others == [OtherTeacher("a", Path("x.pth"), {"depth": 2}), OtherTeacher("b")]
    assert config.teacher.title == "resnet50 + a + b" and TeacherConfig(name=None).title is None
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "resolved.yaml")]) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[{"nmae": "a"}]', "--teacher.others: unknown key 'nmae' in an item; did you mean 'name'. See --help"),
        ('[{"name": "a", "x": 1}]', "unknown key 'x' in an item; there are name, checkpoint, kwargs, image_size, clas"),
        ('[{"image_size": 3}]', "--teacher.others: the following arguments are required: name"),
        ('[{"name": "a", "image_size": "big"}]', "--teacher.others: --image_size: 'big' is not a whole number"),
        ("resnet50", "a list of items with keys [{name: resnet50}]"),
        ('[{"name": "a"}, {"name": "b", "kwargs": {"num_classes": 3}}]', "teacher.others[1].kwargs.num_classes: decid"),
        ('[{"name": "a", "image_size": -1}]', "teacher.others[0].image_size is -1; it must lie in [0, 4096]"),
    ],
)
def test_mistakes_in_the_list_of_teachers(value, message):
    with pytest.raises(UserError) as error:
        parse(["--teacher.others", value])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "setting", [("others", '[{"name": "resnet50"}]'), ("image_size", "96"), ("classes", "x.txt"), ("checkpoint", "x")]
)
def test_settings_of_a_teacher_that_is_not_there_are_refused(setting):
    name, value = setting
    with pytest.raises(UserError, match=f"teacher.{name} is .*, but teacher.name is null"):
        parse(["--teacher.name", "null", f"--teacher.{name}", value])


def test_no_teacher():
    assert build_teachers(parse(["--teacher.name", "null"]), 10, None) is None


# --- the loss ---


def test_a_run_may_learn_from_the_teacher_alone(digits, files, tmp_path):
    """No label counts: with other labels the weights are the same to the bit, and the log still tells everything."""
    alone = [*first_teacher(files), "--distill.label_weight", 0, "--run.stop_after_steps", 3]
    lines = train_here(digits, tmp_path / "alone", *alone)
    assert all(math.isfinite(line["loss"]) and 0 <= line["teacher_top1"] <= 100 for line in lines)
    run = build(parse(arguments(digits, tmp_path / "other", *alone)), ONE)
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 3, ONE, 32))) as batches:
        wrong = iter([batch.__class__(**{**vars(batch), "labels": (batch.labels + 3) % 10}) for batch in batches])
    for step in range(3):
        for group in run.state.optimizer.param_groups:
            group["lr"] = 1e-4
        assert run.step(wrong, step).loss.item() == pytest.approx(lines[step]["loss"], rel=1e-6)
    saved = torch.load(tmp_path / "alone" / "checkpoints" / "step-00000003.pt", weights_only=True)["student"]
    assert all(torch.equal(saved[name], value) for name, value in run.state.student.state_dict().items())


def test_a_label_term_of_weight_0_is_not_computed():
    """Labels that no class has would end the cross-entropy."""
    student, teacher, none = torch.randn(4, 10), torch.randn(4, 10), torch.full((4,), 99)
    loss = usi_loss(student, teacher, none, none, torch.ones(4), DistillConfig(label_weight=0.0))
    log_p, q = student.log_softmax(1), teacher.softmax(1)
    assert loss.item() == pytest.approx(5 * (q * (q.log() - log_p)).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--teacher.name", "null", "--distill.label_weight", "0"], "label_weight is 0 and teacher.name is null"),
        (["--distill.weight", "0", "--distill.label_weight", "0"], "distill.weight and distill.label_weight are both"),
    ],
)
def test_a_loss_without_terms_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        parse(setting)


# --- image size ---


@pytest.mark.parametrize(("side", "size"), [(32, 48), (48, 32), (224, 160), (96, 97)])
def test_resized_pixels_are_pils_within_one_level(side, size):
    """Pillow's bicubic, which models are trained on; noise and edges make its filter overshoot."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    pixels[1, : side // 2] = 255 * (pixels[1, : side // 2] > 127)
    ours = resize_pixels(torch.from_numpy(pixels), size).numpy()
    pils = np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC)) for image in pixels])
    assert ours.shape == pils.shape and np.array_equal(ours, ours.round())
    assert ours.min() >= 0 and ours.max() <= 255
    difference = np.abs(ours - pils)
    assert difference.max() <= 1 and (difference == 0).mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "size"), [(32, 48), (224, 160)])
def test_the_gpu_resizes_as_the_cpu_within_one_level(side, size):
    pixels = torch.randint(256, (4, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    difference = (resize_pixels(pixels.cuda(), size).cpu() - resize_pixels(pixels, size)).abs()
    assert difference.max() <= 1 and (difference == 0).float().mean() > 0.99


def test_pixels_of_the_right_size_are_left_alone():
    pixels = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    assert resize_pixels(pixels, 8) is pixels


def noting_sizes(model, seen: list[int]) -> None:
    model.register_forward_pre_hook(lambda _, images: seen.append(images[0].shape[-1]))


def test_a_teacher_of_fixed_size_keeps_its_own_while_the_students_images_grow(digits, files, tmp_path):
    name = "vit_tiny_patch16_224"
    teacher = [*first_teacher(files, name), "--teacher.kwargs.depth", 1, "--teacher.image_size", 48]
    sizes = ["--data.image_size", "[[0,24],[1,32]]", "--run.micro_batch", 64]
    run = build(parse(arguments(digits, tmp_path / "run", *teacher, *sizes)), ONE)
    seen = {"student": [], "teacher": []}
    noting_sizes(run.state.student, seen["student"])
    noting_sizes(run.step.teacher.members[0].model, seen["teacher"])
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 4, 6, ONE, 64))) as batches:
        for step in (4, 5):
            run.step(batches, step)
    assert seen == {"student": [24, 32], "teacher": [48, 48]}


@pytest.mark.parametrize("key", ["teacher", "teacher.others[0]"])
def test_a_teacher_that_cannot_take_its_images_is_refused_by_name_of_its_setting(digits, files, tmp_path, key):
    name = "vit_tiny_patch16_224"
    one = [*first_teacher(files, name), "--teacher.kwargs.depth", 1]
    many = [*first_teacher(files), "--teacher.others", other(files, name, kwargs=VIT)]
    sizes = ["--data.image_size", "[[0,32],[1,48]]"]
    with pytest.raises(UserError) as error:
        train_here(digits, tmp_path / "run", *(one if key == "teacher" else many), *sizes)
    assert "model 'vit_tiny_patch16_224' cannot take images of 32 px" in str(error.value)
    assert f"Give it a size of its own with {key}.image_size" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_tried_at_its_own_size_and_not_at_the_students(files):
    vit = TeacherConfig("vit_tiny_patch16_224", files["vit_tiny_patch16_224"], VIT, image_size=48)
    config = parse([*TINY, "--data.image_size", "[[0,16],[1,32]]"])
    object.__setattr__(config, "teacher", vit)
    teachers = build_teachers(config, 10, None)
    inputs = teachers.members[0].inputs(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    assert teachers([inputs]).shape == (2, 10)
    object.__setattr__(config, "teacher", TeacherConfig("test_resnet", files["test_resnet"], image_size=0))
    assert build_teachers(config, 10, None).members[0].image_size == 0


# --- classes ---


def write_lines(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def reordered(files, path: Path, places: list[int], **more) -> Path:
    """test_resnet's weights with its outputs in another order: output i is what was places[i], random for -1."""
    weights = torch.load(files["test_resnet"], weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        extra = torch.randn(1, *weights[name].shape[1:])
        weights[name] = torch.cat([weights[name], extra])[places]
    torch.save({"student": weights, **more}, path)
    return path


@pytest.mark.parametrize("extra", [0, 3])
def test_the_order_of_classes_puts_every_output_where_the_dataset_has_it(extra):
    generator = np.random.default_rng(extra)
    names = [f"n{i:08d}" for i in range(100)]
    listed = list(generator.permutation(names + [f"x{i}" for i in range(extra)]))
    order = class_order(names, listed, Path("c.txt"), "teacher")
    assert [listed[place] for place in order] == names


def test_a_class_that_is_missing_or_doubled_is_named():
    with pytest.raises(UserError) as error:
        class_order(["cat", "dog", "emu"], ["emu", "cat", "fox", "gnu"], Path("c.txt"), "teacher.others[1]")
    assert "c.txt: class 'dog' of the dataset is not among the teacher's 4" in str(error.value)
    assert "in a file for teacher.others[1].classes" in str(error.value)
    with pytest.raises(UserError, match=r"c.txt: class 'cat' is named 2 times, for the outputs 0 and 2 \(the first is"):
        class_order(["dog", "cat"], ["cat", "dog", "cat"], Path("c.txt"), "teacher")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "c.txt: cannot be read .No such file"),
        (b"", "c.txt: is empty"),
        (b"cat\n\ndog\n", "c.txt: line 2 is empty. Every output"),
        (b"\xff\xfe", "c.txt: not a text file"),
    ],
)
def test_files_that_name_no_classes(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "c.txt")


def test_names_are_read_whatever_ends_their_lines(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"cat\r\n dog \nemu\n\n")
    assert read_classes(tmp_path / "c.txt") == ["cat", "dog", "emu"]


def test_the_names_of_the_datasets_classes_are_the_manifests(digits):
    assert dataset_classes(parse(["--data.root", str(digits)]).data) == read_manifest(digits)["classes"]
    assert dataset_classes(parse(["--data.pipeline", "synthetic"]).data) is None


SHUFFLED = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
WITH_MORE = [-1, *SHUFFLED, -1]


@pytest.mark.parametrize("places", [SHUFFLED, WITH_MORE], ids=["shuffled", "with more classes"])
@pytest.mark.parametrize("told_by", ["file", "checkpoint"])
def test_outputs_in_another_order_are_found_by_name(digits, files, tmp_path, capsys, places, told_by):
    """The training is as with the teacher whose outputs lie in the dataset's order."""
    classes = [*read_manifest(digits)["classes"], "unknown"]
    listed = [classes[place] for place in places]
    if told_by == "file":
        teacher = ["--teacher.checkpoint", reordered(files, tmp_path / "t.pt", places)]
        teacher += ["--teacher.classes", write_lines(tmp_path / "c.txt", listed)]
    else:
        teacher = ["--teacher.checkpoint", reordered(files, tmp_path / "t.pt", places, classes=listed)]
    teacher += ["--teacher.name", "test_resnet", "--run.stop_after_steps", 2]
    lines = train_here(digits, tmp_path / "run", *teacher)
    said = f"teacher 'test_resnet': 10 of its {len(places)} classes are found by name ("
    assert said in capsys.readouterr().out
    expected = train_here(digits, tmp_path / "plain", *first_teacher(files), "--run.stop_after_steps", 2)
    for name in ("loss", "teacher_top1", "agreement"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-5)
    assert "found by name" not in capsys.readouterr().out


def test_a_checkpoint_with_the_datasets_own_classes_needs_no_order(digits, files, tmp_path):
    classes = read_manifest(digits)["classes"]
    path = reordered(files, tmp_path / "t.pt", list(range(10)), classes=classes)
    teacher = build_teacher(TeacherConfig("test_resnet", path), 10, 32, names=classes)
    assert teacher.order is None and teacher.note == ""


def test_a_checkpoint_of_other_classes_is_refused(digits, files, tmp_path):
    path = reordered(files, tmp_path / "t.pt", list(range(10)), classes=[*"012345678", "ten"])
    more = ["--teacher.name", "test_resnet", "--teacher.checkpoint", path]
    with pytest.raises(UserError, match="t.pt: class '9' of the dataset is not among the teacher's 10"):
        train_here(digits, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()
    # what the user says goes before what the file says
    names = write_lines(tmp_path / "c.txt", read_manifest(digits)["classes"])
    train_here(digits, tmp_path / "run", *more, "--teacher.classes", names, "--run.stop_after_steps", 1)


def test_weights_of_another_number_of_classes_than_the_file_names_are_refused(files, tmp_path):
    names = [str(i) for i in range(10)]
    listed = write_lines(tmp_path / "c.txt", [*names, "more"])
    with pytest.raises(UserError, match="test_resnet.pth: its weights have 10 classes, .*c.txt names 11. Name every"):
        build_teacher(TeacherConfig("test_resnet", files["test_resnet"], classes=listed), 10, 32, names=names)
    with pytest.raises(UserError, match="timm's weights have 1000 classes, .*c.txt names 11"):
        build_teacher(TeacherConfig("tresnet_v2_l", classes=listed), 10, 32, names=names)
    with pytest.raises(UserError, match=r"has 5. Give weights .* or name all their classes with teacher.classes FILE"):
        build_teacher(TeacherConfig("test_resnet", files["test_resnet"]), 5, 32, names=names[:5])


def test_a_dataset_without_names_needs_the_number_alone(files, tmp_path):
    path = reordered(files, tmp_path / "t.pt", list(range(10)), classes=list("abcdefghij"))
    assert build_teacher(TeacherConfig("test_resnet", path), 10, 32, names=None).order is None
    with pytest.raises(UserError, match="its weights have 10 classes, the dataset has 7"):
        build_teacher(TeacherConfig("test_resnet", path), 7, 32, names=None)


# --- agreement ---


def test_agreement_counts_the_label_with_the_larger_share_and_the_best_classes():
    best = torch.eye(4)
    teacher = best[[0, 1, 2, 3, 0, 1]]
    student = best[[0, 1, 0, 0, 0, 0]]
    labels = torch.tensor([0, 0, 2, 1, 0, 3])
    partner_labels = torch.tensor([3, 1, 1, 3, 1, 1])
    lam = torch.tensor([0.9, 0.3, 0.5, 0.6, 0.4, 0.0])
    # shown: 0, 1, 2, 1, 1, 1
    found, pairs = agreement(student, teacher, labels, partner_labels, lam)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([4 / 6, 3 / 6])
    assert pairs.dtype == torch.int32 and pairs.tolist() == [[0, 1, 2, 1, 1, 1], [0, 1, 2, 3, 0, 1]]


def test_the_log_tells_how_often_teacher_and_labels_and_student_agree(digits, files, tmp_path):
    """In percent, counted plainly over the batches of each step; whatever the micro-batches and log_every."""
    setting = [*first_teacher(files), "--student.name", "test_vit", "--run.stop_after_steps", 4]
    lines = train_here(digits, tmp_path / "16", *setting)
    run = build(parse(arguments(digits, tmp_path / "none", *setting, "--run.micro_batch", 64)), ONE)
    counted = []
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 4, ONE, 64))) as batches:
        for batch in batches:
            labels, partner = batch.labels.tolist(), partners(batch.labels, batch.mix_group).tolist()
            shown = [a if lam >= 0.5 else b for a, b, lam in zip(labels, partner, batch.lam.tolist(), strict=True)]
            best = run.step.teacher(run.step.inputs(batch)[1]).argmax(1).tolist()
            counted.append(100 * np.mean(np.array(shown) == np.array(best)))
    assert [line["teacher_top1"] for line in lines] == pytest.approx(counted)
    (line,) = train_here(digits, tmp_path / "64", *setting, "--run.micro_batch", 64, "--run.log_every", 4)
    assert line["teacher_top1"] == pytest.approx(np.mean(counted))
    assert line["agreement"] == pytest.approx(np.mean([line["agreement"] for line in lines]), abs=0.5)


def test_a_student_that_is_its_teacher_agrees_with_it(digits, tmp_path):
    """Without dropout and batch normalisation, and with a learning rate of 0."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "same.pth")
    same = ["--student.name", "test_vit", "--teacher.name", "test_vit"]
    same += ["--student.checkpoint", tmp_path / "same.pth", "--teacher.checkpoint", tmp_path / "same.pth"]
    rate = ["--optim.lr", 0, "--schedule.warmup_lr", 0, "--schedule.min_lr", 0, "--run.stop_after_steps", 2]
    lines = train_here(digits, tmp_path / "run", *same, *rate, "--distill.label_weight", 0)
    assert [line["agreement"] for line in lines] == [100.0, 100.0]
    assert [line["loss"] for line in lines] == pytest.approx([0, 0], abs=1e-6)


def test_two_ranks_log_the_agreement_of_all_images_and_warn_once(digits, files, tmp_path, capsys):
    setting = [*first_teacher(files), "--student.name", "test_vit", "--run.stop_after_steps", 4]
    setting += ["--augment.mix_group", 16]  # two micro-batches on each rank
    one = train_here(digits, tmp_path / "1", *setting)
    warned = re.findall("the teacher finds the label of .*", capsys.readouterr().out)
    said = run_ranks(2, "--data.root", digits, "--run.out", tmp_path / "2", "--run.log_every", 1, *setting)
    assert len(warned) == 1 and re.findall("the teacher finds the label of .*", said) == warned
    two = [line for line in read_json_lines(tmp_path / "2" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["teacher_top1"] for line in one] == pytest.approx([line["teacher_top1"] for line in two])
    assert one[0]["agreement"] == pytest.approx(two[0]["agreement"])


def test_without_a_teacher_nothing_is_told_of_it(digits, tmp_path, capsys):
    lines = train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    assert not {"teacher_top1", "agreement"} & set(lines[0])
    assert "the teacher" not in capsys.readouterr().out


# --- a teacher that does not know the classes, or has them in another order ---


@pytest.mark.parametrize(
    ("hits", "images", "classes", "warns"),
    [
        (0, 10_000, 1000, True),
        (19, 10_000, 1000, True),
        (20, 10_000, 1000, False),
        (6_000, 10_000, 1000, False),
        (19, 100, 10, True),
        (20, 100, 10, False),
        (499, 1000, 3, True),
        (500, 1000, 3, False),
        (120, 200, 2, True),  # chance is a half, twice that would be all
        (130, 200, 2, False),
        (100, 100, 1, False),
    ],
)
def test_the_bar_for_a_teacher(hits, images, classes, warns):
    assert bool(chance_warning(hits, images, classes)) == warns


def test_a_teacher_no_better_than_chance_is_warned_of_in_other_words_than_one_in_another_order():
    labels = np.arange(1000).repeat(10)
    random = np.random.default_rng(0).permutation(labels)
    said = teacher_warning([np.stack([labels, random])], 1000, None)
    assert "finds the label of 0." in said and "order" not in said
    assert "chance is 0.10%: it hardly knows these classes. Check teacher.checkpoint, teacher.kwargs" in said
    rolled = teacher_warning([np.stack([labels, (labels + 1) % 1000])], 1000, None)
    assert rolled.startswith(
        "the teacher consistently takes 1000 of 1000 classes for one other each ('0' for '1', '1' for"
    )
    assert "hardly" not in rolled and not teacher_warning([np.stack([labels, labels])], 1000, None)


def test_the_images_of_all_ranks_decide_about_the_warning():
    """Classes 3 and 4 are taken for each other, and each rank has images of one of them."""
    labels = np.arange(10, dtype=np.int32).repeat(16)
    swapped = np.where(labels == 3, 4, np.where(labels == 4, 3, labels)).astype(np.int32)
    ranks = [np.stack([labels, swapped])[:, labels != missing] for missing in (4, 3)]
    assert [teacher_warning([each], 10, None) for each in ranks] == ["", ""]
    assert "takes 2 of 10 classes for one other each ('3' for '4', '4' for '3')" in teacher_warning(ranks, 10, None)


@pytest.mark.parametrize("named", [[], [0], [1], [0, 1, 2]])
def test_the_warning_names_the_classes_settings_of_the_teachers_whose_outputs_have_no_names(digits, files, named):
    names = read_manifest(digits)["classes"]
    listed = [{"name": "test_resnet", "checkpoint": str(files["test_resnet"])} for _ in range(3)]
    for i in named:
        listed[i]["classes"] = str(files["test_resnet"].with_name("names.txt"))
    files["test_resnet"].with_name("names.txt").write_text("\n".join(names))
    first = [text for key, value in listed[0].items() for text in (f"--teacher.{key}", value)]
    teachers = build_teachers(parse([*TINY, *first, "--teacher.others", json.dumps(listed[1:])]), 10, names)
    keys = ["--teacher.classes", "teacher.others[0].classes", "teacher.others[1].classes"]
    assert teachers.unnamed == [key for i, key in enumerate(keys) if i not in named]
    labels = np.arange(10).repeat(20)
    said = teacher_warning([np.stack([labels, (labels + 1) % 10])], 10, names, teachers.unnamed)
    assert f"Name them with {' or '.join(teachers.unnamed) or keys[0]} FILE" in said


GENTLE = ["--augment.randaugment_ops", 0, "--augment.flip", 0, "--augment.repeats", 1, "--augment.crop_area", "[0.7,1]"]


@pytest.fixture(scope="module")
def good_teacher(digits, tmp_path_factory) -> Path:
    """A checkpoint that knows most digits: a short training on hardly augmented images."""
    out = tmp_path_factory.mktemp("good") / "run"
    plain = ["--augment.mix_prob", 0, "--optim.lr", "1e-2", "--schedule.epochs", 6, "--ema.decay", 0]
    plain += ["--student.name", "test_resnet", "--augment.mix_group", 16]  # learns faster than tiny_cnn
    summary = train(build(parse(arguments(digits, out, *GENTLE, *plain)), ONE))
    assert summary["evaluation"]["raw"]["top1"] > 70
    return out / "checkpoints" / "step-00000030.pt"


def test_a_teacher_whose_classes_are_in_another_order_is_noticed_once(digits, good_teacher, tmp_path, capsys):
    """Without their names nothing else would tell; with them the teacher is as good as it is."""
    content = torch.load(good_teacher, weights_only=True)
    weights = {**content["student"]}
    for name in ("fc.weight", "fc.bias"):
        weights[name] = weights[name].roll(1, 0)
    torch.save(weights, tmp_path / "rolled.pth")
    steps = [*GENTLE, "--teacher.name", "test_resnet", "--run.stop_after_steps", 6]
    good = train_here(digits, tmp_path / "good", *steps, "--teacher.checkpoint", good_teacher)
    assert "the teacher" not in capsys.readouterr().out
    rolled = train_here(digits, tmp_path / "rolled", *steps, "--teacher.checkpoint", tmp_path / "rolled.pth")
    assert (said := capsys.readouterr().out).count("of 10 classes for one other each") == 1
    assert "the teacher finds" not in said
    classes = read_manifest(digits)["classes"]
    listed = write_lines(tmp_path / "c.txt", [classes[-1], *classes[:-1]])
    mended = ["--teacher.checkpoint", tmp_path / "rolled.pth", "--teacher.classes", listed]
    told = train_here(digits, tmp_path / "told", *steps, *mended)
    assert "the teacher consistently" not in capsys.readouterr().out
    top1 = [np.mean([line["teacher_top1"] for line in lines]) for lines in (good, rolled, told)]
    assert top1[0] == pytest.approx(top1[2]) and top1[0] > 30 and top1[1] < 20
    assert [line["loss"] for line in told] == pytest.approx([line["loss"] for line in good], rel=1e-4)


def test_the_configuration_of_the_recipe_has_one_teacher():
    assert [key for key, _ in Config().teacher.members] == ["teacher"]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnet18", "levit_128s"])
def test_a_teacher_in_bfloat16_gives_the_probabilities_of_one_in_float32(name, tmp_path):
    torch.manual_seed(0)
    size = 224 if name == "levit_128s" else 160
    torch.save(timm.create_model(name, num_classes=10).state_dict(), tmp_path / "weights.pth")
    teacher = ["--teacher.name", name, "--teacher.checkpoint", str(tmp_path / "weights.pth")]
    config = parse([*teacher, "--student.name", "test_resnet", "--data.image_size", str(size)])
    pixels = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8)
    found = []
    for precision in (torch.float32, torch.bfloat16):
        teachers = build_teachers(config, 10, None).to_precision(precision)
        with torch.no_grad():
            logits = teachers([member.inputs(pixels) for member in teachers.members])
        assert logits.dtype == precision
        found.append(logits.float().softmax(1))
    assert torch.allclose(*found, atol=0.02)
