"""What is worth doing in the first ten minutes on a GPU, the most important first: `make gpu-first`.

Each part is a process of its own with a time limit, and its outcome is written at once, so one that fails or takes too
long costs the others nothing. The same command later leaves out the parts that are done. A part is done if it ended
well on this machine with this source, and the file with its result, if it writes one, is complete.

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
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import read_json, write_synced
from tools.lib.benchmark.processes import REPOSITORY

SUMMARY = "gpu-first.json"
WHOLE_S = 580  # of all parts: a machine's limit may be ten minutes a command
GRACE_S = 5  # from SIGTERM to SIGKILL
_SCRIPT = "tools/benchmark.py"  # in the repository, where every part starts
_SOURCE = ("*.py", "*.html", "*.csv", "*.yaml", "*.cfg", "*.toml")
_FOLDERS = ("pipelines", "trainer", "tools", "tests", "configs")
_LINES, _WIDTH = 40, 300  # of what a part printed at its end, and of each of its lines, in the summary
_MACHINE = "import json; from tools.lib.common.timing import machine; print(json.dumps(machine()))"
_MACHINE_S = 60  # in which the driver should have answered
ALL = "all"  # in place of a part's name
DONE, FAILED, TIMED_OUT, CUT_OFF = "done", "failed", "timed out", "cut off"


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of this Python.

    Attributes:
      name: of the part, and of its result: FOLDER/benchmark-gpu-NAME.json.
      arguments: of python, which starts in the repository's folder.
      limit_s: seconds after which it is ended; the last part has what the others leave of WHOLE_S besides.
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
        """All of it."""
        return [sys.executable, *self.arguments, *(["--json", str(self.result(folder))] if self.has_result else [])]


def _benchmark(name: str, options: str, limit_s: float, benchmark: str = "") -> Part:
    return Part(name, (_SCRIPT, benchmark or name, *options.split()), limit_s)


_SHORT = "--models resnet50 --images 1024 --repeats 2 --seconds 1"
PARTS = (  # compiling two models takes minutes, so it comes last, and only once
    # After three failures no more: a GPU on which a kernel has failed fails whatever follows in the same process.
    Part("tests", ("-m", "pytest", "-m", "gpu", "--maxfail", "3", "--tb", "short"), 140, has_result=False),
    _benchmark("decode", "--images 512 --repeats 2", 60),
    _benchmark("train", f"{_SHORT} --compile no", 75),
    _benchmark("teacher", "--images 512 --repeats 3 --seconds 0.5", 45),
    _benchmark("resume", "--repeats 1 --compile no", 70),
    _benchmark("step", "--models resnet50 --compile no --repeats 3 --seconds 0.5", 45),
    _benchmark("train-compiled", f"{_SHORT} --compile yes", 105, "train"),
)


def gpu(folder: Path, again: Iterable[str] = (), parts: Sequence[Part] = PARTS) -> None:
    """Run the parts that are not done. FOLDER/gpu-first.json says part by part how it went.

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


def run_parts(folder: Path, parts: Sequence[Part], here: dict, again: Iterable[str] = ()) -> None:
    """As `gpu`, wherever it is.

    Args:
      here: "machine" and "source", on which the outcomes depend.
    """
    before = read_json(folder / SUMMARY)
    records = before.get("parts", {}) if all(before.get(name) == value for name, value in here.items()) else {}
    end_s = time.monotonic() + WHOLE_S
    for part in parts:
        if not {part.name, ALL} & set(again) and is_done(part, records.get(part.name), folder, here):
            print(f"== {part.name}: is done, from an earlier call", flush=True)
            continue
        if part.has_result:
            part.result(folder).unlink(missing_ok=True)  # of another day
        said = " ".join(part.arguments)
        left_s = int(end_s - time.monotonic() - GRACE_S) if part is parts[-1] else 0
        limit_s = max(part.limit_s, left_s)
        print(f"== {part.name}, {limit_s:g} s at the most: python {said}", flush=True)
        records[part.name] = {"outcome": CUT_OFF, "arguments": said}  # what stands there if this process is killed
        _write(folder, here, parts, records)
        records[part.name] |= outcome_of(part.command(folder), limit_s)
        _write(folder, here, parts, records)
        print(f"== {part.name}: {_in_words(records[part.name])}", flush=True)
    failed = [
        f"{part.name} ({records[part.name]['reason']})" for part in parts if records[part.name]["outcome"] != DONE
    ]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(parts)} parts are not done: {', '.join(failed)}. What they said stands above, its "
            f"end in {folder / SUMMARY}; the same command runs these once more"
        )


