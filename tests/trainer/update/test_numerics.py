"""Clipping, BatchNorm's running statistics over ranks, the average's warm-up, TF32, fp16."""

import contextlib
import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from conftest import REPOSITORY, TINY
from pipelines.common.errors import UserError
from support.forked_python import executable
from trainer.cluster.world import World
from trainer.config.sections import EmaConfig, OptimConfig, parse
from trainer.feed import rank_plans
from trainer.models.factory import synchronize_batch_norms
from trainer.run import Run, build, train
from trainer.update.mixing import Normalize, mix_pixels
from trainer.update.optimizer import clip_adaptively, gradient_clipping, running_statistics
from trainer.update.precision import allow_tf32
from trainer.update.schedule import ema_decay

CPU = torch.device("cpu")
ONE = World(0, 1, 1, CPU)
FOUR_GROUPS = [*TINY, "--augment.mix_group", "16"]  # four micro-batches an update, two on each of two ranks


def build_here(digits: Path, out: Path, *arguments) -> Run:
    return build(parse([*FOUR_GROUPS, "--data.root", str(digits), "--run.out", str(out), *map(str, arguments)]), ONE)


def first_batches(run: Run, steps: int) -> list:
    plans = rank_plans(run.plan, 0, steps, ONE, run.state.micro_batch)
    with contextlib.closing(run.pipelines.of["train"].batches(plans)) as batches:
        return list(batches)


def gradients(model: nn.Module) -> torch.Tensor:
    """All of them, one after the other, float64."""
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


# --- clipping ---


