"""Carries out the stages that are not done, each as a process, behind those that it needs, some at once."""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pipelines.common.errors import clipped
from pipelines.common.machine import num_cores
from tools.lib.study.graph import Graph
from tools.lib.study.report import write_report
from tools.lib.study.screen import Screen
from tools.lib.study.stage import LOG, SETTINGS, Stage, command_of
from trainer.cluster.preemption import Preemption
from trainer.cluster.world import alone

_POLL_S, _NOTE_EVERY_S = 0.1, 60.0
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


def _shared_facts(train: Stage) -> dict[str, Any]:
    return {key: value for key, value in train.facts.items() if not key.startswith("student.")}


def command_of_job(job: Job) -> list[str]:
    """The command line that carries out a job."""
    return job[0].command if len(job) == 1 else command_of("trainer/together.py", *(s.folder / SETTINGS for s in job))


class Process:
    """The process of a job.

    It gets SIGTERM when this process ends, however that ends, and until its own end it holds a lock on the log of each
    stage. So a study that is started again waits until the processes of a killed one have saved.
    """

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job, self.command = job, command_of_job(job)
        self._noted_s = time.monotonic()
        with contextlib.ExitStack() as closing:
            logs = []
            for stage in job:
                stage.folder.mkdir(parents=True, exist_ok=True)
                logs.append(closing.enter_context(open(stage.folder / LOG, "a")))
                fcntl.flock(logs[-1], fcntl.LOCK_EX)
                stage.note(self.command)
                elsewhere = "" if stage is job[0] else f" # its output is in {job[0].folder / LOG}"
                print(f"$ {' '.join(self.command)}{elsewhere}", file=logs[-1], flush=True)
            self._process = subprocess.Popen(
                self.command,
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

    @property
    def last_line(self) -> str:
        """What it has printed last."""
        line = self.job[0].lines[-1]
        return "it has printed nothing" if line.startswith("$ ") else clipped(line, 300)

    def stop(self) -> None:
        """Make the process, and all that it has started, save and end."""
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGTERM)

    def note_progress(self, screen: Screen) -> None:
        """Note every minute how long it has run, for the case that all processes are killed, and show how far it is."""
        if time.monotonic() - self._noted_s >= _NOTE_EVERY_S:
            self._note()
            screen.show_progress(self.job, self.last_line)

    def note_result(self, *, stopped: bool = False) -> None:
        """Wait for its end, and note for each stage whether it is done or has failed, which no `stopped` one has."""
        code = self._process.wait()
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._note(done=code == 0, failure="" if stopped or code == 0 else f"{ending}: {self.last_line}")

    def _note(self, done: bool = False, failure: str = "") -> None:
        now = time.monotonic()
        for stage in self.job:
            is_done, seconds = done or stage.is_done, (now - self._noted_s) / len(self.job)
            stage.note(self.command, done=is_done, failure="" if is_done else failure, seconds=seconds)
        self._noted_s = now


def run(stages: list[Stage], *, slots: int = 1, together: int = 1, screen: Screen) -> int:
    """Carry out all stages that are not done and can be, `slots` jobs at once.

    Returns:
      the number of the signal that has stopped it; 0 for none.
    """
    waiting, stopped_by, preemption = jobs_of(stages, together), 0, Preemption(alone("cpu"))
    running: dict[int, Process] = {}
    with preemption.catching_signals():
        while running or (waiting and not stopped_by):
            ahead = {stage for job in [*waiting, *(process.job for process in running.values())] for stage in job}
            ready = [job for job in waiting if ahead.isdisjoint(need for stage in job for need in stage.needs)]
            held = [stage for job in ready for stage in job if is_held(stage)]
            screen.mark(held, "waiting", " until the process of an earlier study has saved and ended")
            ready = [job for job in ready if not set(held).intersection(job)]
            if ready and len(running) < slots and not stopped_by:
                waiting.remove(ready[0])
                job = [stage for stage in ready[0] if all(need.is_done for need in stage.needs)]
                screen.leave_out(stage for stage in ready[0] if stage not in job)
                if job:
                    slot = min({*range(slots)} - {*running})
                    screen.start(job)
                    running[slot] = Process(job, environment_of(slot, slots))
                continue
            if not stopped_by and (stopped_by := preemption.agree(False).signal):
                for process in running.values():
                    process.stop()
            for slot, process in [*running.items()]:
                process.note_progress(screen)
                if process.has_ended:
                    process.note_result(stopped=bool(stopped_by))
                    screen.end(process.job)
                    del running[slot]
            time.sleep(_POLL_S)
    return stopped_by


def finish(graph: Graph, screen: Screen) -> int:
    """Measure the speed of what is exported, if it has not been, and write the report of what is there.

    Returns:
      as for `run`.
    """
    graph.add_speed()
    screen.stages = graph.stages
    stopped_by = run([stage for stage in graph.stages if stage.kind == "speed"], screen=screen)
    if not stopped_by:
        screen.say(f"report: {write_report(graph)}")
    return stopped_by


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


def environment_of(slot: int, slots: int) -> dict[str, str]:
    """What a job gets where several run at once: a GPU of its own, or its part of the cores."""
    if slots == 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if devices:
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // slots)))}
