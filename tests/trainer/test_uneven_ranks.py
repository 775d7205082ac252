"""Runs whose ranks do not divide the mixing groups equally."""

from conftest import train_here
from pipelines.common.files import read_json_lines
from support.ranks import run_ranks
from support.tiny_runs import assert_same_end, newest


def test_a_note_says_what_batch_norm_sees(digits, tmp_path, capsys):
    arguments = ["--run.stop_after_steps", 1]
    train_here(digits, tmp_path / "groups", *arguments)
    assert "BatchNorm normalises" not in capsys.readouterr().out
    train_here(digits, tmp_path / "pairs", *arguments, "--run.micro_batch", 26)
    assert (
        "BatchNorm normalises over 20 or 22 images; the recipe's is a mixing group, here 32" in capsys.readouterr().out
    )


def test_the_summary_and_the_checkpoint_list_what_batch_norm_sees(digits, tmp_path):
    summary = train_here(digits, tmp_path, "--run.stop_after_steps", 1, "--run.micro_batch", 26)
    rows = [row for row in summary["deviations"] if row["key"] == "run.micro_batch"]
    assert [row["here"] for row in rows] == ["BatchNorm over 20 or 22 images"]
    assert rows[0]["usi"] == "BatchNorm over a mixing group, 128 images"
    assert newest(tmp_path)["audit"] == summary["deviations"]


def test_three_ranks_resume_bit_equal_and_log_the_mean_of_all_images(digits, tmp_path):
    model = ["--student.name", "test_vit", "--student.kwargs.depth", 1]
    arguments = [*model, "--data.root", digits, "--run.log_every", 1, "--run.checkpoint_every", 2]
    run_ranks(3, *arguments, "--run.out", tmp_path / "whole", "--run.stop_after_steps", 4)
    for stop in (2, 4):
        run_ranks(3, *arguments, "--run.out", tmp_path / "parts", "--run.stop_after_steps", stop)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    run_ranks(1, *arguments, "--run.out", tmp_path / "alone", "--run.stop_after_steps", 1)
    first = [
        next(line["loss"] for line in read_json_lines(tmp_path / name / "metrics.jsonl") if line["kind"] == "train")
        for name in ("whole", "alone")
    ]
    assert abs(first[0] - first[1]) < 1e-5
