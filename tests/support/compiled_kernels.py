"""The project's Triton kernels as machine code for GPUs that are not there.

The kernels are launched by the project's own `launch` functions, on a driver that runs nothing, and what they compile
to is disassembled with the tools that Triton brings along. Triton keeps a driver, and what was compiled for it, until
its process ends; so this file is also the script that `compiled_kernels` runs.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from pipelines.batch import Batch
from support.forked_python import executable
from support.processes import REPOSITORY

CAPABILITIES = 80, 90, 100  # A100, H100 and H200, B200
LARGE = 16384  # images of 224 px have more than 2**31 values: more than any run's batch
# A case of `launches`, whether multiplications and additions may be fused, and for which GPUs it is compiled. Not all
# for all, since each takes a second or two.
TRIED = (
    ("a probe", False, CAPABILITIES),
    ("RandAugment, of a run", False, (90, 100)),
    ("RandAugment, large", False, (90, 100)),
    ("RandAugment, unaligned", False, (80,)),
    ("RandAugment, of a run", True, (90,)),
    ("mixing, of a run", False, CAPABILITIES),
    ("mixing, large", False, CAPABILITIES),
    ("mixing, three models, unaligned", False, CAPABILITIES),
    ("mixing, no teacher", False, CAPABILITIES),
    ("mixing, of a run", True, CAPABILITIES),
)
# Every kernel for two GPUs, and every case for one of them.
TRIED_QUICKLY = (
    ("a probe", False, (80, 90)),
    ("RandAugment, large", False, (90,)),
    ("RandAugment, unaligned", False, (80,)),
    ("RandAugment, of a run", True, (90,)),
    ("mixing, of a run", False, (90,)),
    ("mixing, large", False, (80,)),
    ("mixing, three models, unaligned", False, (90,)),
    ("mixing, no teacher", False, (80,)),
    ("mixing, of a run", True, (80,)),
)
Tried = Sequence[tuple[str, bool, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One launch of a kernel.

    Attributes:
      capability: the GPU's compute capability, 80 is 8.0.
      case: the name of a launch in `launches`.
      name: the kernel's.
      fused: whether the compiler was allowed to fuse multiplications and additions.
      grid: the number of programs in each of three directions.
      warps: how many warps of 32 threads a program has.
      registers, stack, local: what a thread takes; the last two are memory, in bytes.
      opcodes: how often each occurs in the machine code, with its modifiers: {"LDG.E.64": 2, ...}.
    """

    capability: int
    case: str
    name: str
    fused: bool
    grid: tuple[int, int, int]
    warps: int
    registers: int
    stack: int
    local: int
    opcodes: dict[str, int]

    @property
    def fused_opcodes(self) -> set[str]:
        """The opcodes that multiply and add floating point numbers at once: FFMA, FFMA2, DFMA, HFMA2 and their like."""
        return {opcode for opcode in self.opcodes if re.match("[A-Z]FMA", opcode)}

    @property
    def float_multiplications(self) -> int:
        """How many instructions multiply floating point numbers and do nothing else: FMUL, FMUL2, DMUL, HMUL2."""
        return sum(number for opcode, number in self.opcodes.items() if re.match("[A-Z]MUL", opcode))