def with_gradients(name: str, scale: float = 1.0) -> nn.Module:
    """A model with random gradients, of very different sizes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = scale * 10.0 ** (i % 7 - 5) * torch.randn_like(parameter)
    return model


def test_nothing_is_clipped_by_default():
    assert gradient_clipping(nn.Linear(2, 2), OptimConfig()) is None


@pytest.mark.parametrize(("scale", "clipped"), [(1.0, True), (1e-8, False)])
def test_the_norm_of_all_gradients_together_is_cut_and_their_direction_kept(scale, clipped):
    model = with_gradients("test_resnet", scale)
    before = gradients(model)
    gradient_clipping(model, OptimConfig(clip_norm=0.5))()
    expected = before * (0.5 / before.norm()) if clipped else before
    assert torch.allclose(gradients(model), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s"])
def test_adaptive_clipping_is_timms_and_leaves_the_classifier_out(name):
    """levit_128s has two classifiers, each with a BatchNorm."""
    model = with_gradients(name)
    expected = copy.deepcopy(model)
    heads = expected.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    left_out = {id(parameter) for head in heads for parameter in head.parameters()}
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
        if id(theirs) not in left_out:
            adaptive_clip_grad(theirs, clip_factor=0.02)
    before = gradients(model)
    gradient_clipping(model, OptimConfig(clip_agc=0.02))()
    assert torch.allclose(gradients(model), gradients(expected), rtol=1e-5, atol=0)
    changed = (gradients(model) != before).double().mean()
    assert 0.1 < changed < 0.9  # some are clipped and some are not
    assert all(parameter.grad.norm() > 0 for head in heads for parameter in head.parameters())


def test_adaptive_clipping_of_weights_and_gradients_that_are_zero_or_not_there():
    zero, still, idle = (nn.Parameter(torch.zeros(3, 4)) for _ in range(3))
    zero.grad, still.grad = torch.full((3, 4), 7.0), torch.zeros(3, 4)
    clip_adaptively([zero, still, idle], 0.01)
    assert torch.allclose(zero.grad.norm(dim=1), torch.full((3,), 0.01 * 1e-3))
    assert torch.equal(still.grad, torch.zeros(3, 4)) and idle.grad is None
    clip_adaptively([idle], 0.01)


def test_two_ways_of_clipping_at_once_are_refused():
    with pytest.raises(UserError, match="optim.clip_norm is 1.0 and optim.clip_agc is 0.01: set one of them to 0"):
        parse(["--optim.clip_norm", "1", "--optim.clip_agc", "0.01"])
    with pytest.raises(UserError, match="optim.clip_norm is -1.0; it must not be negative"):
        parse(["--optim.clip_norm", "-1"])


def test_the_gradient_of_the_whole_update_is_clipped_once(digits, tmp_path):
    """Four micro-batches."""
    found = {}
    for name, clip in (("free", 0.0), ("clipped", 0.1), ("wide", 1e3)):
        run = build_here(digits, tmp_path, "--optim.clip_norm", clip)
        run.step(iter(first_batches(run, 1)), 0)
        found[name] = gradients(run.state.student)
    assert found["free"].norm() > 0.2
    assert torch.allclose(found["clipped"], 0.1 * found["free"] / found["free"].norm(), rtol=1e-4, atol=0)
    assert torch.equal(found["wide"], found["free"])


def test_fp16_gradients_are_unscaled_before_they_are_clipped(digits, tmp_path):
    """The scale is 65536, so the scaled gradients would be cut by a norm that the true ones are far from."""
    found = {}
    for precision in ("fp32", "fp16"):
        arguments = ["--student.name", "test_vit", "--run.precision", precision, "--optim.clip_norm", 1000]
        run = build_here(digits, tmp_path, *arguments)
        run.step(iter(first_batches(run, 1)), 0)
        found[precision] = gradients(run.state.student)
    assert found["fp16"].norm().item() == pytest.approx(found["fp32"].norm().item(), rel=0.02)
    assert torch.cosine_similarity(found["fp16"], found["fp32"], dim=0) > 0.999


@pytest.mark.parametrize("clip", [["--optim.clip_norm", "1"], ["--optim.clip_agc", "0.05"]], ids=["norm", "agc"])
def test_fp16_with_clipping_trains(digits, tmp_path, clip):
    """The same images over and over, without augmentation to speak of."""
    plain = ["--augment.randaugment_ops", 0, "--augment.mix_prob", 0, "--augment.crop_area", "[0.9,1.0]"]
    run = build_here(digits, tmp_path, "--student.name", "test_vit", "--run.precision", "fp16", *clip, *plain)
    batches = first_batches(run, 1)
    losses = [run.step(iter(batches), number).loss.item() for number in range(15)]
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [{"clip_norm": 0.5}, {"clip_agc": 0.02}], ids=["norm", "agc"])
def test_clipping_waits_for_nothing(clip):
    model = with_gradients("test_resnet").cuda()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    clip = gradient_clipping(model, OptimConfig(**clip))
    clip()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("teacher_size", [None, 0, 48])
@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_an_update_waits_for_nothing(digits, tmp_path, model, teacher_size):
    """Without a teacher, with one, and with one that sees images of its own size."""
    world = World(0, 1, 1, torch.device("cuda", 0))
    arguments = [
        "--data.root",
        str(digits),
        "--run.out",
        str(tmp_path),
        "--run.device",
        "cuda",
        "--run.precision",
        "bf16",
        "--data.pipeline",
        "torchvision",
    ]
    if teacher_size is not None:
        torch.save(timm.create_model("test_byobnet", num_classes=10).state_dict(), tmp_path / "teacher.pth")
        arguments += ["--teacher.name", "test_byobnet", "--teacher.checkpoint", str(tmp_path / "teacher.pth")]
        arguments += ["--teacher.image_size", str(teacher_size)]
    run = build(parse([*TINY, *arguments, "--student.name", model, "--optim.clip_norm", "1"]), world)
    batches = first_batches(run, 2)
    run.step(iter(batches[:4]), 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(iter(batches[4:]), 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- BatchNorm over two ranks ---

RANK_SCRIPT = """
import copy
import sys
from pathlib import Path

import torch

from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.cluster.world import join_world
from trainer.update.optimizer import running_statistics
from trainer.run import build


