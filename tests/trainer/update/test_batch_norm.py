"""BatchNorm's running statistics over micro-batches and ranks, in each mode."""

import copy
import os
import subprocess

import pytest
import timm
import torch
from torch import nn

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from support.forked_python import executable
from support.tiny_runs import CPU, FOUR_GROUPS, ONE, all_equal, build_here, first_batches
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.models.batch_norm import running_statistics, synchronize_batch_norms
from trainer.models.normalize import Normalize
from trainer.update.mixing import mix_pixels

RANK_SCRIPT = """
import copy
import sys
from pathlib import Path

import torch

from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.cluster.world import join_world
from trainer.models.batch_norm import running_statistics
from trainer.builder import build


def updates(run, start, stop):
    plans = rank_plans(run.plan, start, stop, run.world, run.state.micro_batch)
    batches = run.pipelines.of["train"].batches(plans)
    for number in range(start, stop):
        run.step(batches, number)
    batches.close()


def state(run):
    student, average = run.state.student, run.state.ema.module
    return {"statistics": running_statistics(student), "average": running_statistics(average),
            "weights": [p.detach() for p in student.parameters()], "local": run.state.local_statistics()}


out, arguments = Path(sys.argv[1]), sys.argv[2:]
with join_world("cpu") as world:
    found = {}
    for mode in ("reduce", "broadcast", "none"):
        run = build(parse([*arguments, "--run.batch_norm", mode]), world)
        updates(run, 0, 1)
        found[mode] = [{name: [t.clone() for t in ts] if ts else ts for name, ts in state(run).items()}]
        # A checkpoint holds the states of rank 0, and every rank's statistics
        parts = {"student": run.state.student, "ema": run.state.ema.module, "optimizer": run.state.optimizer}
        saved = copy.deepcopy(world.broadcast_object({name: part.state_dict() for name, part in parts.items()}))
        updates(run, 1, 3)
        resumed = build(parse([*arguments, "--run.batch_norm", mode]), world)
        resumed.state.student.load_state_dict(saved["student"])
        resumed.state.ema.module.load_state_dict(saved["ema"])
        resumed.state.optimizer.load_state_dict(saved["optimizer"])
        if found[mode][0]["local"]:
            resumed.state.rank_statistics = world.all_gather([found[mode][0]["local"]])
            resumed.state.restore_rank_statistics(world.rank, world.size)
        updates(resumed, 1, 3)
        found[mode] += [state(run), state(resumed)]
    torch.save(found, out / f"rank-{world.rank}.pt")
"""


@pytest.fixture(scope="module")
def two_ranks(digits, tmp_path_factory) -> list[dict]:
    """Of each rank, for each mode: its state after 1 update, after 3, and after 3 with a stop after the first."""
    out = tmp_path_factory.mktemp("ranks")
    script = out / "script.py"
    script.write_text(RANK_SCRIPT)
    command = [executable(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(out), *FOUR_GROUPS, "--data.root", str(digits), "--run.out", str(out / "none")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain_statistics(digits, tmp_path_factory) -> list[list[torch.Tensor]]:
    """Running statistics that each of the first update's 4 micro-batches alone leaves."""
    run = build_here(digits, tmp_path_factory.mktemp("plain") / "none")
    normalize, statistics = Normalize((0.5,) * 3, (0.5,) * 3), []
    for batch in first_batches(run, 1):
        student = copy.deepcopy(run.state.student)
        student(normalize(mix_pixels(batch)))
        statistics.append(running_statistics(student))
    return statistics


def mean(statistics: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(values).mean(0) for values in zip(*statistics, strict=True)]


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("mode", "indices"),
    [
        ("reduce", [slice(0, 4), slice(0, 4)]),
        ("broadcast", [slice(0, 2), slice(0, 2)]),
        ("none", [slice(0, 2), slice(2, 4)]),
    ],
)
def test_statistics_after_an_update_are_the_mean_over_these_micro_batches(two_ranks, plain_statistics, mode, indices):
    """Micro-batches 0 and 1 are rank 0's, 2 and 3 rank 1's."""
    for rank, index in zip(two_ranks, indices, strict=True):
        assert close(rank[mode][0]["statistics"], mean(plain_statistics[index]))
    assert not close(mean(plain_statistics[:2]), mean(plain_statistics))


@pytest.mark.parametrize("mode", ["reduce", "broadcast", "none"])
def test_every_mode_resumes_bit_equal_and_keeps_the_weights_of_the_ranks_equal(two_ranks, mode):
    for rank in two_ranks:
        _, whole, resumed = rank[mode]
        for part in ("weights", "statistics", "average"):
            assert all_equal(whole[part], resumed[part]), part
    first, second = (rank[mode][1] for rank in two_ranks)
    assert all_equal(first["weights"], second["weights"])
    for part in ("statistics", "average"):
        assert all_equal(first[part], second[part]) == (mode != "none"), part


def test_only_ranks_that_differ_have_statistics_to_save(two_ranks):
    for mode in ("reduce", "broadcast"):
        assert not two_ranks[0][mode][0]["local"]
    for rank in two_ranks:
        after = rank["none"][0]
        assert all_equal(after["local"], [*after["statistics"], *after["average"]])


def test_one_rank_has_nothing_of_its_own_in_any_mode(digits, tmp_path):
    states = []
    for mode in ("reduce", "broadcast", "none", "sync"):
        run = build_here(digits, tmp_path, "--run.batch_norm", mode)
        run.step(iter(first_batches(run, 1)), 0)
        assert not run.state.local_statistics()
        states.append(list(run.state.student.state_dict().values()))
    assert all(all_equal(states[0], state) for state in states)


def test_an_ema_that_is_switched_on_or_off_later_takes_what_there_is(digits, tmp_path):
    run = build_here(digits, tmp_path)
    student, average = running_statistics(run.state.student), running_statistics(run.state.ema.module)
    given = [torch.rand_like(values) for values in student]
    run.state.ranks_differ, run.state.rank_statistics = True, [given]
    run.state.restore_rank_statistics(0, 1)
    assert all_equal(student, given) and all_equal(average, given)
    other = [torch.rand_like(values) for values in student]
    run.state.ema = None
    run.state.rank_statistics = [[*other, *given]]
    run.state.restore_rank_statistics(0, 1)
    assert all_equal(student, other) and all_equal(average, given)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="run.batch_norm: Expected one of .*'sync'.*mean"):
        parse(["--run.batch_norm", "mean"])


def test_layers_over_all_ranks_are_refused_on_cpus_with_the_way_out():
    model = timm.create_model("test_resnet")
    message = "run.batch_norm is sync with 2 ranks on CPUs, .* GPUs alone: use run.batch_norm reduce, or one rank"
    with pytest.raises(UserError, match=message):
        synchronize_batch_norms(model, World(0, 2, 2, CPU))
    assert synchronize_batch_norms(model, ONE) is model
    without = timm.create_model("test_vit")
    assert synchronize_batch_norms(without, World(0, 2, 2, CPU)) is without


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_layers_over_all_ranks_compute_the_same_where_there_is_one(name):
    """The conversion as for two GPUs, carried out on one CPU; timm's layers with an activation in them, too."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10)
    model = synchronize_batch_norms(copy.deepcopy(plain), World(0, 2, 2, torch.device("cuda", 0)))
    layers = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(layers) == len(running_statistics(plain)) / 2 > 0
    assert list(model.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for training in (True, False):
        assert torch.equal(model.train(training)(images), plain.train(training)(images))
    assert all_equal(list(model.state_dict().values()), list(plain.state_dict().values()))
