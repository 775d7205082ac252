"""What the student learns from: several teachers, their image sizes, their orders of classes, and how they do."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

from conftest import TINY
from pipelines.common.errors import UserError
from support.teachers import ONE, VIT, arguments, first_teacher, other, train_here
from trainer.builder import build
from trainer.config.sections import Config, DistillConfig, OtherTeacher, TeacherConfig, parse, to_yaml
from trainer.feed import rank_plans
from trainer.models.preprocessing import preprocessing
from trainer.models.teacher import (
    build_teachers,
    mean_logits,
    resize_pixels,
)
from trainer.update.loss import usi_loss
from trainer.update.mixing import mix_pixels, partners

pytest_plugins = ["support.teachers"]


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
    models = {"student": run.state.student, **{str(i): each.model for i, each in enumerate(run.step.teachers.members)}}
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
    assert not any(parameter.requires_grad for parameter in run.step.teachers.parameters())


def test_what_the_teachers_saw_is_gone_before_the_student_sees_its_images(digits, files, tmp_path):
    """So it takes no memory beside what the student keeps for its backward pass. One teacher has a size of its own."""
    more = ["--teacher.others", other(files, "resnet18", image_size=40), "--run.micro_batch", 64]
    run = build(parse(arguments(digits, tmp_path, *first_teacher(files), *more)), ONE)
    storages, gone = [], []
    for teacher in run.step.teachers.members:
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
    own = torch.nn.functional.cross_entropy(student, batch.labels, reduction="none")
    partner = torch.nn.functional.cross_entropy(student, partners(batch.labels, batch.mix_group), reduction="none")
    lam = batch.lam.double()
    divergence = (probabilities * (probabilities.log() - (student / 2).log_softmax(1))).sum(1).mean()
    expected = (lam * own + (1 - lam) * partner).mean() + 5 * 4 * divergence
    lines = train_here(digits, tmp_path / "run", *setting, "--run.stop_after_steps", 1)
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"] == "test_resnet + resnet18"
    assert "teacher.others" in [item["key"] for item in summary["deviations"]]


def test_a_run_with_several_teachers_resumes_bit_equal_and_reports_that_they_changed(digits, files, tmp_path, capsys):
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
        ('[{"nmae": "a"}]', "teacher.others: Option 'nmae' is not accepted"),
        ('[{"name": "a", "x": 1}]', "teacher.others: Option 'x' is not accepted"),
        ('[{"image_size": 3}]', "teacher.others[0].name is null: name the model, or leave the teacher out"),
        ('[{"name": "a", "image_size": "big"}]', "teacher.others: image_size: Expected a int. Got value: big"),
        ("resnet50", "teacher.others: Expected a list. Got value: resnet50"),
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
    """No label counts: with other labels the weights are the same to the bit, and the log still has everything."""
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
    noting_sizes(run.step.teachers.members[0].model, seen["teacher"])
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
    assert f"Change {key}.image_size, {key}.kwargs or {key}.name" in str(error.value)
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
