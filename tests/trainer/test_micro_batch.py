"""The largest micro-batch that fits is found by trying."""

import pytest
import torch

from conftest import REPOSITORY, TINY, train_here
from pipelines.common.errors import UserError
from support.tiny_runs import ONE, arguments_for
from tools import doctor
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.micro_batch import largest_micro_batch, resolve_micro_batch
from trainer.run import main

CONFIG = REPOSITORY / "configs" / "usi.yaml"


@pytest.mark.parametrize(
    ("limit", "rank_batch", "expected"),
    [
        (1000, 1024, 512),
        (1024, 1024, 1024),
        (600, 1024, 512),
        (400, 1024, 342),
        (33, 1024, 32),
        (2, 64, 2),
        (70, 206, 70),
    ],
)
def test_the_largest_micro_batch_that_fits_is_found_by_few_attempts(limit, rank_batch, expected):
    tried = []

    def fits(micro_batch: int) -> bool:
        tried.append(micro_batch)
        return micro_batch <= limit

    assert largest_micro_batch(rank_batch, ONE, fits) == expected
    assert len(tried) == len(set(tried)) <= 12
    number = -(-rank_batch // expected)  # With one micro-batch fewer they would not fit.
    assert number == 1 or 2 * -(-rank_batch // (2 * (number - 1))) > limit


def test_that_not_even_a_pair_fits_is_an_error_on_every_rank():
    with pytest.raises(UserError, match="not even two images fit"):
        largest_micro_batch(64, ONE, lambda _: False)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 16, 32])
@pytest.mark.parametrize("micro", [0, "auto", 2, 8, 32, 48, 64, 100])
def test_any_number_of_ranks_and_any_even_micro_batch_are_taken(ranks, micro):
    config = parse([*TINY, "--run.micro_batch", str(micro)])
    found = resolve_micro_batch(config, World(0, ranks, ranks, torch.device("cpu")))
    assert found == (32 if micro in (0, "auto") else micro)


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (33, [], "ranks is 33; a global batch of 64 rows has 32 pairs"),
        (1, ["--run.micro_batch", "7"], "run.micro_batch is 7; give an even number"),
        (1, ["--run.global_batch", "48"], "run.global_batch is 48; it must be a multiple of augment.mix_group, 32"),
        (
            3,
            ["--run.micro_batch", "2", "--run.batch_norm", "sync"],
            "too small for run.batch_norm sync",
        ),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(ranks, arguments, message):
    with pytest.raises(UserError, match=message):
        resolve_micro_batch(parse([*TINY, *arguments]), World(0, ranks, ranks, torch.device("cpu")))


def test_auto_is_one_group_on_a_cpu_and_is_kept_by_a_run_that_resumes(digits, tmp_path, capsys):
    train_here(digits, tmp_path, "--run.micro_batch", 64, "--run.stop_after_steps", 2)
    train_here(digits, tmp_path, "--run.micro_batch", "auto", "--run.stop_after_steps", 3)
    assert "run.micro_batch auto: 64, as before" in capsys.readouterr().out
    train_here(digits, tmp_path / "new", "--run.micro_batch", "auto", "--run.stop_after_steps", 1)
    assert "run.micro_batch auto: 32, one group, on a CPU" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["trainer.update.step.TrainStep.__call__", "trainer.update.step.TrainStep.warm_up"])
@pytest.mark.parametrize("command", [main, lambda arguments: doctor.main([str(CONFIG), *arguments])])
def test_a_gpu_without_memory_left_is_one_line(digits, tmp_path, monkeypatch, capsys, where, command):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(where, full)
    monkeypatch.setattr("trainer.builder.choose_compiler", lambda *_: (lambda function: function, ""))  # It warms up.
    with pytest.raises(SystemExit):
        command(arguments_for(digits, tmp_path))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: CUDA out of memory. Tried") and "Lower run.micro_batch, or run.eval_batch" in said


@pytest.mark.gpu
@pytest.mark.parametrize("pipeline", ["torchvision", "dali"])
def test_auto_is_found_by_trying_on_a_gpu(digits, tmp_path, capsys, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    arguments = ["--run.micro_batch", "auto", "--data.pipeline", pipeline, "--run.stop_after_steps", 2]
    train_here(digits, tmp_path, *arguments, "--run.device", "cuda")
    assert "run.micro_batch auto: 64, the largest that fits of a rank's 64 images" in capsys.readouterr().out