def updates(run, start, stop):
    plans = rank_plans(run.plan, start, stop, run.world, run.state.micro_batch)
    batches = run.pipelines.of["train"].batches(plans)
    for number in range(start, stop):
        run.step(batches, number)
    batches.close()


def state(run):
    student, average = run.state.student, run.state.ema.module
    return {"statistics": running_statistics(student), "average": running_statistics(average),
            "weights": [p.detach() for p in student.parameters()], "local": run.step.local_statistics()}


out, arguments = Path(sys.argv[1]), sys.argv[2:]
with join_world("cpu") as world:
    found = {}
    for mode in ("reduce", "broadcast", "none"):
        run = build(parse([*arguments, "--run.batch_norm", mode]), world)
        updates(run, 0, 1)
        found[mode] = [{name: [t.clone() for t in ts] if ts else ts for name, ts in state(run).items()}]
        # what a checkpoint holds: the states of rank 0, and every rank's statistics
        parts = {"student": run.state.student, "ema": run.state.ema.module, "optimizer": run.state.optimizer}
        saved = copy.deepcopy(world.broadcast_object({name: part.state_dict() for name, part in parts.items()}))
        updates(run, 1, 3)
        resumed = build(parse([*arguments, "--run.batch_norm", mode]), world)
        resumed.state.student.load_state_dict(saved["student"])
        resumed.state.ema.module.load_state_dict(saved["ema"])
        resumed.state.optimizer.load_state_dict(saved["optimizer"])
        if found[mode][0]["local"] is not None:
            resumed.step.set_local_statistics(found[mode][0]["local"])
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


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
    ("mode", "shares"),
    [
        ("reduce", [slice(0, 4), slice(0, 4)]),
        ("broadcast", [slice(0, 2), slice(0, 2)]),
        ("none", [slice(0, 2), slice(2, 4)]),
    ],
)
def test_statistics_after_an_update_are_the_mean_over_these_micro_batches(two_ranks, plain_statistics, mode, shares):
    """Micro-batches 0 and 1 are rank 0's, 2 and 3 rank 1's."""
    for rank, share in zip(two_ranks, shares, strict=True):
        assert close(rank[mode][0]["statistics"], mean(plain_statistics[share]))
    assert not close(mean(plain_statistics[:2]), mean(plain_statistics))


@pytest.mark.parametrize("mode", ["reduce", "broadcast", "none"])
def test_every_mode_resumes_bit_equal_and_keeps_the_weights_of_the_ranks_equal(two_ranks, mode):
    for rank in two_ranks:
        _, whole, resumed = rank[mode]
        for part in ("weights", "statistics", "average"):
            assert equal(whole[part], resumed[part]), part
    first, second = (rank[mode][1] for rank in two_ranks)
    assert equal(first["weights"], second["weights"])
    for part in ("statistics", "average"):
        assert equal(first[part], second[part]) == (mode != "none"), part


def test_only_ranks_that_differ_have_statistics_to_save(two_ranks):
    for mode in ("reduce", "broadcast"):
        assert two_ranks[0][mode][0]["local"] is None
    for rank in two_ranks:
        after = rank["none"][0]
        assert equal(after["local"], [*after["statistics"], *after["average"]])


def test_one_rank_has_nothing_of_its_own_in_any_mode(digits, tmp_path):
    states = []
    for mode in ("reduce", "broadcast", "none", "sync"):
        run = build_here(digits, tmp_path, "--run.batch_norm", mode)
        run.step(iter(first_batches(run, 1)), 0)
        assert run.step.local_statistics() is None
        states.append(list(run.state.student.state_dict().values()))
    assert all(equal(states[0], state) for state in states)


