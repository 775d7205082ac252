"""What is worth doing in the first ten minutes on a GPU, the most important first: `make gpu-first`.

Each part is a process of its own with a time limit, and its outcome is written at once, so one that fails or takes too
long costs the others nothing. The same command later leaves out the parts that are done on this machine with these
sources. This process itself leaves the GPU alone: a GPU in exclusive-process mode would then be closed to the parts.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import read_json, write_synced
from trainer.cluster.code_version import source_hash

SUMMARY, LOG = "gpu-first.json", "gpu-first.log"
DONE = "done"
REPOSITORY = Path(__file__).resolve().parents[3]
_MACHINE = "import json; from tools.lib.common.hardware import machine; print(json.dumps(machine()))"
_TRAIN = "tools/benchmark.py train --models resnet50 --images 1024 --repeats 2 --seconds 1"
# The arguments of python for each part, and the seconds after which it is ended: ten minutes in all.
PARTS = {
    # A GPU on which a kernel has failed fails whatever follows in the same process: three failures are enough.
    "tests": ("-m pytest -m gpu --maxfail 3 --tb short", 140),
    "train": (f"{_TRAIN} --compile no", 90),
    "step": ("tools/benchmark.py step --models resnet50 --compile no --repeats 3 --seconds 0.5", 60),
    # Compiling two models takes minutes, so it comes last.
    "train-compiled": (f"{_TRAIN} --compile yes", 270),
}


def gpu(folder: Path, again: Iterable[str] = (), parts: Mapping[str, tuple[str, float]] = PARTS) -> None:
    """Run the parts that are not done. FOLDER gets each one's outcome, all that they print, and their results.

    Args:
      again: names of parts that are run though they are done.
    Raises:
      UserError: there is no GPU or no such folder, or a part failed; the others have been run.
    """
    if not folder.is_dir():
        raise UserError(f"--out {folder}: no such folder. Make it, or name another")
    here = {"machine": _machine(), "source": source_hash()}
    summary = read_json(folder / SUMMARY)
    outcomes = summary["parts"] if here.items() <= summary.items() else {}

    def note(name: str, outcome: str) -> None:
        outcomes[name] = outcome
        write_synced(folder / SUMMARY, f"{json.dumps({**here, 'parts': outcomes}, indent=1)}\n".encode())

    for name, (arguments, limit_s) in parts.items():
        if outcomes.get(name) == DONE and name not in again:
            print(f"== {name}: done in an earlier call", flush=True)
            continue
        print(f"== {name}, {limit_s:g} s at the most: python {arguments}", flush=True)
        command = [sys.executable, *arguments.split()]
        if "benchmark.py" in arguments:
            result = folder.absolute() / f"benchmark-gpu-{name}.json"
            result.unlink(missing_ok=True)
            command += ["--json", str(result)]
        note(name, "cut off")  # This stays in the summary if this process is killed.
        note(name, _outcome(command, limit_s, folder / LOG))
        print(f"== {name}: {outcomes[name]}", flush=True)
    failed = [f"{name} ({outcomes[name]})" for name in parts if outcomes[name] != DONE]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(parts)} parts are not done: {', '.join(failed)}. {folder / LOG} has their output; "
            "the same command runs these once more"
        )


def _machine() -> dict:
    """What tools.lib.common.hardware.machine returns, found by a process of its own."""
    command = [sys.executable, "-c", _MACHINE]
    try:  # The driver should have answered after a minute.
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    except subprocess.SubprocessError as error:
        raise UserError(f"PyTorch cannot find out which GPU this is: look at the driver ({error})") from error
    found = json.loads(done.stdout.splitlines()[-1])
    if found["gpu"] == "none":
        raise UserError("PyTorch finds no GPU here, so nothing was measured: start this where an NVIDIA GPU is")
    return found


def _outcome(command: list[str], limit_s: float, log: Path) -> str:
    """Run a command, and end it after `limit_s` seconds with all that it has started. What it prints goes to a file."""
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True)
    try:
        code = process.wait(limit_s)
        return f"exit code {code}" if code else DONE
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
