"""Short runs of the tiny student on the digits, and what several tests ask of them."""

import contextlib
from pathlib import Path

import torch

from chaos.runs import equal
from conftest import TINY
from pipelines.batch import Batch
from trainer.builder import Run, build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.state.checkpoint import checkpoints, checkpoints_folder, read
from trainer.update.step import TrainStep

CPU = torch.device("cpu")
ONE = World(0, 1, 1, CPU)
STATE = ("step", "evaluated", "best", "student", "ema", "optimizer", "scaler")
FOUR_GROUPS = [*TINY, "--augment.mix_group", "16"]  # An update has four micro-batches, two on each of two ranks.


def arguments_for(digits: Path, out: Path, *arguments) -> list[str]:
    """The command line of a run with the settings in TINY."""
    return [*TINY, "--data.root", str(digits), "--run.out", str(out), *map(str, arguments)]


def build_here(digits: Path, out: Path, *arguments) -> Run:
    """A run with the settings in FOUR_GROUPS."""
    return build(parse([*FOUR_GROUPS, "--data.root", str(digits), "--run.out", str(out), *map(str, arguments)]), ONE)


def first_batches(run: Run, steps: int) -> list[Batch]:
    """The micro-batches of a run's first updates."""
    plans = rank_plans(run.plan, 0, steps, ONE, run.state.micro_batch)
    with contextlib.closing(run.pipelines.of["train"].batches(plans)) as batches:
        return list(batches)


def newest(out: Path) -> dict:
    """The content of a run's newest checkpoint."""
    return read(checkpoints(checkpoints_folder(out))[-1])


def assert_same_end(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs are bit-equal."""
    found, expected = newest(a), newest(b)
    assert [part for part in STATE if not equal(found[part], expected[part])] == []


def assert_equal_states(a, b, path="") -> None:
    """Two nested states are bit-equal, tensor by tensor."""
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


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """True if the tensors are bit-equal, pair by pair."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def at_step(monkeypatch, number: int, action) -> None:
    """Call `action` while update `number` is made."""
    call = TrainStep.__call__

    def acting(self, batches, n):
        if n == number:
            action()
        return call(self, batches, n)

    monkeypatch.setattr(TrainStep, "__call__", acting)
