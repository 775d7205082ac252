"""Training runs as a user starts them: processes of their own, known by what they write to metrics.jsonl."""

import os
import subprocess
import sys
import time
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from trainer.monitor.run_files import METRICS

REPOSITORY = Path(__file__).resolve().parents[3]


def run_training(
    out: Path, settings: dict[str, object], *, ranks: int = 1, environment: dict[str, str] | None = None
) -> tuple[float, list[dict]]:
    """Start trainer/run.py with settings like {"run.seed": 1} in the folder `out`, and wait for its end.

    Args:
      environment: variables besides this process's own.
    Returns:
      when it was started, in seconds as from time.time(), and the lines of metrics.jsonl that it wrote: a "session"
      line at the end of building, then the others; each has its "time" on the same clock.
    Raises:
      UserError: it failed; its last words are in the message.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = [f"--{key}={value}" for key, value in {**settings, "run.out": out}.items()]
    command = [sys.executable, *launcher, str(REPOSITORY / "trainer" / "run.py"), *options]
    start_s = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise UserError(
            f"trainer/run.py on {ranks} ranks ended with code {done.returncode}: {_last_words(done.stderr)}"
        )
    lines = read_json_lines(out / METRICS)
    session = max(number for number, line in enumerate(lines) if line["kind"] == "session")
    return start_s, lines[session:]


def _last_words(stderr: str) -> str:
    """The trainer's own error where there is one, for torchrun says more after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error: " in line), lines[-1])
