"""Training runs as a user starts them: in processes of their own, known by what they write to metrics.jsonl."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from trainer.monitor.run_files import METRICS

REPOSITORY = Path(__file__).resolve().parents[3]


def run_training(
    out: Path, settings: Mapping[str, object], environment: Mapping[str, str] | None = None
) -> tuple[float, list[dict]]:
    """Start trainer/run.py with settings like {"run.seed": 1} in the folder `out`, and wait for its end.

    Args:
      environment: variables besides this process's own.
    Returns:
      The time at which it was started, as time.time() gives it, and the lines that it wrote to metrics.jsonl: a
      "session" line at the end of building, then the others. Each line has its "time" on the same clock.
    Raises:
      UserError: the run failed; the message ends with the run's own error.
    """
    options = [f"--{key}={value}" for key, value in {**settings, "run.out": out}.items()]
    command = [sys.executable, str(REPOSITORY / "trainer" / "run.py"), *options]
    start_s = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        last_line = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise UserError(f"trainer/run.py ended with code {done.returncode}: {last_line}")
    lines = read_json_lines(out / METRICS)
    session = max(number for number, line in enumerate(lines) if line["kind"] == "session")
    return start_s, lines[session:]