def test_an_average_that_is_switched_on_or_off_later_takes_what_there_is(digits, tmp_path):
    run = build_here(digits, tmp_path)
    student, average = running_statistics(run.state.student), running_statistics(run.state.ema.module)
    given = [torch.rand_like(values) for values in student]
    run.step._local = [*student, *average]  # as with several ranks
    run.step.set_local_statistics(given)
    assert equal(student, given) and equal(average, given)
    other = [torch.rand_like(values) for values in student]
    run.step._local = student
    run.step.set_local_statistics([*other, *given])
    assert equal(student, other) and equal(average, given)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="run.batch_norm: 'mean' is not one of reduce, broadcast, none, sync"):
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
    assert equal(list(model.state_dict().values()), list(plain.state_dict().values()))


# --- the average's warm-up ---


def test_the_decay_is_constant_unless_it_warms_up():
    assert {ema_decay(step, EmaConfig()) for step in range(100)} == {0.99996}
    warm = [ema_decay(step, EmaConfig(decay=0.999, warmup=True)) for step in range(10_000)]
    assert warm[:3] == [1 / 10, 2 / 11, 3 / 12] and warm == sorted(warm)
    assert warm[8989] < 0.999 and set(warm[8990:]) == {0.999}  # (1 + t) / (10 + t) = 0.999 at t = 8990


def test_a_warming_average_is_the_plain_recursion(digits, tmp_path):
    run = build_here(digits, tmp_path, "--ema.decay", 0.3, "--ema.warmup", "true")
    student, average = run.state.student.state_dict(), run.state.ema.module.state_dict()
    expected = {name: value.double().clone() for name, value in student.items() if value.is_floating_point()}
    batches = iter(first_batches(run, 5))
    for number, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        run.step(batches, number)
        for name, value in expected.items():
            expected[name] = decay * value + (1 - decay) * student[name].double()
            assert torch.allclose(average[name].double(), expected[name], rtol=1e-5, atol=1e-6), (number, name)


def test_a_warming_average_resumes_bit_equal_and_is_not_called_slow(digits, tmp_path, capsys):
    arguments = [*TINY, "--data.root", str(digits), "--ema.decay", "0.99996", "--ema.warmup", "true"]
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            train(parse([*arguments, "--run.out", str(tmp_path / name), "--run.stop_after_steps", str(steps)]), ONE)
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000004.pt", weights_only=True)
        for name in ("whole", "stopped")
    )
    assert equal(list(a["ema"].values()), list(b["ema"].values()))
    assert "is slow" not in capsys.readouterr().out


# --- TF32 ---


def tf32_flags() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.fixture
def restored_tf32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("restored_tf32")
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions_so_that_it_can_be_read(allowed):
    """torch.compile reads it, and some ways to set it make that an error."""
    allow_tf32(allowed)
    assert tf32_flags() == [allowed] * 2


def test_tf32_changes_nothing_on_a_cpu(digits, tmp_path):
    before, states = tf32_flags(), []
    for allowed in ("true", "false"):
        run = build_here(digits, tmp_path, "--run.tf32", allowed)
        assert tf32_flags() == before
        run.step(iter(first_batches(run, 1)), 0)
        states.append(list(run.state.student.state_dict().values()))
    assert equal(*states)


# --- resuming under other settings ---


def test_changes_of_these_settings_are_told(digits, tmp_path):
    arguments = [*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]
    train(parse([*arguments, "--run.stop_after_steps", "1"]), ONE)
    changed = {"optim.clip_agc": "0.01", "ema.warmup": "true", "run.batch_norm": "none", "run.tf32": "false"}
    more = [text for key, value in changed.items() for text in (f"--{key}", value)]
    told = "changed since the checkpoint: "
    assert [note.removeprefix(told) for note in build(parse([*arguments, *more]), ONE).notes] == [
        "optim.clip_agc was 0.0, now it is 0.01",
        "ema.warmup was False, now it is True",
        "run.tf32 was True, now it is False",
        "run.batch_norm was reduce, now it is none",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not {"run.tf32", "run.batch_norm"} & {deviation["key"] for deviation in summary["deviations"]}
