"""Carries out the stages that are not done, each as a process, behind those that it needs, some at once."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

import torch

from pipelines.common.errors import clipped
from pipelines.common.machine import num_cores, part_of_cores
from tools.lib.study.graph import Graph
from tools.lib.study.report import write_report
from tools.lib.study.screen import Screen
from tools.lib.study.stage import LOG, SETTINGS, Stage, command_of
from trainer.cluster.preemption import Preemption
from trainer.cluster.world import alone
from trainer.sharing import grouping_key

_POLL_S, _NOTE_EVERY_S, _SHOW_EVERY_S = 0.1, 10.0, 60.0
_LONGEST_LINE = 10_000  # Characters that are noted of the line with which a command has failed.
_libc = ctypes.CDLL(None)
Job = list[Stage]  # Stages that one command carries out.


def jobs_of(stages: Iterable[Stage], together: int) -> list[Job]:
    """The stages that are not done as jobs: each alone, but up to `together` students that share all they must.

    One that has failed is tried again alone: students that are trained together all fail where one cannot begin.
    """
    jobs, keys = [], {}
    for stage in (stage for stage in stages if not stage.is_done):
        is_joined = stage.kind == "train" and not stage.failure
        key = grouping_key(stage.config) if is_joined and stage.config is not None else None
        for job in jobs:
            if key is not None and keys[job[0]] == key and len(job) < together:
                job.append(stage)
                break
        else:
            jobs.append([stage])
        keys[stage] = key
    return jobs


def command_of_job(job: Job) -> list[str]:
    """The command line that carries out a job."""
    return job[0].command if len(job) == 1 else command_of("trainer/together.py", *(s.folder / SETTINGS for s in job))


def log_of_job(job: Job) -> Path:
    """The file that gets what a job prints; a group of students has one of its own, in the first one's folder."""
    group = hashlib.sha256("".join(stage.fingerprint for stage in job).encode()).hexdigest()
    return job[0].folder / (LOG if len(job) == 1 else f"together-{group[:8]}.txt")


def run(stages: list[Stage], *, slots: int = 1, together: int = 1, screen: Screen) -> int:
    """Carry out all stages that are not done and can be, `slots` jobs at once.

    Returns:
      the number of the signal that has stopped it; 0 for none.
    """
    waiting, stopped_by, preemption = jobs_of(stages, together), 0, Preemption(alone("cpu"))
    running: dict[int, Process] = {}  # By their slots.
    with preemption.catching_signals():
        while running or (waiting and not stopped_by):
            ahead = {stage for job in [*waiting, *(process.job for process in running.values())] for stage in job}
            ready = [job for job in waiting if ahead.isdisjoint(need for stage in job for need in stage.needs)]
            if ready and len(running) < slots and not stopped_by:
                waiting.remove(ready[0])
                screen.leave_out([stage for stage in ready[0] if stage.missing])
                with locked_logs([stage for stage in ready[0] if not stage.missing], screen) as logs:
                    if job := [stage for stage in ready[0] if stage in logs and not stage.is_done]:
                        screen.begin(job)
                        slot = min({*range(slots)} - {*running})
                        running[slot] = Process(job, logs, slot, slots)
                continue
            if not stopped_by and (stopped_by := preemption.agree(False).signal):
                for process in running.values():
                    process.stop()
            for slot, process in [*running.items()]:
                process.note_progress(screen)
                if process.note_end(is_stopped=bool(stopped_by)):
                    screen.end(process.job)
                    del running[slot]
            time.sleep(_POLL_S)
    return stopped_by


def finish(graph: Graph, screen: Screen) -> int:
    """Measure the speed of what is exported, if it has not been, and write the report of what is there.

    Returns:
      as for `run`.
    """
    graph = graph.with_speed()
    screen.stages = graph.stages
    stopped_by = run([stage for stage in graph.stages if stage.kind == "speed"], screen=screen)
    if not stopped_by:
        page, result = write_report(graph)
        screen.say(f"{result}\nreport: {page}".strip())
    return stopped_by


