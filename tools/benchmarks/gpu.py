"""The benchmarks that a GPU needs, one after the other, in less than ten minutes: `make gpu-benchmark`.

Each is a process of its own with a limit, and writes its rows as they come: one that fails, or takes too long, costs
the others nothing.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import UserError
from tools.opening import first_device

_SCRIPT = Path(__file__).resolve().parents[1] / "benchmark.py"
GRACE_S = 5  # from SIGTERM to SIGKILL


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of tools/benchmark.py.

    Attributes:
      name: its subcommand.
      arguments: its options.
      limit_s: seconds after which it is ended.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float


PARTS = (  # 580 s at the most, with those to end them
    Part("read", ("--images", "512", "--repeats", "3"), 20),
    Part("loader", ("--images", "1024", "--batch", "64", "--repeats", "2"), 80),
    Part("step", ("--repeats", "3", "--seconds", "0.5"), 230),
    Part("train", ("--images", "2048", "--repeats", "3", "--seconds", "0.5"), 85),
    Part("resume", ("--repeats", "1"), 140),
)


def gpu(folder: Path, parts: Sequence[Part] = PARTS) -> None:
    """Run the parts; each writes FOLDER/benchmark-gpu-NAME.json and prints its tables.

    Raises:
      UserError: there is no GPU, or a part failed; the others have been run.
    """
    if first_device().type != "cuda":
        raise UserError(
            "PyTorch finds no GPU here, so nothing was measured: start this on a machine with an NVIDIA GPU"
        )
    run_parts(folder, parts)


def run_parts(folder: Path, parts: Sequence[Part]) -> None:
    """As `gpu`, wherever it is."""
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        for part in parts:
            path = folder / f"benchmark-gpu-{part.name}.json"
            path.unlink(missing_ok=True)  # of another day
            print(f"== {part.name} {' '.join(part.arguments)}", flush=True)
            start_s = time.monotonic()
            command = [sys.executable, str(_SCRIPT), part.name, *part.arguments, "--json", str(path)]
            reason = _reason(command, part.limit_s, cache)
            print(f"== {part.name}: {reason or 'done'} after {time.monotonic() - start_s:.0f} s", flush=True)
            failed += [f"{part.name} ({reason})"] if reason else []
    if failed:
        raise UserError(
            f"{len(failed)} of {len(parts)} benchmarks failed: {', '.join(failed)}. What they said stands above; rows "
            f"that were measured are in {folder}"
        )


def _reason(command: list[str], limit_s: float, cache: str) -> str:
    """Run a command with all that it starts; why it failed, "" if it did not.

    Args:
      cache: folder for what torch.compile makes: one part compiles what another one needs, too.
    """
    with tempfile.TemporaryDirectory() as scratch:  # what a process leaves there when it is ended goes with it
        environment = {**os.environ, "TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": cache}
        process = subprocess.Popen(command, start_new_session=True, env=environment)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"not done after {limit_s:g} s"
        finally:  # what it left running would disturb the next one
            _end(process)
    return f"exit code {code}" if code else ""


def _end(process: subprocess.Popen) -> None:
    """End a process's whole session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
