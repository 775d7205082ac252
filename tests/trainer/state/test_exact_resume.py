"""A run that is stopped and resumed is bit-equal to one that was not, whatever its settings."""

import json
import shutil

import pytest
import torch

from conftest import DROPOUT, EVERY_3, TINY, run_trainer, train_here
from pipelines.common.errors import UserError
from support.tiny_runs import ONE, assert_equal_states, newest
from trainer.builder import build
from trainer.config.sections import parse
from trainer.loop import train


def test_a_run_stopped_at_step_7_and_resumed_is_bit_equal_to_one_that_was_not(digits, teacher, distilled, tmp_path):
    """It resumes in another process."""
    arguments = [*teacher, *DROPOUT, *EVERY_3]
    train_here(digits, tmp_path, *arguments, "--run.stop_after_steps", 7)
    assert newest(tmp_path)["step"] == 7
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
    done = run_trainer("--data.root", digits, "--run.out", tmp_path, *arguments)
    assert "resuming after step 7" in done.stdout
    a, b = newest(distilled), newest(tmp_path)
    assert a["step"] == b["step"] == 20
    for part in ("student", "ema", "optimizer"):
        assert_equal_states(a[part], b[part], part)
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is True


def test_a_finished_run_that_is_started_again_stays_as_it_is(digits, distilled, teacher, tmp_path, capsys):
    run = shutil.copytree(distilled, tmp_path / "run")
    before = newest(run)
    train_here(digits, run, *teacher, *DROPOUT, *EVERY_3)
    assert "nothing to do: the run has done 20 of 20 steps" in capsys.readouterr().out
    assert_equal_states(before["student"], newest(run)["student"])
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, distilled)]
    assert summaries[0] == summaries[1]
    # without its summary, it was killed after its last checkpoint
    (run / "summary.json").unlink()
    train_here(digits, run, *teacher, *DROPOUT, *EVERY_3)
    assert json.loads((run / "summary.json").read_text())["evaluation"] == summaries[1]["evaluation"]


def test_a_run_whose_images_grow_resumes_bit_equal_before_at_and_after_the_change(digits, teacher, tmp_path):
    """5 steps an epoch: the sixth is the first of 32 px."""
    growing = ["--data.image_size", "[[0,24],[1,32]]", *teacher, *DROPOUT, "--run.log_every", 1]
    for name, stops in (("whole", (7,)), ("stopped", (4, 5, 6, 7))):
        for steps in stops:
            train_here(digits, tmp_path / name, *growing, "--run.stop_after_steps", steps)
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "stopped")
    for part in ("student", "ema", "optimizer"):
        assert_equal_states(a[part], b[part], part)
    assert a["plan"]["image_size"] == [[0, 24], [1, 32]]


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


def test_a_run_of_repeated_epochs_resumes_bit_equal_with_dropout_of_its_own(digits, tmp_path):
    """5 steps an epoch: the sixth repeats the first one's views."""
    repeated = ["--augment.cycle_epochs", 1, *DROPOUT]
    for name, stops in (("whole", (7,)), ("stopped", (4, 6, 7))):
        for steps in stops:
            train_here(digits, tmp_path / name, *repeated, "--run.stop_after_steps", steps)
    assert_equal_states(newest(tmp_path / "whole")["student"], newest(tmp_path / "stopped")["student"])
    assert newest(tmp_path / "whole")["plan"]["augment.cycle_epochs"] == 1


def test_a_run_in_windows_of_shards_resumes_bit_equal(digits, tmp_path):
    window = ["--data.shuffle", "window", "--data.window_shards", 2]
    for name, stops in (("whole", (7,)), ("stopped", (4, 7))):
        for steps in stops:
            train_here(digits, tmp_path / name, *window, "--run.stop_after_steps", steps)
    assert_equal_states(newest(tmp_path / "whole")["student"], newest(tmp_path / "stopped")["student"])
    with pytest.raises(UserError, match=r"another run: window_shards .*data.window_shards.* was 2, now it is 0"):
        train_here(digits, tmp_path / "whole")


def test_a_run_fine_tunes_from_a_run_on_other_classes_says_so_and_resumes(digits, tmp_path, capsys):
    synthetic = ["--data.pipeline", "synthetic", "--data.synthetic_samples", "64", "--data.synthetic_classes", "5"]
    train(build(parse([*TINY, *synthetic, "--run.out", str(tmp_path / "before"), "--run.stop_after_steps", "1"]), ONE))
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


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(digits, distilled, teacher, tmp_path, capsys):
    run = shutil.copytree(distilled, tmp_path / "run")
    path = run / "checkpoints" / "step-00000020.pt"
    content = torch.load(path, weights_only=True)
    content["optimizer"]["state"][3]["exp_avg"].view(-1)[0] += 1e-6
    torch.save(content, path)  # torch reads it without complaint
    train_here(digits, run, *teacher, *DROPOUT, *EVERY_3)
    said = " ".join(capsys.readouterr().out.split())
    assert "step-00000020.pt: damaged" in said and "resuming from an earlier one, step-00000018.pt" in said
    assert "resuming after step 18" in said
    for part in ("student", "ema", "optimizer", "best"):
        assert_equal_states(newest(distilled)[part], newest(run)[part], part)
    assert sorted(file.name for file in (run / "checkpoints").glob("*.damaged")) == ["step-00000020.damaged"]
