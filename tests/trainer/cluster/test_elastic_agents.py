"""torchrun's elastic mode: a machine may leave and come back in the middle of a run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import runs
from conftest import REPOSITORY
from pipelines.common.files import read_json_lines
from support.processes import free_port

EPOCHS = 60  # 300 updates
UPDATE_S = 0.5
# Seconds after which the agents no longer wait for others to join, and take a silent agent for lost.
FAST = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3,timeout=300,close_timeout=5"


# As docs/launching.md says: agents that share their store do not give its address to one that joins later.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Agent:
    """One machine's torchrun; that of the endpoint's host has the store, and must stay."""

    def __init__(self, port: int, log: Path, trainer: list, *, is_host: bool = False):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        command += ["--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        command += ["--rdzv-id", "elastic", "--rdzv-conf", f"{FAST},is_host={is_host}", *map(str, trainer)]
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
            )

    def kill(self) -> None:
        """End the agent and its rank, which has a session of its own, as a power failure would."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        for pid in [self.process.pid, *map(int, found.split())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def steps_of(out: Path) -> list[int]:
    metrics = out / "metrics.jsonl"
    lines = read_json_lines(metrics) if metrics.exists() else []
    return [line["step"] for line in lines if line["kind"] == "train"]


def await_ranks(agent: Agent, ranks: int, out: Path, timeout_s: float = 200) -> None:
    """Wait until some more updates were made by this number of ranks."""
    deadline = time.monotonic() + timeout_s
    while f"of {ranks} ranks" not in agent.log.read_text().split("=restart=")[-1]:
        assert agent.process.poll() is None and time.monotonic() < deadline, agent.log.read_text()
        time.sleep(0.2)
    step = max(steps_of(out), default=0)
    while max(steps_of(out), default=0) < step + 8:
        assert agent.process.poll() is None and time.monotonic() < deadline, agent.log.read_text()
        time.sleep(0.2)


@pytest.mark.long
def test_a_machine_is_lost_and_comes_back_and_each_sample_counts_once(tmp_path):
    root, out, notes = runs.make_dataset(tmp_path), tmp_path / "run", tmp_path / "notes"
    trainer = [REPOSITORY / "tests" / "support" / "slow_trainer.py", UPDATE_S, notes, *runs.SETTINGS]
    trainer += ["--run.ready_s", 120, "--schedule.epochs", EPOCHS, "--run.eval_every", EPOCHS]
    trainer += ["--data.root", root, "--run.out", out]
    port = free_port()
    first = Agent(port, tmp_path / "first.log", trainer, is_host=True)
    second = Agent(port, tmp_path / "second.log", trainer)
    try:
        await_ranks(first, 2, out)
        second.kill()
        marked = first.log.read_text().count("of 2 ranks")
        await_ranks(first, 1, out)
        second = Agent(port, tmp_path / "back.log", trainer)
        await_ranks(second, 2, out)
        assert first.log.read_text().count("of 2 ranks") > marked
        assert first.process.wait(timeout=400) == 0, first.log.read_text()
    finally:
        for agent in (first, second):
            agent.kill()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] and steps_of(out) == list(range(1, summary["step"] + 1))
    noted = [json.loads(line) for line in notes.with_suffix(".rows.jsonl").read_text().splitlines()]
    of_step = {step: {digest for number, digests in noted if number == step for digest in digests} for step, _ in noted}
    assert sorted(of_step) == list(range(summary["step"])) and {len(rows) for rows in of_step.values()} == {64}
