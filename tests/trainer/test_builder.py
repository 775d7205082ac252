"""What a run is built of, and what is refused before anything is written."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from conftest import DROPOUT, TINY, train_here
from pipelines.common.errors import UserError
from pipelines.plan.plan import EvalPlan
from pipelines.shards.index import read_index
from support.tiny_runs import ONE, all_equal, build_here, first_batches
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.evaluation.predict import EvalPass, eval_plans
from trainer.feed import open_configured_pipeline, rank_plans
from trainer.loop import train
from trainer.models.normalize import Normalize
from trainer.run import main


def test_each_model_sees_the_pixels_under_its_own_normalisation(digits, tmp_path, teacher):
    """resnet18's mean and std are ImageNet's, test_resnet's are 0.5."""
    seen = {}
    arguments = [*TINY, "--data.root", str(digits), "--run.out", str(tmp_path), "--student.name", "resnet18", *teacher]
    run = build(parse(arguments), ONE)
    for name, model in (("student", run.state.student), ("teacher", run.step.teachers.members[0].model)):
        model.register_forward_pre_hook(lambda _, images, name=name: seen.update({name: images[0].detach().clone()}))
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 1, ONE, 32))) as batches:
        run.step(batches, 0)

    def raw(images, mean, std):
        return images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)

    student = raw(seen["student"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(student, raw(seen["teacher"], (0.5,) * 3, (0.5,) * 3), atol=1e-6)
    assert not run.step.teachers.members[0].model.training and run.state.student.training


def test_seeds_of_a_student_have_other_weights_and_dropout_and_the_same_batches(digits, tmp_path):
    plain, own, other = (
        build_here(digits, tmp_path / "run", *DROPOUT, *more)
        for more in ([], ["--student.seed", 0], ["--student.seed", 1])
    )
    weights = [list(run.state.student.state_dict().values()) for run in (plain, own, other)]
    assert all_equal(weights[0], weights[1]) and not all_equal(weights[0], weights[2])
    assert plain.plan.describe() == other.plan.describe()
    batch = first_batches(plain, 1)[0]
    assert torch.equal(batch.images, first_batches(other, 1)[0].images)
    other.state.student.load_state_dict(plain.state.student.state_dict())
    losses = [run.step(iter(first_batches(run, 1)), 0).loss.item() for run in (plain, own, other)]
    assert losses[0] == losses[1] != losses[2]


def test_a_seed_that_is_the_runs_own_resumes_a_run_without_one(digits, tmp_path):
    train_here(digits, tmp_path, "--run.seed", 3, "--run.stop_after_steps", 1)
    summary = train_here(digits, tmp_path, "--run.seed", 3, "--student.seed", 3, "--run.stop_after_steps", 2)
    assert summary["session"]["start_step"] == 1


def test_students_of_different_means_see_the_same_pixels_with_one_fill_colour_and_different_ones_without(
    digits, tmp_path
):
    """The mean colour of test_byobnet is ImageNet's, that of tiny_cnn is 128, 128, 128."""

    def images(student: str, *arguments: str) -> torch.Tensor:
        always = ["--augment.erase_prob", "1", "--student.name", student, "--run.out", str(tmp_path), *arguments]
        run = build(parse([*TINY, "--data.root", str(digits), *always]), ONE)
        with contextlib.closing(run.pipelines.of["train"].batches(run.plan.batches(0, 1))) as batches:
            return next(batches).images

    one, other = images("test_byobnet"), images("tiny_cnn")
    changed = (one != other).any(dim=-1).flatten(1).any(dim=1)
    assert changed.all()  # Each image has an erased box.
    fill = ["--augment.fill", "[124,116,104]"]
    assert torch.equal(images("test_byobnet", *fill), one) and torch.equal(images("tiny_cnn", *fill), one)


def test_the_ema_is_evaluated_beside_the_raw_weights(digits, tmp_path):
    summary = train_here(digits, tmp_path, "--run.stop_after_steps", 5, "--optim.lr", "1e-2")
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]), ONE)
    images = run.evaluate.images
    for name, model in (("raw", run.state.student), ("ema", run.state.ema.module)):
        alone = dataclasses.replace(images, batch=128).accuracy({"it": model})
        assert alone["it"] == pytest.approx(summary["evaluation"][name], rel=1e-5), name
    assert summary["evaluation"]["raw"]["loss"] != summary["evaluation"]["ema"]["loss"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_divide_the_validation_set_each_image_once(digits, ranks):
    plan = EvalPlan(read_index(digits, "val"), 32, 0.95, "bicubic")
    slices = [list(eval_plans(plan, 10, World(rank, ranks, ranks, ONE.device))) for rank in range(ranks)]
    assert len({len(part) for part in slices}) == 1
    shown = np.concatenate([rows.sample[rows.valid] for part in slices for rows in part])
    assert np.array_equal(np.sort(shown), np.arange(96))


def test_evaluation_is_the_plain_computation_whatever_the_batch(digits):
    index = read_index(digits, "val")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    plan = EvalPlan(index, 32, 0.95, "bicubic")
    normalize = Normalize((0.5,) * 3, (0.5,) * 3)
    pipeline = open_configured_pipeline(parse(TINY).data, index, world=ONE, decode="roi", on_bad=pytest.fail)
    results = [
        EvalPass(normalize, pipeline, plan, batch, torch.float32, ONE).accuracy({"raw": model})["raw"]
        for batch in (96, 7, 100)
    ]
    assert model.training
    (batch,) = pipeline.batches([plan.rows(0, 96)])
    with torch.no_grad():
        logits = model.eval()(normalize(batch.images))
    top5 = logits.topk(5).indices == batch.labels[:, None]
    expected = {
        "top1": 100 * top5[:, 0].double().mean().item(),
        "top5": 100 * top5.any(1).double().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, batch.labels).item(),
        "images": 96,
    }
    for result in results:
        assert result == pytest.approx(expected, rel=1e-5)


