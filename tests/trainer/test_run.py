"""The trainer as a user starts it: resume, ranks, evaluation, mistakes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from conftest import REPOSITORY, TINY, run_trainer, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import locked, read_json_lines
from pipelines.plan.plan import BEFORE, EvalPlan
from pipelines.shards.index import read_index
from support.forked_python import executable
from support.ranks import run_ranks
from tools.lib.shards.job import BuildOptions
from tools.lib.shards.job import build as build_dataset
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.evaluation.predict import EvalPass, eval_plans
from trainer.feed import choose_decode, open_configured_pipeline, rank_plans, resolve_micro_batch
from trainer.run import build, main, train
from trainer.state.checkpoint_settings import check_same_plan
from trainer.update.mixing import Normalize

ONE = World(0, 1, 1, torch.device("cpu"))


def newest(run: Path) -> dict:
    return torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def assert_equal_states(a, b, path="") -> None:
    """Bit-equal, tensor by tensor."""
    if torch.is_tensor(a):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_states(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory) -> list[str]:
    """Arguments for a teacher with weights of its own (not a good one)."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": timm.create_model("test_resnet", num_classes=10).state_dict()}, path)
    return ["--teacher.name", "test_resnet", "--teacher.checkpoint", str(path)]


@pytest.fixture(scope="module")
def undisturbed(digits, teacher, tmp_path_factory) -> Path:
    """A run of 20 steps (4 epochs of 5) that was never stopped, with dropout and a teacher."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_here(digits, out, *teacher, *DROPOUT, *EVERY_3)
    return out


DROPOUT = ["--student.kwargs.drop_rate", "0.2", "--student.kwargs.drop_path_rate", "0.1"]
EVERY_3 = ["--run.checkpoint_every", "3", "--run.log_every", "1"]


# --- exact resume ---


def test_a_run_stopped_at_step_7_and_resumed_is_bit_equal_to_one_that_was_not(digits, teacher, undisturbed, tmp_path):
    """It goes on in another process."""
    arguments = [*teacher, *DROPOUT, *EVERY_3]
    train_here(digits, tmp_path, *arguments, "--run.stop_after_steps", 7)
    assert newest(tmp_path)["step"] == 7
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
    done = run_trainer("--data.root", digits, "--run.out", tmp_path, *arguments)
    assert "resuming after step 7" in done.stdout
    a, b = newest(undisturbed), newest(tmp_path)
    assert a["step"] == b["step"] == 20
    for part in ("student", "ema", "optimizer"):
        assert_equal_states(a[part], b[part], part)
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is True


def test_a_finished_run_that_is_started_again_stays_as_it_is(digits, undisturbed, teacher, tmp_path, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    before = newest(run)
    train_here(digits, run, *teacher, *DROPOUT, *EVERY_3)
    assert "nothing to do: the run has done 20 of 20 steps" in capsys.readouterr().out
    assert_equal_states(before["student"], newest(run)["student"])
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, undisturbed)]
    assert summaries[0] == summaries[1]
    # without its summary, it was killed after its last checkpoint
    (run / "summary.json").unlink()
    train_here(digits, run, *teacher, *DROPOUT, *EVERY_3)
    assert json.loads((run / "summary.json").read_text())["evaluation"] == summaries[1]["evaluation"]


def test_a_run_whose_images_grow_resumes_bit_equal_before_at_and_after_the_change(digits, teacher, tmp_path):
    """5 steps an epoch: the eleventh is the first of 32 px."""
    growing = ["--data.image_size", "[[0,24],[2,32]]", *teacher, *DROPOUT, "--run.log_every", 1]
    for name, stops in (("whole", (12,)), ("stopped", (9, 10, 11, 12))):
        for steps in stops:
            train_here(digits, tmp_path / name, *growing, "--run.stop_after_steps", steps)
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "stopped")
    for part in ("student", "ema", "optimizer"):
        assert_equal_states(a[part], b[part], part)
    assert a["plan"]["image_size"] == [[0, 24], [2, 32]]


@pytest.mark.parametrize("pipeline", ["torchvision", "dali"])
def test_all_augmentations_together_train_and_resume_bit_equal(digits, tmp_path, pipeline):
    more = ["--augment.three_augment", "true", "--augment.color_jitter", 0.3, "--augment.erase_prob", 0.25]
    more += ["--distill.label_smoothing", 0.1, "--data.pipeline", pipeline]
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            train_here(digits, tmp_path / name, *more, "--run.stop_after_steps", steps)
    assert_equal_states(newest(tmp_path / "whole")["student"], newest(tmp_path / "stopped")["student"])
    with pytest.raises(UserError, match="augment.erase_prob was 0.25, now it is 0.0"):
        train_here(digits, tmp_path / "whole", *more[:4], *more[6:])


def test_each_epoch_trains_on_images_of_its_size_and_the_last_size_is_evaluated(digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Normalize, "forward", _noting(Normalize.forward, seen))
    sizes = ["--data.image_size", "[[0,24],[1,16],[2,32]]", "--run.eval_every", 2, "--run.micro_batch", 64]
    train_here(digits, tmp_path, *sizes, "--run.stop_after_steps", 12)
    evaluation = [32]  # 96 images, in one batch
    assert seen == [24] * 5 + [16] * 5 + evaluation + [32] * 2


def _noting(forward, sizes: list[int]):
    def noting(self, pixels):
        sizes.append(pixels.shape[1])
        return forward(self, pixels)

    return noting


def test_a_run_in_windows_of_shards_resumes_bit_equal(digits, tmp_path):
    window = ["--data.shuffle", "window", "--data.window_shards", 2]
    for name, stops in (("whole", (7,)), ("stopped", (4, 7))):
        for steps in stops:
            train_here(digits, tmp_path / name, *window, "--run.stop_after_steps", steps)
    assert_equal_states(newest(tmp_path / "whole")["student"], newest(tmp_path / "stopped")["student"])
    with pytest.raises(UserError, match=r"another plan: data.window_shards .* was 2, now it is 0"):
        train_here(digits, tmp_path / "whole")


def test_a_checkpoint_from_before_a_setting_existed_goes_on_with_its_default(digits, tmp_path):
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    for name in BEFORE:
        del content["plan"][name]
    del content["config"]["distill"]["label_smoothing"]
    for name in ("digest", "evaluated", "best", "micro_batch"):
        del content[name]
    torch.save(content, path)
    arguments = [*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]
    assert build(parse(arguments), ONE).notes == []
    smooth = build(parse([*arguments, "--distill.label_smoothing", "0.1"]), ONE)
    assert smooth.notes == ["changed since the checkpoint: distill.label_smoothing was 0.0, now it is 0.1"]
    with pytest.raises(UserError, match="belongs to another plan: data.window_shards .* was 0, now it is 16"):
        train_here(digits, tmp_path, "--data.shuffle", "window")
    assert train_here(digits, tmp_path, "--run.stop_after_steps", 3)["session"]["start_step"] == 2


def test_a_checkpoint_that_was_cut_off_while_it_was_written_is_never_used(digits, tmp_path):
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    (tmp_path / "checkpoints" / "step-00000099.partial").write_bytes(b"half")
    assert train_here(digits, tmp_path, "--run.stop_after_steps", 4)["session"]["start_step"] == 2


# --- ranks and micro-batches ---


def assert_close_states(a: dict, b: dict, tolerance: float) -> None:
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=tolerance, atol=tolerance), name


def test_two_ranks_end_within_float_noise_of_one_and_hold_the_same_statistics(digits, teacher, tmp_path):
    arguments = [*teacher, "--run.stop_after_steps", 6, "--optim.lr", "1e-3", "--augment.mix_group", 16]
    train_here(digits, tmp_path / "1", *arguments)
    run_ranks(2, "--data.root", digits, "--run.out", tmp_path / "2", *arguments)
    one, two = newest(tmp_path / "1"), newest(tmp_path / "2")
    for part in ("student", "ema"):
        assert_close_states(one[part], two[part], 1e-4)
    losses = [
        [line["loss"] for line in read_json_lines(tmp_path / ranks / "metrics.jsonl") if line["kind"] == "train"]
        for ranks in ("1", "2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    evaluations = [read_json_lines(tmp_path / ranks / "metrics.jsonl")[-2]["raw"] for ranks in ("1", "2")]
    assert evaluations[0]["images"] == evaluations[1]["images"] == 96
    assert evaluations[0]["loss"] == pytest.approx(evaluations[1]["loss"], rel=1e-3)


def test_micro_batches_change_only_what_batch_normalisation_sees(digits, tmp_path):
    """A model without batch normalisation: any split of the global batch gives the same weights."""
    arguments = ["--student.name", "test_vit", "--run.stop_after_steps", 3, "--optim.lr", "1e-3"]
    arguments += ["--augment.mix_group", 16]
    for micro in (16, 32, 64):
        train_here(digits, tmp_path / str(micro), *arguments, "--run.micro_batch", micro)
    for micro in (32, 64):
        a, b = newest(tmp_path / "16")["student"], newest(tmp_path / str(micro))["student"]
        assert_close_states(a, b, 1e-4)


@pytest.mark.parametrize(("ranks", "message"), [(3, "3 ranks cannot share its 2 groups of 32"), (8, "8 ranks cannot")])
def test_a_global_batch_the_ranks_cannot_share(ranks, message):
    with pytest.raises(UserError, match=message):
        resolve_micro_batch(parse(TINY), World(0, ranks, ranks, torch.device("cpu")))


@pytest.mark.parametrize("micro", [8, 48])
def test_a_micro_batch_that_does_not_fit(micro):
    with pytest.raises(UserError, match=f"run.micro_batch is {micro}"):
        resolve_micro_batch(parse([*TINY, "--run.micro_batch", str(micro)]), ONE)


# --- models and precision ---


def test_each_model_sees_the_pixels_under_its_own_normalisation(digits, tmp_path, teacher):
    """resnet18's mean and std are ImageNet's, test_resnet's are 0.5."""
    seen = {}
    arguments = [*TINY, "--data.root", str(digits), "--run.out", str(tmp_path), "--student.name", "resnet18", *teacher]
    run = build(parse(arguments), ONE)
    for name, model in (("student", run.state.student), ("teacher", run.step.teacher.members[0].model)):
        model.register_forward_pre_hook(lambda _, images, name=name: seen.update({name: images[0].detach().clone()}))
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 1, ONE, 32))) as batches:
        run.step(batches, 0)

    def raw(images, mean, std):
        return images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)

    student = raw(seen["student"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(student, raw(seen["teacher"], (0.5,) * 3, (0.5,) * 3), atol=1e-6)
    assert not run.step.teacher.members[0].model.training and run.state.student.training


def test_the_average_is_evaluated_beside_the_raw_weights(digits, tmp_path):
    summary = train_here(digits, tmp_path, "--run.stop_after_steps", 5, "--optim.lr", "1e-2")
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]), ONE)
    eval_pass = run.evaluate.func.__self__
    for name, model in (("raw", run.state.student), ("ema", run.state.ema.module)):
        alone = eval_pass.accuracy({"it": model})
        assert alone["it"] == pytest.approx(summary["evaluation"][name], rel=1e-5), name
    assert summary["evaluation"]["raw"]["loss"] != summary["evaluation"]["ema"]["loss"]


