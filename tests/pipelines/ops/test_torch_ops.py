"""The operations on a batch of pixels give PIL's pixels, in torch and in the Triton kernel."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.ops.torch_ops import apply_ops, erase, kernel_error
from pipelines.plan.draws import NUM_OPS, AugmentConfig, Op, randaugment, randaugment_draws
from support.processes import REPOSITORY, interpreted
from tools.lib.common.photos import photographs

FILL = (124, 116, 104)
FACTORS = (0.0, 0.1, 0.37, 1.0, 1.63, 1.9, 3.0)
SHEARS = (-0.3, -0.21, 0.0, 0.217, 1.5)
FRACTIONS = (-0.45, -0.3125, 0.0, 0.25, 0.315, 2.0)
# These are values that the recipe draws, and the ends beyond them.
ARGUMENTS = {
    Op.AUTO_CONTRAST: (0.0,),
    Op.EQUALIZE: (0.0,),
    Op.INVERT: (0.0,),
    Op.ROTATE: (-30.0, -21.25, -1e-3, 0.0, 13.77, 45.0, 90.0, 180.0, 270.0),
    Op.POSTERIZE: (0, 1, 2, 4, 8),
    Op.SOLARIZE: (0, 1, 77, 255, 256),
    Op.SOLARIZE_ADD: (0, 1, 77, 110, 128),
    Op.COLOR: FACTORS,
    Op.CONTRAST: FACTORS,
    Op.BRIGHTNESS: FACTORS,
    Op.SHARPNESS: FACTORS,
    Op.SHEAR_X: SHEARS,
    Op.SHEAR_Y: SHEARS,
    Op.TRANSLATE_X: FRACTIONS,
    Op.TRANSLATE_Y: FRACTIONS,
    Op.GAUSSIAN_BLUR: (0.0, 0.1, 0.5, 1.37, 2.0, 5.5),
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def pictures(size: int) -> torch.Tensor:
    """uint8 [8, size, size, 3]: photographs, one colour, few values, noise, a ramp."""
    chosen = {"usual", "flower", "tall", "gray"}
    pixels = [
        np.asarray(image.convert("RGB").resize((size, size))) for name, image, _ in photographs() if name in chosen
    ]
    generator = np.random.default_rng(size)
    one_colour = np.broadcast_to(np.array([0, 128, 255]), (size, size, 3))
    few = generator.integers(100, 103, (size, size, 3))
    noise = generator.integers(0, 256, (size, size, 3))
    ramp = np.arange(size * size * 3).reshape(size, size, 3) // 7 % 256
    return torch.from_numpy(np.stack([*pixels, *(x.astype(np.uint8) for x in (one_colour, few, noise, ramp))]))


def with_pil(images: torch.Tensor, ops: np.ndarray, args: np.ndarray) -> torch.Tensor:
    from pipelines.ops.pil_ops import (
        apply_op,
    )  # not above: it imports timm, which the interpreted kernel's script does without

    out = []
    for pixels, row_ops, row_args in zip(images.numpy(), ops.tolist(), args.tolist(), strict=True):
        image = Image.fromarray(pixels)
        for op, arg in zip(row_ops, row_args, strict=True):
            image = apply_op(image, Op(op), arg, FILL)
        out.append(np.asarray(image))
    return torch.from_numpy(np.stack(out))


def column(value: float, rows: int, dtype: type) -> np.ndarray:
    return np.full((rows, 1), value, dtype=dtype)


def every_op(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """[17, layers] each: every operation, and none, in each layer."""
    generator = np.random.default_rng(0)
    ops = np.stack([np.roll(np.arange(len(Op)), 5 * layer) for layer in range(layers)], axis=1).astype(np.uint8)
    args = [[generator.choice(ARGUMENTS.get(Op(op), (0.0,))) for op in row] for row in ops.tolist()]
    return ops, np.array(args, dtype=np.float32)


def every_op_on_pictures(size: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    ops, args = every_op(layers=2)
    return pictures(size).repeat(3, 1, 1, 1)[: len(ops)], ops, args


# --- against PIL: no pixel differs ---


@pytest.mark.parametrize("op", ARGUMENTS, ids=[op.name for op in ARGUMENTS])
def test_each_operation_gives_pils_pixels(op):
    for size in (64, 97):
        images = pictures(size)
        for arg in ARGUMENTS[op]:
            ops, args = column(op, len(images), np.uint8), column(arg, len(images), np.float32)
            ours, pils = apply_ops(images, ops, args, FILL), with_pil(images, ops, args)
            assert torch.equal(ours, pils), (size, arg, (ours.int() - pils.int()).abs().flatten(1).amax(1))


def test_every_operation_is_tested():
    assert set(ARGUMENTS) == set(Op) - {Op.NONE}


def test_the_recipes_draws_give_pils_pixels_at_full_size():
    config = AugmentConfig()
    ops, args = randaugment(np.random.default_rng(0).random((64, randaugment_draws(config))), config)
    assert len(np.unique(ops)) == 1 + NUM_OPS and (ops > 0).all(1).any()
    images = pictures(224).repeat(8, 1, 1, 1)
    assert torch.equal(apply_ops(images, ops, args, FILL), with_pil(images, ops, args))


def test_columns_are_applied_from_left_to_right():
    images, ops, args = every_op_on_pictures(33)
    assert torch.equal(apply_ops(images, ops, args, FILL), with_pil(images, ops, args))
    assert not torch.equal(apply_ops(images, ops, args, FILL), apply_ops(images, ops[:, ::-1], args[:, ::-1], FILL))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_images_are_pils_too(size):
    images = pictures(8)[:, :size, :size]  # not contiguous
    for op in ARGUMENTS:
        ops, args = column(op, len(images), np.uint8), column(ARGUMENTS[op][-1], len(images), np.float32)
        assert torch.equal(apply_ops(images, ops, args, FILL), with_pil(images.contiguous(), ops, args)), op.name


# --- a row is a pure function of its pixels, operations and arguments ---


def test_a_row_does_not_depend_on_the_others():
    images, ops, args = every_op_on_pictures(33)
    together = apply_ops(images, ops, args, FILL)
    for row in range(len(images)):
        one = slice(row, row + 1)
        assert torch.equal(apply_ops(images[one], ops[one], args[one], FILL), together[one])


def test_blurs_of_different_radius_are_done_in_one_batch():
    images = pictures(64)[:4]
    ops = column(Op.GAUSSIAN_BLUR, 4, np.uint8)
    args = np.array([[0.1], [7.0], [0.0], [2.0]], dtype=np.float32)
    assert torch.equal(apply_ops(images, ops, args, FILL), with_pil(images, ops, args))


def test_the_input_is_left_as_it_is():
    images, ops, args = every_op_on_pictures(33)
    before = images.clone()
    out = apply_ops(images, ops, args, FILL)
    untouched = apply_ops(images, np.zeros_like(ops), args, FILL)
    assert torch.equal(images, before) and torch.equal(untouched, before)
    assert out.data_ptr() != images.data_ptr() != untouched.data_ptr()
    both_none = (ops == Op.NONE).all(1)
    assert torch.equal(out[both_none], images[both_none])


def test_no_operations_and_no_images_are_no_special_case():
    images = pictures(8)
    assert torch.equal(apply_ops(images, np.zeros((8, 0), np.uint8), np.zeros((8, 0), np.float32), FILL), images)
    assert len(apply_ops(images[:0], np.zeros((0, 2), np.uint8), np.zeros((0, 2), np.float32), FILL)) == 0


# --- erasing ---


def test_erase_fills_the_box_and_nothing_else():
    images = pictures(16)[:4]
    before = images.clone()
    boxes = np.array([[2, 3, 5, 7], [0, 0, 0, 0], [0, 0, 16, 16], [4, 4, 0, 9]], dtype=np.int32)
    expected = images.clone()
    expected[0, 2:7, 3:10] = torch.tensor(FILL, dtype=torch.uint8)
    expected[2] = torch.tensor(FILL, dtype=torch.uint8)
    assert torch.equal(erase(images, boxes, FILL), expected)
    assert torch.equal(images, before)


# --- the Triton kernel ---


def assert_kernel_equals_torch(device: str, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        images, ops, args = every_op_on_pictures(size)
        images = images.to(device)
        before = images.clone()
        ours = apply_ops(images, ops, args, FILL, kernel=True)
        assert torch.equal(ours, apply_ops(images, ops, args, FILL, kernel=False)), size
        assert torch.equal(images, before)


@needs_triton
def test_the_interpreted_kernel_equals_torch():
    script = "from test_torch_ops import assert_kernel_equals_torch as check; check('cpu', (2, 17)); print('equal')"
    assert interpreted(script, Path(__file__).parent) == "equal\n"


@needs_triton
def test_what_keeps_the_kernel_from_running_is_known_without_running_it():
    """Without a GPU it is the driver that is missing; nothing is raised, so torch can take its place."""
    assert (kernel_error() == "") == torch.cuda.is_available(), kernel_error()


@pytest.mark.gpu
@needs_triton
def test_without_a_c_compiler_torch_takes_the_kernels_place(tmp_path):
    script = """
