"""What is worth doing in the first ten minutes on a GPU, the most important first: `make gpu-first`.

Each part is a process of its own with a time limit, and its outcome is written at once, so one that fails or takes too
long costs the others nothing. The same command later leaves out the parts that are done. A part is done if it succeeded
on this machine with this source, and the file with its result, if it writes one, is complete.

This process itself leaves the GPU alone: a GPU in exclusive-process mode would then be closed to the parts.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from pipelines.common.errors import UserError
from pipelines.common.files import read_json, write_synced
from tools.lib.benchmark.processes import REPOSITORY
from tools.lib.common.hardware import Machine

SUMMARY = "gpu-first.json"
ALL_PARTS_S = 580  # A machine may be limited to ten minutes a command.
GRACE_S = 5  # A process has this long from SIGTERM to SIGKILL.
ALL = "all"  # In place of a part's name it stands for every part.
_SCRIPT = "tools/benchmark.py"  # Every part starts in the repository.
_SOURCE = ("*.py", "*.html", "*.csv", "*.yaml", "*.cfg", "*.toml")
_FOLDERS = ("pipelines", "trainer", "tools", "tests", "configs")
_LINES, _WIDTH = 40, 300  # The summary keeps this many last lines of a part, each cut to this many characters.
_MACHINE = "import json; from tools.lib.common.hardware import machine; print(json.dumps(machine()))"
_MACHINE_S = 60  # The driver should have answered by then.

Outcome = Literal["done", "failed", "timed out", "cut off"]
DONE: Outcome = "done"
FAILED: Outcome = "failed"
TIMED_OUT: Outcome = "timed out"
CUT_OFF: Outcome = "cut off"


class Ended(TypedDict):
    """How a command ended: its outcome, the reason ("" if it succeeded), its seconds, and the last lines it printed."""

    outcome: Outcome
    reason: str
    seconds: float
    end: list[str]


class Record(Ended):
    """A part in the summary; its arguments stand for what was run."""

    arguments: str


class Here(TypedDict):
    """What the outcomes depend on: the machine, and the digest of the source."""

    machine: Machine
    source: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of this Python.

    Attributes:
      name: of the part, and of its result: FOLDER/benchmark-gpu-NAME.json.
      arguments: of python, which starts in the repository's folder.
      limit_s: seconds after which it is ended; the last part also has what the others leave of ALL_PARTS_S.
      has_result: whether it is a benchmark, which writes a result.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    has_result: bool = True

    def result(self, folder: Path) -> Path:
        """Where a benchmark's result goes."""
        return folder.absolute() / f"benchmark-gpu-{self.name}.json"

    def command(self, folder: Path) -> list[str]:
        """The complete command line."""
        return [sys.executable, *self.arguments, *(["--json", str(self.result(folder))] if self.has_result else [])]


def _benchmark(name: str, options: str, limit_s: float, benchmark: str = "") -> Part:
    return Part(name, (_SCRIPT, benchmark or name, *options.split()), limit_s)


_SHORT = "--models resnet50 --images 1024 --repeats 2 --seconds 1"
PARTS = (  # Compiling two models takes minutes, so it comes last, and only once.
    # A GPU on which a kernel has failed fails whatever follows in the same process: three failures are enough.
    Part("tests", ("-m", "pytest", "-m", "gpu", "--maxfail", "3", "--tb", "short"), 140, has_result=False),
    _benchmark("decode", "--images 512 --repeats 2", 60),
    _benchmark("train", f"{_SHORT} --compile no", 75),
    _benchmark("teacher", "--images 512 --repeats 3 --seconds 0.5", 45),
    _benchmark("resume", "--repeats 1 --compile no", 70),
    _benchmark("step", "--models resnet50 --compile no --repeats 3 --seconds 0.5", 45),
    _benchmark("train-compiled", f"{_SHORT} --compile yes", 105, "train"),
)


def gpu(folder: Path, again: Iterable[str] = (), parts: Sequence[Part] = PARTS) -> None:
    """Run the parts that are not done. FOLDER/gpu-first.json lists the outcome of each part.

    Args:
      again: names of parts that are run though they are done; ALL stands for every one.
    Raises:
      UserError: there is no GPU or no such folder, or a part failed; the others have been run.
    """
    if not folder.is_dir():
        raise UserError(f"--out {folder}: no such folder. Make it, or name another")
    found = _machine()
    if found["gpu"] == "none":
        raise UserError(
            "PyTorch finds no GPU here, so nothing was measured: start this on a machine with an NVIDIA GPU"
        )
    run_parts(folder, parts, {"machine": found, "source": source_digest()}, again)


