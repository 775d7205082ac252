"""The largest micro-batch that fits is found by trying."""

import pytest
import torch

from conftest import REPOSITORY, train_here
from pipelines.common.errors import UserError
from support.tiny_runs import arguments_for
from tools import doctor
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.micro_batch import largest_micro_batch
from trainer.run import main

CONFIG = REPOSITORY / "configs" / "usi.yaml"


@pytest.mark.parametrize(("limit", "ranks", "expected"), [(1000, 1, 1024), (600, 1, 512), (300, 2, 256), (128, 8, 128)])
def test_the_largest_micro_batch_that_fits_is_found(limit, ranks, expected):
    config = parse(["--run.micro_batch", "auto"])
    world = World(0, ranks, ranks, torch.device("cpu"))
    world_sum = World.all_reduce_sum
    tried = []

    def fits(micro_batch: int) -> bool:
        tried.append(micro_batch)
        return micro_batch <= max(limit, 1024 if limit == 1000 else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            World, "all_reduce_sum", lambda self, values: values if self.size > 1 else world_sum(self, values)
        )
        assert largest_micro_batch(config, world, fits) == expected
        assert tried == sorted(tried, reverse=True) and all(1024 // ranks % size == 0 for size in tried)
        with pytest.raises(UserError, match="not even one group of 128 images fits"):
            largest_micro_batch(config, world, lambda _: False)


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