import numpy as np, torch
from pipelines.ops.torch_ops import apply_ops, kernel_error
assert kernel_error(), "the kernel runs"
images = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8, device="cuda").view(2, 8, 8, 3)
operations = np.full((2, 1), 3, np.uint8), np.zeros((2, 1), np.float32), (1, 2, 3)
assert torch.equal(apply_ops(images, *operations), apply_ops(images, *operations, kernel=False))
"""
    without = {**os.environ, "CC": "/no/such/compiler", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=without, cwd=REPOSITORY, check=True)


@pytest.mark.gpu
@needs_triton
def test_the_kernel_equals_torch_on_the_gpu():
    assert_kernel_equals_torch("cuda", (2, 21, 97, 224))


@pytest.mark.gpu
def test_torch_gives_the_same_pixels_on_the_gpu_and_the_cpu():
    images, ops, args = every_op_on_pictures(97)
    on_gpu = apply_ops(images.cuda(), ops, args, FILL, kernel=False).cpu()
    assert torch.equal(on_gpu, apply_ops(images, ops, args, FILL))
    boxes = np.tile(np.array([2, 3, 5, 7], dtype=np.int32), (len(images), 1))
    assert torch.equal(erase(images.cuda(), boxes, FILL).cpu(), erase(images, boxes, FILL))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_nothing_waits_for_the_gpu(kernel):
    images, ops, args = every_op_on_pictures(33)
    images = images.cuda()
    apply_ops(images, ops, args, FILL, kernel=kernel)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = apply_ops(images, ops, args, FILL, kernel=kernel)
        erase(out, np.zeros((len(out), 4), dtype=np.int32), FILL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