def run_parts(folder: Path, parts: Sequence[Part], here: Here, again: Iterable[str] = ()) -> None:
    """Do what `gpu` does, with or without a GPU."""
    before = read_json(folder / SUMMARY)
    records = before.get("parts", {}) if all(before.get(name) == value for name, value in here.items()) else {}
    end_s = time.monotonic() + ALL_PARTS_S
    for part in parts:
        if not {part.name, ALL} & set(again) and is_done(part, records.get(part.name), folder, here):
            print(f"== {part.name}: done in an earlier call", flush=True)
            continue
        if part.has_result:
            part.result(folder).unlink(missing_ok=True)
        left_s = int(end_s - time.monotonic() - GRACE_S) if part is parts[-1] else 0
        limit_s = max(part.limit_s, left_s)
        arguments = " ".join(part.arguments)
        print(f"== {part.name}, {limit_s:g} s at the most: python {arguments}", flush=True)
        # This stays in the summary if this process is killed.
        records[part.name] = {"outcome": CUT_OFF, "arguments": arguments}
        _write(folder, here, parts, records)
        ended = ended_command(part.command(folder), limit_s)
        records[part.name] |= ended
        _write(folder, here, parts, records)
        why = f" ({ended['reason']})" if ended["reason"] else ""
        print(f"== {part.name}: {ended['outcome']}{why} after {ended['seconds']:.0f} s", flush=True)
    failed = [f"{part.name} ({records[part.name]['reason']})" for part in parts if not _succeeded(records, part)]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(parts)} parts are not done: {', '.join(failed)}. Their output stands above, its "
            f"end in {folder / SUMMARY}; the same command runs these once more"
        )


def _succeeded(records: Mapping[str, Record], part: Part) -> bool:
    return records[part.name]["outcome"] == DONE


def is_done(part: Part, record: Record | None, folder: Path, here: Here) -> bool:
    """Whether a part is done by its record, of this machine and source, and by its result."""
    if not record or record["outcome"] != DONE or record["arguments"] != " ".join(part.arguments):
        return False
    if not part.has_result:
        return True
    result = read_json(part.result(folder))
    return result.get("complete") is True and result.get("machine") == here["machine"]


def source_digest() -> str:
    """SHA-256 of the names and contents of all files that decide what the parts do."""
    paths = [path for folder in _FOLDERS for pattern in _SOURCE for path in (REPOSITORY / folder).rglob(pattern)]
    digest = hashlib.sha256()
    for path in sorted([*paths, *(path for pattern in _SOURCE for path in REPOSITORY.glob(pattern))]):
        digest.update(f"{path.relative_to(REPOSITORY)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _machine() -> Machine:
    """What tools.lib.common.hardware.machine returns, found by a process of its own."""
    command = [sys.executable, "-c", _MACHINE]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=_MACHINE_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"PyTorch has not found out in {_MACHINE_S} s which GPU this is: look at the driver") from error
    if done.returncode:
        last_line = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"PyTorch cannot find out which GPU this is ({last_line}): look at the driver")
    return json.loads(done.stdout.splitlines()[-1])


def _write(folder: Path, here: Here, parts: Sequence[Part], records: Mapping[str, Record]) -> None:
    ordered = {part.name: records[part.name] for part in parts if part.name in records}
    content = json.dumps({**here, "parts": ordered}, indent=1, ensure_ascii=False)
    write_synced(folder / SUMMARY, f"{content}\n".encode())


def ended_command(command: Sequence[str], limit_s: float) -> Ended:
    """Run a command and show what it prints; end it, and all that it has started, after `limit_s` seconds."""
    start_s = time.monotonic()
    lines: collections.deque[str] = collections.deque(maxlen=_LINES)
    with tempfile.TemporaryDirectory() as scratch:  # It removes what a process leaves there when it is ended.
        # This cache outlasts the scratch folder, so that a part that runs again compiles less.
        cache = Path.home() / ".cache" / "torchinductor"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), **os.environ, "TMPDIR": scratch, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_show, args=(process, lines), daemon=True)
        reader.start()
        try:
            code = process.wait(limit_s)
            outcome, reason = (FAILED, _reason(code)) if code else (DONE, "")
        except subprocess.TimeoutExpired:
            outcome, reason = TIMED_OUT, f"not done after {limit_s:g} s"
        finally:
            _end_session(process)
        reader.join(GRACE_S)  # A process of another session may still hold the pipe.
    return {"outcome": outcome, "reason": reason, "seconds": round(time.monotonic() - start_s, 1), "end": list(lines)}


def _show(process: subprocess.Popen[str], lines: collections.deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip()[:_WIDTH])


def _reason(code: int) -> str:
    return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end_session(process: subprocess.Popen[str]) -> None:
    """End a process and what it has left running, which would disturb the next one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
