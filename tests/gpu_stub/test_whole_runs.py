"""trainer/run.py from its first line to its last: on one rank and on two, compiled for an H100, and resumed."""

import json
import sys
from pathlib import Path

import pytest

from gpu_stub.runs import arguments, teacher_file
from support.ranks import Ranks
from trainer.state import checkpoint

TRAIN = Path(__file__).resolve().with_name("train.py")
ON_IMAGES = {"data.pipeline": "torchvision", "run.eval_batch": 32, "run.log_every": 2}


def run_ranks(size: int, out: Path, settings: dict) -> str:
    """What rank 0 wrote. Each rank is on a machine of its own, for the stand-in is one GPU."""
    command = [TRAIN, *arguments(out, {**ON_IMAGES, **settings})]
    places = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "PYTORCH_NO_CUDA_MEMORY_CACHING": 1}
    with Ranks(command, size, python=sys.executable, **places) as ranks:
        ends = ranks.end(timeout=500)
    texts = [out + error for _, out, error in ends]
    assert [code for code, *_ in ends] == [0] * size, "\n".join(texts)
    return texts[0]


def steps_of(out: Path) -> list[int]:
    """The steps that have a line in the metrics, in the order of the file."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def on_digits(folder: Path, digits: Path) -> dict:
    """Ten steps with a teacher, two evaluations."""
    teacher = {"teacher.name": "tiny_cnn", "teacher.checkpoint": teacher_file(folder)}
    return {**teacher, "data.root": digits, "run.global_batch": 64}


def assert_complete(out: Path, ranks: int, start_step: int) -> None:
    """What a run of ten steps leaves behind."""
    assert steps_of(out) == [2, 4, 5, 6, 8, 10]  # 5 is the end of an epoch
    summary = json.loads((out / "summary.json").read_text())
    assert summary["session"]["start_step"] == start_step and summary["session"]["ranks"] == ranks
    assert "H100" in summary["session"]["device"] and summary["evaluation"]["raw"]["images"] == 96
    last = checkpoint.read(checkpoint.path_of(out / "checkpoints", 10))
    assert last["step"] == 10 and not any(value.is_cuda for value in last["student"].values())


def test_a_run_goes_through_and_ends_with_an_evaluation(digits, tmp_path):
    said = run_ranks(1, tmp_path / "run", on_digits(tmp_path, digits))
    assert "finished after step 10 of 10" in said
    assert_complete(tmp_path / "run", ranks=1, start_step=0)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_is_stopped_and_resumed(size, digits, tmp_path):
    settings = on_digits(tmp_path, digits)
    run_ranks(size, tmp_path / "run", {**settings, "run.stop_after_steps": 6})
    said = run_ranks(size, tmp_path / "run", settings)
    assert "resuming after step 6" in said and "finished after step 10 of 10" in said
    assert_complete(tmp_path / "run", ranks=size, start_step=6)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_compiled_for_an_h100_goes_through(size, tmp_path):
    """inductor's code generator and Triton's compiler are real; what they made is launched and does nothing."""
    said = run_ranks(size, tmp_path / "run", {"run.compile": "true", "data.pipeline": "synthetic"})
    assert "compiled in" in said and "finished after step 16 of 16" in said


@pytest.mark.long
def test_two_ranks_with_layers_over_both_go_through_and_say_why_nothing_is_compiled(tmp_path):
    said = run_ranks(
        2, tmp_path / "run", {"run.batch_norm": "sync", "run.compile": "auto", "data.pipeline": "synthetic"}
    )
    assert "run.batch_norm sync makes the host wait" in said and "finished after step" in said