class Process:
    """The process of a job, in one of several slots.

    It gets SIGTERM when this process ends, however that ends. It holds the lock on the log of each stage until its own
    end, and this process does until that is noted. So a study that is started again waits until the processes of a
    killed one have saved, and one that runs at the same time repeats nothing.
    """

    def __init__(self, job: Job, logs: Mapping[Stage, TextIO], slot: int = 0, slots: int = 1):
        self.job, command = job, command_of_job(job)
        self._noted_s = self._shown_s = time.monotonic()
        self._text = ""
        self._locks = [os.dup(logs[stage].fileno()) for stage in job]
        environment, cores = resources(slot, slots)
        output = log_of_job(job)
        for stage in job:
            print(f"$ {shlex.join(command)}", file=logs[stage], flush=True)
            stage.write_settings()
            stage.note(command=command, log=str(output.relative_to(stage.out)), done=False, failure="")
        # It stays readable if somebody deletes the folder.
        self._output = open(output, "a+", errors="replace")  # noqa: SIM115  (`note_end` closes it.)
        with open(output, "a") as written:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on.
                pass_fds=self._locks,
                # Students wait for the stages before theirs, which therefore keep all cores.
                preexec_fn=functools.partial(_before_command, os.getpid(), cores if job[0].subject else None),
            )

    @property
    def lines(self) -> list[str]:
        """The lines that it has printed, without empty ones. If there are none, a single line says so."""
        self._text += self._output.read()
        return [line for line in self._text.splitlines() if line.strip()] or ["it has printed nothing"]

    def stop(self) -> None:
        """Make the process, and all that it has started, save and end."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def note_progress(self, screen: Screen) -> None:
        """Note now and then how long it has run, for the case that all processes are killed, and show how far it is."""
        if time.monotonic() - self._noted_s >= _NOTE_EVERY_S:
            self._note()
        if time.monotonic() - self._shown_s >= _SHOW_EVERY_S:
            self._shown_s = time.monotonic()
            screen.show_progress(self.job, self.lines[-1])

    def note_end(self, *, is_stopped: bool = False) -> bool:
        """Whether it has ended; each stage notes then that it is done or has failed, which no stopped one has."""
        if (code := self._process.poll()) is None:
            return False
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._note(is_done=code == 0, ending="" if is_stopped else ending)
        self._output.close()
        for lock in self._locks:
            os.close(lock)
        return True

    def _note(self, *, is_done: bool = False, ending: str = "") -> None:
        """Note the time since the last note, in equal parts for all stages, and how they have ended."""
        seconds, self._noted_s = (time.monotonic() - self._noted_s) / len(self.job), time.monotonic()
        for stage in self.job:
            stage.note(done=is_done or stage.is_done, seconds=round(stage.seconds + seconds, 1))
            if ending and not stage.is_done:
                own = [line for line in self.lines if f"error: {stage.product}: " in line]
                stage.note(failure=f"{ending}: {clipped((own or self.lines)[-1], _LONGEST_LINE)}")


@contextlib.contextmanager
def locked_logs(job: Job, screen: Screen) -> Iterator[dict[Stage, TextIO]]:
    """Open the log of each stage with a lock on it, which is waited for.

    Whoever takes several takes them in the same order, so that no two wait for each other.
    """
    with contextlib.ExitStack() as closing:
        logs = {}
        for stage in sorted(job, key=lambda stage: stage.folder):
            stage.folder.mkdir(parents=True, exist_ok=True)
            logs[stage] = closing.enter_context(open(stage.folder / LOG, "a"))
            try:
                fcntl.flock(logs[stage], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                screen.say(f"{stage.name}: waiting until the process of an earlier study has saved and ended")
                fcntl.flock(logs[stage], fcntl.LOCK_EX)
        yield logs


def _before_command(parent: int, cores: set[int] | None) -> None:
    """Set up the new process for its command: SIGTERM when its parent ends, and its cores."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # It has ended before this could be noticed.
        os._exit(1)
    if cores is not None:
        os.sched_setaffinity(0, cores)


def resources(slot: int, slots: int) -> tuple[dict[str, str], set[int] | None]:
    """Find out which GPU one of several jobs at once uses, or without GPUs which part of the threads and cores.

    Returns:
      variables of its environment, and the numbers of its cores, None for all.
    """
    if slots == 1:
        return {}, None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices := visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]:
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}, None
    num_threads = os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // slots)))
    return {"OMP_NUM_THREADS": num_threads}, part_of_cores(slot, slots)