def test_a_run_fine_tunes_from_a_run_on_other_classes_says_so_and_resumes(digits, tmp_path, capsys):
    synthetic = ["--data.pipeline", "synthetic", "--data.synthetic_samples", "64", "--data.synthetic_classes", "5"]
    train(parse([*TINY, *synthetic, "--run.out", str(tmp_path / "before"), "--run.stop_after_steps", "1"]), ONE)
    (before,) = (tmp_path / "before" / "checkpoints").iterdir()
    start = ["--student.checkpoint", before, "--ema.decay", 0.5]
    capsys.readouterr()
    summary = train_here(digits, tmp_path / "tuned", *start, "--run.stop_after_steps", 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "step-00000001.pt: they are of 5 classes, the dataset has 10: the classifier (head.fc) starts from" in said
    assert "student.checkpoint" in {deviation["key"] for deviation in summary["deviations"]}
    assert summary["evaluation"] == {}
    train_here(digits, tmp_path / "tuned", *start, "--run.stop_after_steps", 5)
    assert "from scratch" not in capsys.readouterr().out
    assert newest(tmp_path / "tuned")["student"]["head.fc.weight"].shape[0] == 10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_resumes_bit_equal(digits, tmp_path, precision):
    arguments = ["--student.name", "test_vit", "--run.precision", precision]
    for steps in (2, 5):
        train_here(digits, tmp_path / "stopped", *arguments, "--run.stop_after_steps", steps)
    train_here(digits, tmp_path / "whole", *arguments, "--run.stop_after_steps", 5)
    a, b = newest(tmp_path / "stopped"), newest(tmp_path / "whole")
    for part in ("student", "ema", "optimizer", "scaler"):
        assert_equal_states(a[part], b[part], part)
    assert bool(a["scaler"]) == (precision == "fp16")
    if precision == "fp16":
        assert a["scaler"]["_growth_tracker"] > 0 or a["scaler"]["scale"] != 2.0**16
        # and goes on without a scaler
        train_here(digits, tmp_path / "stopped", "--student.name", "test_vit", "--run.stop_after_steps", 6)


# --- evaluation ---


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_the_validation_set_each_image_once(digits, ranks):
    plan = EvalPlan(read_index(digits, "val"), 32, 0.95, "bicubic")
    shares = [list(eval_plans(plan, 10, World(rank, ranks, ranks, ONE.device))) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    shown = np.concatenate([rows.sample[rows.valid] for share in shares for rows in share])
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


def test_the_run_folder_tells_what_happened(digits, undisturbed):
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert config["student"]["name"] == "tiny_cnn" and config["augment"]["mix_group"] == 32
    lines = read_json_lines(undisturbed / "metrics.jsonl")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(5, 0), (10, 1), (15, 2), (20, 3)]
    for weights in ("raw", "ema"):
        assert evaluations[-1][weights]["images"] == 96
        assert 0 <= evaluations[-1][weights]["top1"] <= evaluations[-1][weights]["top5"] <= 100
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[:5] == [1e-4] * 5 and len(set(rates)) == 4
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["finished"] and summary["evaluation"] == {k: evaluations[-1][k] for k in ("raw", "ema")}
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == ["best.pt", "step-00000018.pt", "step-00000020.pt"]


GOLDEN_LOSSES = [3.0521, 2.7561, 2.6492, 2.5637, 2.5222]  # of every fourth step


def test_the_loss_curve_is_the_one_we_know(digits, teacher, tmp_path):
    """Golden: 20 steps on the CPU in float32. Another curve means that some number of the training has changed."""
    model = ["--student.name", "test_resnet", "--augment.mix_group", 16]  # loses more than tiny_cnn
    train_here(digits, tmp_path, *model, *teacher, *DROPOUT, *EVERY_3)
    losses = [line["loss"] for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[::4] == pytest.approx(GOLDEN_LOSSES, rel=1e-3)


def test_synthetic_data_need_no_dataset(tmp_path):
    summary = train(
        parse(
            [*TINY, "--run.out", str(tmp_path), "--data.pipeline", "synthetic", "--data.synthetic_samples", "128"]
            + ["--data.synthetic_classes", "5", "--run.stop_after_steps", "2"]
        ),
        ONE,
    )
    assert summary["step"] == 2 and summary["evaluation"] == {}


def test_dali_trains_too(digits, tmp_path):
    summary = train_here(digits, tmp_path, "--data.pipeline", "dali", "--run.stop_after_steps", 5)
    assert summary["evaluation"]["raw"]["images"] == 96


def test_all_ways_to_start_it(digits, tmp_path):
    arguments = [*TINY, "--student.name", "test_resnet", "--data.root", str(digits), "--run.stop_after_steps", "1"]
    script = os.path.relpath(REPOSITORY / "trainer" / "run.py", tmp_path)
    # the script from anywhere, without the package installed; the module from the repository
    for i, (start, folder) in enumerate((([script], tmp_path), (["-m", "trainer.run"], REPOSITORY))):
        command = [sys.executable, *start, *arguments, "--run.out", str(tmp_path / str(i))]
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": ""})
        assert newest(tmp_path / str(i))["step"] == 1


# --- mistakes ---


def test_a_mistake_is_told_in_one_line(tmp_path):
    done = run_trainer("--run.out", tmp_path / "run", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --data.root is missing") and done.stderr.count("\n") == 1, done.stderr


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
    assert "run.global_batch is 50; it must be a multiple of augment.mix_group, 32" in mistake(
        out, *data, "--run.global_batch", 50
    )
    assert "data.pipeline: 'ffcv' is not one of auto, dali" in mistake(out, *data, "--data.pipeline", "ffcv")
    assert "unknown key '--run.global_bach'" in mistake(out, *data, "--run.global_bach", 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--augment.flip", "0.25"], r"augment.flip was 0.5, now it is 0.25. Use the same settings"),
        (["--run.seed", "1"], "seed was 0, now it is 1"),
        (["--student.kwargs.drop_rate", "0.3"], r"student.kwargs was \{'drop_rate': 0.2.*now it is \{'drop_rate': 0.3"),
        (["--student.name", "test_vit"], "student.name was tiny_cnn, now it is test_vit"),
        (["--data.image_size", "64"], "image_size was 32, now it is 64"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused_and_left_alone(digits, undisturbed, tmp_path, arguments, message):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-00000020.pt: belongs to another plan: .*" + message):
        train_here(digits, run, *DROPOUT, *arguments)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("jobs_in_this_process")
def test_other_validation_images_are_told_once(digits, digits_folder, tmp_path, capsys):
    shutil.copytree(digits_folder, tmp_path / "images")
    next((tmp_path / "images" / "val" / "3").iterdir()).unlink()
    build_dataset(tmp_path / "images", tmp_path / "fewer", BuildOptions(samples_per_shard=100))
    note = "the validation images have changed since step 5: accuracies before and after it cannot be compared"
    for root, steps, said in ((digits, 5, False), (tmp_path / "fewer", 6, True), (tmp_path / "fewer", 7, False)):
        train_here(root, tmp_path / "run", "--run.stop_after_steps", steps)
        assert (note in capsys.readouterr().out) is said, steps


def test_changed_settings_of_the_training_take_effect_and_are_told(digits, tmp_path, capsys):
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    changed = ["--optim.weight_decay", "0.9", "--optim.betas", "[0.5,0.6]", "--schedule.epochs", 3]
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path), *map(str, changed)]), ONE)
    assert {group["weight_decay"] for group in run.state.optimizer.param_groups} == {0.0, 0.9}
    assert {group["betas"] for group in run.state.optimizer.param_groups} == {(0.5, 0.6)}
    assert all(torch.is_tensor(state["exp_avg"]) for state in run.state.optimizer.state.values())
    told = {note.removeprefix("changed since the checkpoint: ") for note in run.notes}
    assert {"optim.weight_decay was 0.02, now it is 0.9", "schedule.epochs was 4, now it is 3"} <= told
    train_here(digits, tmp_path, *changed, "--run.stop_after_steps", 3)
    assert "optim.weight_decay was 0.02, now it is 0.9" in capsys.readouterr().out


def test_an_average_that_is_switched_on_later_starts_where_the_student_stands(digits, tmp_path):
    train_here(digits, tmp_path, "--ema.decay", 0, "--run.stop_after_steps", 2)
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]), ONE)
    assert_equal_states(dict(run.state.ema.module.state_dict()), dict(run.state.student.state_dict()))


