"""One update: what it waits for, and how it is warmed up."""

import pytest
import timm
import torch
from torch import nn

from chaos.runs import equal
from conftest import TINY
from pipelines.common.errors import UserError
from support.tiny_runs import ONE, arguments_for, build_here, first_batches
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.state import checkpoint
from trainer.update.step import gray_batch


@pytest.mark.gpu
def test_a_warm_up_takes_the_memory_of_an_update(digits, tmp_path):
    """Many weights and small images: the gradients of the micro-batches before count as much as what is kept."""
    arguments = ["--student.name", "vit_tiny_patch16_224", "--data.pipeline", "synthetic", "--run.compile", "false"]
    world = World(0, 1, 1, torch.device("cuda", 0))
    run = build(parse(arguments_for(digits, tmp_path, *arguments)), world)
    peaks = []

    def measured(action) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        action()
        peaks.append(torch.cuda.max_memory_allocated())

    measured(lambda: run.step.warm_up(gray_batch(16, 32, 16, world.device)))
    for number in range(2):
        plans = rank_plans(run.plan, number, number + 1, world, 16)
        measured(lambda number=number, plans=plans: run.step(run.pipelines.of["train"].batches(plans), number))
    assert 0.95 < peaks[0] / peaks[2] < 1.5, peaks


def test_a_warm_up_leaves_no_trace(digits, tmp_path):
    run = build(parse(arguments_for(digits, tmp_path, "--student.kwargs.drop_rate", "0.5")), ONE)
    before = checkpoint.content_of(run.state)
    run.step.warm_up(gray_batch(32, 32, 32, ONE.device))
    assert equal(before, checkpoint.content_of(run.state))
    assert all(parameter.grad is None for parameter in run.state.student.parameters())


@pytest.mark.parametrize("norm_layer", ["batchnorm2d", "evonormb0"])
def test_an_update_without_the_input_of_a_later_micro_batch_leaves_no_trace(digits, tmp_path, norm_layer):
    """An EvoNorm has a running variance that is no BatchNorm's. The third of four micro-batches is missing."""
    run = build_here(digits, tmp_path, "--student.kwargs.norm_layer", norm_layer)
    batches = first_batches(run, 2)
    run.step(iter(batches[:4]), 0)
    before = checkpoint.content_of(run.state)

    def failing():
        yield from batches[4:6]
        raise UserError("the input fails")

    with pytest.raises(UserError, match="the input fails"):
        run.step(failing(), 1)
    assert equal(before, checkpoint.content_of(run.state))
    run.step(iter(batches[4:]), 1)
    assert not equal(before["student"], checkpoint.content_of(run.state)["student"])


def gradients(model: nn.Module) -> torch.Tensor:
    """All of them, one after the other, float64."""
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


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


def test_fp16_with_adaptive_clipping_trains(digits, tmp_path):
    """The same images over and over, without augmentation to speak of."""
    plain = ["--augment.randaugment_ops", 0, "--augment.mix_prob", 0, "--augment.crop_area", "[0.9,1.0]"]
    run = build_here(
        digits, tmp_path, "--student.name", "test_vit", "--run.precision", "fp16", "--optim.clip_agc", 0.05, *plain
    )
    batches = first_batches(run, 1)
    losses = [run.step(iter(batches), number).loss.item() for number in range(15)]
    assert losses[-1] < 0.7 * losses[0], losses


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