def test_mistakes_leave_nothing_written(digits, tmp_path, capsys):
    def mistake(out: Path, *arguments) -> str:
        with pytest.raises(SystemExit) as done:
            main([*TINY, "--run.out", str(out), *map(str, arguments)])
        assert done.value.code == 1
        assert not out.exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    out = tmp_path / "run"
    empty = tmp_path / "empty"
    empty.mkdir()
    truncated = shutil.copytree(digits, tmp_path / "truncated")
    index = truncated / "train" / "index.npy"
    index.write_bytes(index.read_bytes()[:-100])
    assert "none/manifest.json: not found" in mistake(out, "--data.root", tmp_path / "none")
    assert "empty/manifest.json: not found" in mistake(out, "--data.root", empty)
    assert "index.npy: truncated, damaged or stale" in mistake(out, "--data.root", truncated)
    data = ("--data.root", digits)
    assert "unknown model 'resnet5O'; did you mean" in mistake(out, *data, "--student.name", "resnet5O")
    assert "has 320 images, fewer than one global batch of 1024" in mistake(out, *data, "--run.global_batch", 1024)
    assert "run.global_batch is 50; it must be a multiple of" in mistake(out, *data, "--run.global_batch", 50)
    assert "data.pipeline: Expected one of ['auto', 'dali'" in mistake(out, *data, "--data.pipeline", "ffcv")
    assert "unknown key 'run.global_bach'" in mistake(out, *data, "--run.global_bach", 50)


def test_a_model_that_cannot_take_the_images_is_refused_at_once(digits, tmp_path):
    fixed = ["--student.name", "vit_tiny_patch16_224", "--student.kwargs.depth", 1, "--data.eval_image_size", 48]
    with pytest.raises(UserError, match="model 'vit_tiny_patch16_224' cannot take images of 48 px"):
        train_here(digits, tmp_path / "run", *fixed)
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_size_is_refused_where_sizes_change_unless_it_takes_any(digits, tmp_path):
    vit = {"model_name": "vit_tiny_patch16_224", "depth": 1}
    sizes = ["--data.image_size", "[[0,16],[1,32]]", "--run.stop_after_steps", 6]
    student = [*sizes, "--student.name", vit["model_name"], "--student.kwargs.depth", 1]
    fixed = "'vit_tiny_patch16_224' cannot take images of 16 px .* take any size with dynamic_img_size"
    with pytest.raises(UserError, match=fixed):
        train_here(digits, tmp_path / "run", *student)
    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model(**vit, num_classes=10, img_size=32).state_dict(), weights)
    teacher = ["--teacher.name", vit["model_name"], "--teacher.kwargs.depth", 1, "--teacher.checkpoint", weights]
    fixed = "'vit_tiny_patch16_224' cannot take images of 16 px .* Change teacher.image_size"
    with pytest.raises(UserError, match=fixed):
        train_here(digits, tmp_path / "run", *sizes, *teacher)
    assert not (tmp_path / "run").exists()
    train_here(digits, tmp_path / "run", *student, "--student.kwargs.dynamic_img_size", "true")


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder that can be written. Change --run.out"):
        train(build(parse([*TINY, "--run.out", str(tmp_path / "file" / "run")]), ONE))


def test_a_dataset_is_no_run_folder(digits):
    """A run would write its files beside the shards, and `verify` would call them faults."""
    before = sorted(path.name for path in digits.iterdir())
    with pytest.raises(UserError, match="is a dataset, for it has a manifest.json. Give the run a folder of its own"):
        train_here(digits, digits)
    assert sorted(path.name for path in digits.iterdir()) == before