def compiled_kernels(tried: Tried) -> list[CompiledKernel]:
    """The kernels of these cases, compiled in a process and a cache of their own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests", "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        command = [executable(), __file__, json.dumps(tried)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [CompiledKernel(**fields | {"grid": tuple(fields["grid"])}) for fields in json.loads(done.stdout)]


def nvidia_tools() -> Path | None:
    """The folder of NVIDIA's tools that Triton brings along; None where one of them is missing."""
    with contextlib.suppress(ImportError):
        import triton.backends.nvidia

        folder = Path(triton.backends.nvidia.__file__).parent / "bin"
        if all((folder / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")):
            return folder
    return None


def launches() -> dict[str, Callable[[], None]]:
    """Return the launches by their names. Their tensors have no memory; addresses begin at 0."""
    from pipelines.ops.triton_ops import launch_nothing

    def randaugment(batch: int, size: int) -> Callable[[], None]:
        return functools.partial(launch_randaugment, images(batch, size))

    def mixing(batch: int, size: int, models: int, dtype: torch.dtype, mix_group: int) -> Callable[[], None]:
        return functools.partial(launch_mixing, images(batch, size), models, dtype, mix_group)

    return {
        "a probe": launch_nothing,
        "RandAugment, of a run": randaugment(128, 224),
        "RandAugment, large": randaugment(LARGE, 224),
        "RandAugment, unaligned": randaugment(8, 97),
        "mixing, of a run": mixing(128, 224, 2, torch.bfloat16, 128),
        "mixing, large": mixing(LARGE, 224, 2, torch.bfloat16, 128),
        "mixing, three models, unaligned": mixing(96, 97, 3, torch.float16, 24),
        "mixing, no teacher": mixing(128, 224, 1, torch.float32, 0),
    }


def images(number: int, size: int) -> torch.Tensor:
    """uint8 [number, size, size, 3]; of an odd size they begin at address 1, as a slice of a batch may."""
    start = size % 2
    memory = torch.empty(start + number * size * size * 3, dtype=torch.uint8, device="meta")
    return memory[start:].view(number, size, size, 3)


def launch_randaugment(pixels: torch.Tensor) -> None:
    from pipelines.ops.triton_ops import augment, augment_affine, launch

    empty, rows, out = functools.partial(torch.empty, device="meta"), len(pixels), torch.empty_like(pixels)
    tables = empty(rows, 3, 256, dtype=torch.uint8)
    launch(augment, pixels, out, empty(rows, dtype=torch.int32), empty(rows), tables)
    chosen, matrices = empty(rows, dtype=torch.int32), empty(rows, 6, dtype=torch.float64)
    launch(augment_affine, pixels, out, chosen, matrices, empty(3, dtype=torch.uint8))


def launch_mixing(pixels: torch.Tensor, models: int, dtype: torch.dtype, mix_group: int) -> None:
    from trainer.update.mixing_triton import launch

    empty, rows = functools.partial(torch.empty, device="meta"), len(pixels)
    batch = Batch(
        images=pixels,
        labels=empty(rows, dtype=torch.int64),
        lam=empty(rows),
        box=empty(rows, 4, dtype=torch.int32),
        valid=empty(rows, dtype=torch.bool),
        position=0,
        mix_group=mix_group,
    )
    outs = [torch.empty_like(pixels, dtype=dtype) for _ in range(models)]
    launch(batch, outs, empty(models, 3), empty(models, 3))


class RecordingDriver:
    """Answers what Triton asks a CUDA driver, without a device, and records the launches.

    Attributes:
      launches: the metadata of each launched kernel, its grid and its cubin.
    """

    def __init__(self, capability: int):
        self.launches = []
        self._capability = capability
        self._cubin = b""

    @property
    def utils(self) -> "RecordingDriver":
        return self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 48 * 1024}  # Every GPU has this much for a program.

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self._cubin = cubin
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source, metadata) -> Callable:
        return lambda *arguments: self.launches.append((metadata, arguments[:3], self._cubin))


@contextlib.contextmanager
def without_device(capability: int, fused: bool) -> Iterator[RecordingDriver]:
    """Inside, kernels are compiled for a compute capability and recorded; `fused` overrules their enable_fp_fusion."""
    from triton.runtime import JITFunction, driver

    run, zeros, recording = JITFunction.run, torch.zeros, RecordingDriver(capability)

    def compiled_again(kernel, *arguments, **options):
        kernel.device_caches.clear()  # They hold what was compiled for another driver.
        return run(kernel, *arguments, **(options | {"enable_fp_fusion": True} if fused else options))

    driver.set_active(recording)
    with (
        mock.patch.object(JITFunction, "run", compiled_again),
        mock.patch.object(torch, "zeros", lambda *size, device: zeros(*size, device="meta")),  # the probe's
    ):
        yield recording


def record(tried: Tried) -> list[dict]:
    """The fields of every CompiledKernel of these cases."""
    found, machine_code, launch = [], {}, launches()
    with ThreadPoolExecutor() as pool:  # a disassembler takes a third of a second to start
        for case, fused, capabilities in tried:
            for capability in capabilities:
                with without_device(capability, fused) as driver:
                    launch[case]()
                for metadata, grid, cubin in driver.launches:
                    if cubin not in machine_code:
                        machine_code[cubin] = pool.submit(disassemble, cubin)
                    about = dict(capability=capability, case=case, name=metadata.name, fused=fused, grid=grid)
                    found.append((about | {"warps": metadata.num_warps}, machine_code[cubin]))
        return [about | code.result() for about, code in found]


def disassemble(cubin: bytes) -> dict:
    """Return the fields of a CompiledKernel that can be read in its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = _output(nvidia_tools() / "nvdisasm", "--no-dataflow", "--print-code", file.name)
        used = _output(nvidia_tools() / "cuobjdump", "--dump-resource-usage", file.name)
    opcodes = collections.Counter()
    # a line is: /*0040*/ @!P0 HFMA2.MMA R5, -RZ, RZ, 0, 0 ;
    for opcode, operands in re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)(.*?);", code):
        if not (opcode.startswith("HFMA2") and "-RZ, RZ," in operands):  # so ptxas loads constants: 0 x 0 + constant
            opcodes[opcode] += 1
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", used)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "stack": stack, "local": local, "opcodes": opcodes}


def _output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps(record(json.loads(sys.argv[1]))))