def test_a_run_that_has_already_gone_further_is_refused(digits, tmp_path):
    train_here(digits, tmp_path, "--run.stop_after_steps", 11)
    with pytest.raises(UserError, match=r"has done 11 steps, this run ends after 10: raise schedule.epochs"):
        train_here(digits, tmp_path, "--schedule.epochs", 2)


def test_a_model_that_cannot_take_the_images_is_refused_at_once(digits, tmp_path):
    fixed = ["--student.name", "vit_tiny_patch16_224", "--student.kwargs.depth", 1, "--data.eval_image_size", 48]
    with pytest.raises(UserError, match="model 'vit_tiny_patch16_224' cannot take images of 48 px"):
        train_here(digits, tmp_path / "run", *fixed)
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_size_is_refused_where_sizes_change_unless_it_takes_any(digits, tmp_path):
    vit = {"model_name": "vit_tiny_patch16_224", "depth": 1}
    sizes = ["--data.image_size", "[[0,16],[1,32]]", "--run.stop_after_steps", 6]
    student = [*sizes, "--student.name", vit["model_name"], "--student.kwargs.depth", 1]
    fixed = "'vit_tiny_patch16_224' cannot take images of 16 px .* take any size with --student.kwargs.dynamic"
    with pytest.raises(UserError, match=fixed):
        train_here(digits, tmp_path / "run", *student)
    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model(**vit, num_classes=10, img_size=32).state_dict(), weights)
    teacher = ["--teacher.name", vit["model_name"], "--teacher.kwargs.depth", 1, "--teacher.checkpoint", weights]
    fixed = "'vit_tiny_patch16_224' cannot take images of 16 px .* Give it a size of its own with teacher.image_size"
    with pytest.raises(UserError, match=fixed):
        train_here(digits, tmp_path / "run", *sizes, *teacher)
    assert not (tmp_path / "run").exists()
    train_here(digits, tmp_path / "run", *student, "--student.kwargs.dynamic_img_size", "true")