def is_done(part: Part, record: dict | None, folder: Path, here: dict) -> bool:
    """Whether a part's outcome, its record in the summary of this machine and source, need not be had again."""
    if not record or record["outcome"] != DONE or record["arguments"] != " ".join(part.arguments):
        return False
    result = read_json(part.result(folder)) if part.has_result else {"complete": True, "machine": here["machine"]}
    return result.get("complete") is True and result.get("machine") == here["machine"]


def source_digest() -> str:
    """SHA-256 of the names and contents of all that decides what the parts do."""
    paths = [path for folder in _FOLDERS for pattern in _SOURCE for path in (REPOSITORY / folder).rglob(pattern)]
    digest = hashlib.sha256()
    for path in sorted([*paths, *(path for pattern in _SOURCE for path in REPOSITORY.glob(pattern))]):
        digest.update(f"{path.relative_to(REPOSITORY)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _machine() -> dict:
    """What tools.lib.common.timing.machine says, in a process of its own."""
    command = [sys.executable, "-c", _MACHINE]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=_MACHINE_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"PyTorch has not found out in {_MACHINE_S} s which GPU this is: look at the driver") from error
    if done.returncode:
        last_words = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"PyTorch cannot tell which GPU this is ({last_words}): look at the driver")
    return json.loads(done.stdout.splitlines()[-1])


def _write(folder: Path, here: dict, parts: Sequence[Part], records: dict) -> None:
    ordered = {part.name: records[part.name] for part in parts if part.name in records}
    write_synced(
        folder / SUMMARY, (json.dumps({**here, "parts": ordered}, indent=1, ensure_ascii=False) + "\n").encode()
    )


def _in_words(record: dict) -> str:
    why = f" ({record['reason']})" if record["reason"] else ""
    return f"{record['outcome']}{why} after {record['seconds']:.0f} s"


def outcome_of(command: list[str], limit_s: float) -> dict:
    """Run a command with all that it starts, and show what it prints.

    Returns:
      "outcome", "reason" ("" if it ended well), "seconds", and "end", the last lines that it printed.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:  # what a process leaves there when it is ended goes with it
        cache = Path.home() / ".cache" / "torchinductor"  # but not this: a part that runs again compiles less
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
        lines: collections.deque[str] = collections.deque(maxlen=_LINES)
        reader = threading.Thread(target=_show, args=(process, lines), daemon=True)
        reader.start()
        try:
            code = process.wait(limit_s)
            outcome, reason = (FAILED, _reason(code)) if code else (DONE, "")
        except subprocess.TimeoutExpired:
            outcome, reason = TIMED_OUT, f"not done after {limit_s:g} s"
        finally:  # what it left running would disturb the next one
            _end(process)
        reader.join(GRACE_S)  # not for ever: a process of another session may still hold the pipe
    seconds = round(time.monotonic() - start_s, 1)
    return {"outcome": outcome, "reason": reason, "seconds": seconds, "end": list(lines)}


def _show(process: subprocess.Popen, lines: collections.deque[str]) -> None:
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip()[:_WIDTH])


def _reason(code: int) -> str:
    return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(process: subprocess.Popen) -> None:
    """End a process's whole session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
