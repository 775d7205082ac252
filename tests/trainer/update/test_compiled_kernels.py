"""The Triton kernels' machine code for A100, H100 and B200, without any of them."""

import re
from importlib.metadata import version

import pytest

from support.compiled_kernels import LARGE, TRIED, TRIED_QUICKLY, CompiledKernel, Tried, compiled_kernels, nvidia_tools
from support.processes import REPOSITORY

pytestmark = pytest.mark.skipif(nvidia_tools() is None, reason="needs Triton with its NVIDIA tools")
# What another Triton makes of the same kernels may be as good, and is to be measured first.
measured_triton = pytest.mark.skipif(
    nvidia_tools() is not None and not version("triton").startswith("3.8."), reason="measured with Triton 3.8"
)
MOST_PROGRAMS = 2**31 - 1, 65535, 65535  # CUDA's limits for a grid


@pytest.fixture(scope="module", params=[TRIED_QUICKLY, pytest.param(TRIED, marks=pytest.mark.long)], ids=["two", "all"])
def tried(request) -> Tried:
    """The kernels are compiled for two GPUs, or for all of them, which takes half a minute of one core."""
    return request.param


@pytest.fixture(scope="module")
def kernels(tried) -> list[CompiledKernel]:
    return compiled_kernels(tried)


@pytest.fixture(scope="module")
def exact(kernels) -> list[CompiledKernel]:
    """Those compiled as the project has it."""
    return [kernel for kernel in kernels if not kernel.fused]


def test_every_kernel_of_the_project_is_compiled_for_every_gpu(exact, tried):
    sources = [path.read_text() for folder in ("pipelines", "trainer") for path in (REPOSITORY / folder).rglob("*.py")]
    called = r"(?:^ +|launch\(kernel\.)(\w+)(?=\[\(|, images, out)"
    launched = {name for source in sources for name in re.findall(called, source, re.M)} - {"kernel"}
    assert len(launched) == 4
    gpus = {capability for _, _, capabilities in tried for capability in capabilities}
    assert len(gpus) >= 2
    assert {(each.name, each.capability) for each in exact} == {(name, gpu) for name in launched for gpu in gpus}


def test_no_multiplication_is_fused_with_an_addition(exact):
    """It would be rounded once where torch and PIL round twice, and pixels would differ."""
    assert not [each for each in exact if each.fused_opcodes]
    assert all(each.float_multiplications for each in exact if each.name != "_nothing")


def test_a_compiler_that_may_fuse_them_does(kernels, tried):
    """So the machine code of fused ones is known where it is seen."""
    fused = {(each.name, each.capability): each.fused_opcodes for each in kernels if each.fused}
    launches = sum(len(capabilities) * (2 if "RandAugment" in case else 1) for case, may, capabilities in tried if may)
    assert all(fused.values()) and len(fused) == launches > 2
    assert "DFMA" in fused["augment_affine", 90]  # it computes in float64


def test_no_thread_needs_memory_of_its_own(exact):
    assert {(each.stack, each.local) for each in exact} == {(0, 0)}
    assert not {opcode for each in exact for opcode in each.opcodes if opcode.startswith(("LDL", "STL"))}


def test_the_largest_batches_fit_into_a_grid(exact):
    for each in exact:
        assert all(0 < programs <= most for programs, most in zip(each.grid, MOST_PROGRAMS, strict=True)), each
    pixels, values = 224 * 224 // 256, 224 * 224 * 3 // 1024
    large = {each.name: each.grid for each in exact if "large" in each.case}
    assert LARGE * 224 * 224 * 3 > 2**31
    assert large == {
        "augment": (LARGE * pixels, 1, 1),
        "augment_affine": (LARGE * pixels, 1, 1),
        "_mix_normalize": (LARGE * values, 1, 1),
    }


@measured_triton
def test_registers_leave_room_for_enough_warps(exact):
    """The float64 of affine transforms must not be in the kernel of the other operations: docs/performance.md."""
    most = {"_nothing": 16, "augment": 64, "augment_affine": 136, "_mix_normalize": 80}
    assert not [each for each in exact if each.registers > most[each.name]]


@measured_triton
def test_mixing_reads_each_byte_once_and_writes_each_value_once(exact):
    """8 bytes at a time of an image and of its partner, 8 bfloat16s of each model; images at odd addresses singly."""
    for each in exact:
        stores = {opcode: number for opcode, number in each.opcodes.items() if opcode.startswith("STG")}
        if each.case in ("mixing, of a run", "mixing, large"):
            assert each.opcodes["LDG.E.64"] == 2 and stores == {"STG.E.128": 2}, each
        if each.case == "mixing, three models, unaligned":
            assert each.opcodes["LDG.E.U8"] == 2 * 8 and stores == {"STG.E.U16": 3 * 8}, each