def test_a_size_that_would_never_be_reached_is_refused(digits, tmp_path):
    message = "data.image_size: 64 px begin with epoch 4, but the run ends after 4 epochs: let them begin earlier, or"
    with pytest.raises(UserError, match=message):
        train_here(digits, tmp_path / "run", "--data.image_size", "[[0,32],[4,64]]")
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_stops_with_its_checkpoints(digits, tmp_path):
    never = ["--run.eval_every", 9]  # its statistics would be looked at, too
    train_here(digits, tmp_path, "--run.stop_after_steps", 2)
    message = r"step \d: the (output of the student|gradient) is not finite.* Lower optim"
    with pytest.raises(UserError, match=message):
        train_here(digits, tmp_path, "--optim.lr", "1e9", "--schedule.warmup_lr", "1e9", "--run.log_every", 1, *never)
    assert newest(tmp_path)["step"] == 2


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder that can be written. Change --run.out"):
        train(parse([*TINY, "--run.out", str(tmp_path / "file" / "run")]), ONE)


def test_two_runs_in_one_folder(digits, tmp_path):
    tmp_path.joinpath("run").mkdir()
    with locked(tmp_path / "run" / ".lock", ""), pytest.raises(UserError, match="run: another run is working in it"):
        train_here(digits, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_average_too_slow_for_the_run_is_told(digits, tmp_path, capsys):
    train_here(digits, tmp_path, "--ema.decay", "0.99996", "--run.stop_after_steps", 1)
    assert "ema.decay 0.99996 is slow for 20 steps: at the end the average still holds 100%" in capsys.readouterr().out


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_without_a_traceback(digits, tmp_path):
    command = [executable(), str(REPOSITORY / "trainer" / "run.py"), *TINY, *EVERY_3]
    command += ["--data.root", str(digits), "--run.out", str(tmp_path)]
    command += ["--schedule.epochs", "300"]  # on a busy machine 4 end before the signal
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or "train" not in {line["kind"] for line in read_json_lines(metrics)}:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "stopping after the present step, or before the first; again ends at once\n"
    assert newest(tmp_path)["step"] > 0


def test_a_plan_with_a_field_less_differs():
    with pytest.raises(UserError, match="old was 1, now it is None"):
        check_same_plan(Path("x.pt"), {"seed": 0, "old": 1}, {"seed": 0})


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    digits, undisturbed, teacher, tmp_path, capsys, damage
):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    path = run / "checkpoints" / "step-00000020.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:  # a file that torch reads without complaint
        content = torch.load(path, weights_only=True)
        content["optimizer"]["state"][3]["exp_avg"].view(-1)[0] += 1e-6
        torch.save(content, path)
    train_here(digits, run, *teacher, *DROPOUT, *EVERY_3)
    said = " ".join(capsys.readouterr().out.split())
    assert "step-00000020.pt: damaged" in said and "going on from an earlier one, step-00000018.pt" in said
    assert "resuming after step 18" in said
    for part in ("student", "ema", "optimizer", "best"):
        assert_equal_states(newest(undisturbed)[part], newest(run)[part], part)
    assert sorted(file.name for file in (run / "checkpoints").glob("*.damaged")) == ["step-00000020.damaged"]


def test_the_card_is_tried_once_and_the_answer_remembered(digits, tmp_path, monkeypatch):
    """On a machine without a GPU, which the world and the card's name only pretend to be."""
    index, tried = read_index(digits, "train"), []
    world = World(0, 1, 1, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr("trainer.feed.probe_dataset", lambda *a: tried.append(a) or ("full", "regions crashed"))
    config = parse([*TINY, "--run.out", str(tmp_path)])
    chosen = choose_decode(config, index, world)
    assert chosen["decode"] == "full" and chosen["why"] == "regions crashed" and len(tried) == 1
    assert choose_decode(config, index, world) == chosen and len(tried) == 2  # nothing was written yet
    (tmp_path / "decode.json").write_text(json.dumps(chosen))
    assert choose_decode(config, index, world) == chosen and len(tried) == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert choose_decode(config, index, world)["device"] == "H200" and len(tried) == 3
    (tmp_path / "decode.json").write_text('{"deco')
    choose_decode(config, index, world)
    assert len(tried) == 4
    assert choose_decode(config, index, ONE) == {"decode": "roi"}
    assert choose_decode(parse([*TINY, "--data.decode", "full"]), index, world) == {"decode": "full"}
