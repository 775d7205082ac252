"""Carries out the stages that are not done, each as a process, behind those that it needs, some at once."""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from pipelines.common.errors import clipped
from pipelines.common.machine import num_cores
from tools.lib.study.screen import Screen
from tools.lib.study.stage import LOG, SETTINGS, Stage
from trainer.cluster.preemption import STOPPING

REPOSITORY = Path(__file__).resolve().parents[3]
_POLL_S = 0.1
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
Job = list[Stage]  # Stages that one command carries out.


def jobs_of(stages: Iterable[Stage], together: int) -> list[Job]:
    """The stages that are not done as jobs: each alone, but students of one plan up to `together` at a time."""
    jobs: list[Job] = []
    for stage in stages:
        if not stage.is_done:
            alike = [job for job in jobs if len(job) < together and job[0].kind == stage.kind == "train"]
            job = next((job for job in alike if _shared_facts(job[0]) == _shared_facts(stage)), [])
            if not job:
                jobs.append(job)
            job.append(stage)
    return jobs


def _shared_facts(train: Stage) -> dict:
    return {key: value for key, value in train.facts.items() if not key.startswith("student.")}


def command_of(job: Job) -> list[str]:
    """The words behind `python` that carry out a job."""
    return job[0].command if len(job) == 1 else ["trainer/together.py", *(str(each.folder / SETTINGS) for each in job)]


class Process:
    """The process of a job.

    It gets SIGTERM when this process ends, however that ends, and until its own end it holds a lock on the log of each
    stage. So a study that is started again waits until the processes of a killed one have saved.
    """

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job, self.command, self.log = job, command_of(job), job[0].folder / LOG
        self._start_s = time.monotonic()
        with contextlib.ExitStack() as closing:
            logs = []
            for stage in job:
                stage.folder.mkdir(parents=True, exist_ok=True)
                logs.append(closing.enter_context(open(stage.folder / LOG, "a")))
                fcntl.flock(logs[-1], fcntl.LOCK_EX)
                stage.note(self.command)
                elsewhere = "" if stage is job[0] else f" # its output is in {self.log}"
                print(f"$ {shown(self.command)}{elsewhere}", file=logs[-1], flush=True)
            self._process = subprocess.Popen(
                [sys.executable, *self.command],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=logs[0],
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on.
                pass_fds=[log.fileno() for log in logs],
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it has started."""
        if not self.has_ended:
            os.killpg(self._process.pid, number)

    def note_result(self, *, stopped: bool = False) -> None:
        """Wait for its end, and note for each stage whether it is done or has failed, which no `stopped` one has."""
        code = self._process.wait()
        seconds = (time.monotonic() - self._start_s) / len(self.job)
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        failure = "" if stopped or code == 0 else f"{ending}: {clipped(lines[-1], 300)}"
        for stage in self.job:
            done = code == 0 or stage.is_done
            stage.note(self.command, done=done, failure="" if done else failure, seconds=seconds)


def shown(command: list[str]) -> str:
    """A command as a user types it in the repository."""
    return " ".join(["python", *command])


def run(stages: list[Stage], *, slots: int = 1, together: int = 1, screen: Screen) -> int:
    """Carry out all stages that are not done and can be, `slots` jobs at once.

    Returns:
      the number of the signal that has stopped it; 0 for none.
    """
    waiting = jobs_of(stages, together)
    running: dict[int, Process] = {}
    with caught_signals() as caught:
        num_passed_on = 0
        while running or (waiting and not caught):
            ahead = {stage for job in [*waiting, *(process.job for process in running.values())] for stage in job}
            ready = [job for job in waiting if ahead.isdisjoint(need for stage in job for need in stage.needs)]
            ready = [job for job in ready if not screen.held(stage for stage in job if is_held(stage))]
            if ready and len(running) < slots and not caught:
                waiting.remove(ready[0])
                job = [stage for stage in ready[0] if all(need.is_done for need in stage.needs)]
                screen.left_out(stage for stage in ready[0] if stage not in job)
                if job:
                    slot = min({*range(slots)} - {*running})
                    running[slot] = Process(job, environment_of(slot, slots))
                    screen.started(job, shown(running[slot].command))
                continue
            if len(caught) > num_passed_on:
                num_passed_on = len(caught)
                for process in running.values():  # A second Ctrl-C ends at once.
                    process.signal(signal.SIGKILL if caught.count(signal.SIGINT) > 1 else signal.SIGTERM)
            for slot, process in [*running.items()]:
                if process.has_ended:
                    process.note_result(stopped=bool(caught))
                    screen.ended(process.job)
                    del running[slot]
            time.sleep(_POLL_S)
    return caught[0] if caught else 0


def is_held(stage: Stage) -> bool:
    """Whether the process of a killed study still works on a stage."""
    try:
        with open(stage.folder / LOG, "a") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # The stage has never been started.
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Inside, Ctrl-C and signals to end are collected in the list."""
    caught: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in STOPPING}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def environment_of(slot: int, slots: int) -> dict[str, str]:
    """What a job gets where several run at once: a GPU of its own, or its part of the cores."""
    if slots == 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if devices:
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // slots)))}
