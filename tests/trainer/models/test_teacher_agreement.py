"""How often teacher, labels and student agree, and the warnings about a teacher that does not know the classes."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from pipelines.common.files import read_json_lines
from pipelines.shards.manifest import read_manifest
from support.ranks import run_ranks
from support.teachers import ONE, arguments, first_teacher, train_here
from trainer.builder import build
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.loop import train
from trainer.models.teacher import (
    agreement,
    teacher_warning,
)
from trainer.update.mixing import partners

pytest_plugins = ["support.teachers"]


def write_lines(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def test_agreement_counts_the_label_with_the_larger_weight_and_the_best_classes():
    best = torch.eye(4)
    teacher = best[[0, 1, 2, 3, 0, 1]]
    student = best[[0, 1, 0, 0, 0, 0]]
    labels = torch.tensor([0, 0, 2, 1, 0, 3])
    partner_labels = torch.tensor([3, 1, 1, 3, 1, 1])
    lam = torch.tensor([0.9, 0.3, 0.5, 0.6, 0.4, 0.0])
    # shown: 0, 1, 2, 1, 1, 1
    found = agreement(student, teacher, labels, partner_labels, lam)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([4 / 6, 3 / 6])


def test_the_log_has_how_often_teacher_and_labels_and_student_agree(digits, files, tmp_path):
    """In percent, counted plainly over the batches of each step; whatever the micro-batches and log_every."""
    setting = [*first_teacher(files), "--student.name", "test_vit", "--run.stop_after_steps", 4]
    lines = train_here(digits, tmp_path / "16", *setting)
    run = build(parse(arguments(digits, tmp_path / "none", *setting, "--run.micro_batch", 64)), ONE)
    counted = []
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 4, ONE, 64))) as batches:
        for batch in batches:
            labels, partner = batch.labels.tolist(), partners(batch.labels, batch.mix_group).tolist()
            shown = [a if lam >= 0.5 else b for a, b, lam in zip(labels, partner, batch.lam.tolist(), strict=True)]
            best = run.step.teachers(run.step.inputs(batch)[1]).argmax(1).tolist()
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


def test_a_warning_is_about_the_first_updates_with_enough_images_whatever_log_every_is(digits, files, tmp_path, capsys):
    """Four updates of 64 images, because 200 are enough for ten classes."""
    setting = [*first_teacher(files), "--student.name", "test_vit", "--run.stop_after_steps", 6]
    warned = []
    for every in (1, 5, 6):
        lines = train_here(digits, tmp_path / str(every), *setting, "--run.log_every", every)
        warned += re.findall("the teacher finds the label of ([^%]*)% of", capsys.readouterr().out)
        if every == 1:
            expected = np.mean([line["teacher_top1"] for line in lines[:4]])
    assert warned == [f"{expected:.2f}"] * 3


def test_without_a_teacher_the_log_has_nothing_about_it(digits, tmp_path, capsys):
    lines = train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    assert not {"teacher_top1", "agreement"} & set(lines[0])
    assert "the teacher" not in capsys.readouterr().out


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
    warning = teacher_warning(hits / images, classes)
    assert bool(warning) == warns and ("hardly knows these classes" in warning) == warns
    assert ("too little trained, or its outputs may be in another order. Check" in warning) == warns
    recorded = teacher_warning(hits / images, classes, is_recorded=True)
    assert ("record another store with the right ones (tools/record_teacher.py)" in recorded) == warns
    assert "record another" not in warning


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
    """Without their names nothing else would show it; with them the teacher is as good as before."""
    content = torch.load(good_teacher, weights_only=True)
    weights = {**content["student"]}
    for name in ("fc.weight", "fc.bias"):
        weights[name] = weights[name].roll(1, 0)
    torch.save(weights, tmp_path / "rolled.pth")
    steps = [*GENTLE, "--teacher.name", "test_resnet", "--run.stop_after_steps", 6]
    good = train_here(digits, tmp_path / "good", *steps, "--teacher.checkpoint", good_teacher)
    assert "the teacher" not in capsys.readouterr().out
    rolled = train_here(digits, tmp_path / "rolled", *steps, "--teacher.checkpoint", tmp_path / "rolled.pth")
    assert capsys.readouterr().out.count("the teacher finds the label of") == 1
    classes = read_manifest(digits)["classes"]
    listed = write_lines(tmp_path / "c.txt", [classes[-1], *classes[:-1]])
    corrected = ["--teacher.checkpoint", tmp_path / "rolled.pth", "--teacher.classes", listed]
    named = train_here(digits, tmp_path / "named", *steps, *corrected)
    assert "the teacher finds" not in capsys.readouterr().out
    top1 = [np.mean([line["teacher_top1"] for line in lines]) for lines in (good, rolled, named)]
    assert top1[0] == pytest.approx(top1[2]) and top1[0] > 30 and top1[1] < 20
    assert [line["loss"] for line in named] == pytest.approx([line["loss"] for line in good], rel=1e-4)
