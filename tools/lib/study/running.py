"""Carries out the stages that are not done, each as a process, in the order of the graph, some at once."""

import contextlib
import ctypes
import fcntl
import graphlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch

from pipelines.common.errors import clipped
from pipelines.common.machine import num_cores
from tools.lib.study.screen import Screen
from tools.lib.study.stage import LOG, SETTINGS, Stage

REPOSITORY = Path(__file__).resolve().parents[3]
_POLL_S = 0.1
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
Job = list[Stage]  # Stages that one command carries out.


def jobs_of(stages: Iterable[Stage], together: int) -> list[Job]:
    """The stages that are not done as jobs: each alone, but students of one plan up to `together` at a time."""
    jobs: list[Job] = []
    open_jobs: dict[str, Job] = {}
    for stage in stages:
        if stage.is_done:
            continue
        job = open_jobs.get(stage.group, []) if stage.kind == "train" else []
        if not job or len(job) == together:
            job = []
            jobs.append(job)
            open_jobs[stage.group] = job
        job.append(stage)
    return jobs


def dependencies(jobs: list[Job]) -> dict[int, set[int]]:
    """The jobs that each job waits for, all by their numbers."""
    job_of = {stage.folder: number for number, job in enumerate(jobs) for stage in job}
    needed = {n: {job_of.get(need.folder, n) for stage in job for need in stage.needs} for n, job in enumerate(jobs)}
    return {number: others - {number} for number, others in needed.items()}


class Process:
    """The process of a job.

    It holds a lock on the folder of each stage, and gets SIGTERM when this process ends, however that ends. So a study
    that is started again waits until the processes of a killed one have saved and ended.

    Attributes:
      job: stages that are in work; those that somebody else has done in the meantime are left out.
      log: file that gets its output.
    """

    def __init__(self, job: Job, environment: Mapping[str, str] | None = None):
        self.job: Job = []
        self._locks: list[IO] = []
        for stage in job:
            stage.folder.mkdir(parents=True, exist_ok=True)
            lock = open(stage.folder / ".stage", "w")  # noqa: SIM115  (It is held until the process has ended.)
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._locks.append(lock)
            if stage.has_ended_well and not stage.is_done:
                stage.finish(stage.command, 0.0)
            if not stage.is_done:
                stage.begin()
                self.job.append(stage)
        self.command = command_of(self.job)
        self.log = job[0].folder / LOG
        self._start_s = time.monotonic()
        self._process = self._started(environment or {}) if self.job else None

    def _started(self, environment: Mapping[str, str]) -> subprocess.Popen:
        with open(self.log, "a") as log:
            print("$", shown(self.command), file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, *self.command],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on.
                pass_fds=[lock.fileno() for lock in self._locks],
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, or there was nothing left to do."""
        return self._process is None or self._process.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def note_result(self, *, stopped: bool = False) -> int:
        """Wait for its end, note for each stage whether it is done or has failed, and give the locks back.

        Args:
          stopped: this process has stopped it, so that it has not failed.
        Returns:
          its exit code, or minus the number of the signal that has killed it.
        """
        code = 0 if self._process is None else self._process.wait()
        seconds = (time.monotonic() - self._start_s) / max(1, len(self.job))
        for stage in self.job:
            if code == 0 or stage.has_ended_well:
                stage.finish(self.command, seconds)
            elif not stopped:
                stage.fail(f"{_ending(code)}: {_last_line(self.log)}", self.log)
        for lock in self._locks:
            lock.close()
        return code


def command_of(job: Job) -> list[str]:
    """The words behind `python` that carry out a job."""
    if len(job) < 2:
        return job[0].command if job else []
    return ["trainer/together.py", *(str(stage.folder / SETTINGS) for stage in job)]


def shown(command: list[str]) -> str:
    """A command as a user types it in the repository."""
    return " ".join(["python", *command])


def run(stages: list[Stage], *, slots: int, together: int, screen: Screen) -> int:
    """Carry out all stages that are not done and can be, `slots` jobs at once.

    Returns:
      the number of the signal that has stopped it; 0 for none.
    """
    jobs = jobs_of(stages, together)
    sorter = graphlib.TopologicalSorter(dependencies(jobs))
    sorter.prepare()
    ready: list[int] = []
    running: dict[int, tuple[int, Process]] = {}  # slot -> number of the job, and its process
    with caught_signals() as caught:
        num_passed_on = 0
        while running or (sorter.is_active() and not caught):
            ready = sorted([*ready, *sorter.get_ready()])
            while ready and len(running) < slots and not caught:
                number = ready.pop(0)
                blocked = [stage for stage in jobs[number] if stage.is_blocked]
                screen.skipped(blocked)
                slot = min({*range(slots)} - {*running})
                job = [stage for stage in jobs[number] if stage not in blocked]
                if not job:
                    sorter.done(number)
                    ready = sorted([*ready, *sorter.get_ready()])
                    continue
                process = Process(job, environment_of(slot, slots))
                running[slot] = (number, process)
                screen.started(process.job, shown(process.command))
            if len(caught) > num_passed_on:
                for _, process in running.values():
                    process.signal(signal.SIGKILL if num_passed_on else signal.SIGTERM)
                num_passed_on = len(caught)
            for slot, (number, process) in [*running.items()]:
                if process.has_ended:
                    process.note_result(stopped=bool(caught))
                    screen.ended(process.job, process.log)
                    del running[slot]
                    sorter.done(number)
            screen.refresh()
            time.sleep(_POLL_S)
    return caught[0] if caught else 0


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Inside, Ctrl-C and signals to end are collected in the list."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
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


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return clipped(next((line for line in reversed(lines) if line.strip()), ""), 300)
