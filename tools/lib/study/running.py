"""Carries out the stages that are not done, each as a process, behind those that it needs, some at once."""

import contextlib
import ctypes
import fcntl
import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pipelines.common.errors import clipped
from pipelines.common.machine import num_cores, part_of_cores
from tools.lib.study.graph import Graph
from tools.lib.study.report import write_report
from tools.lib.study.screen import Screen, log_of
from tools.lib.study.stage import LOG, SETTINGS, Stage, command_of
from trainer.cluster.preemption import Preemption
from trainer.cluster.world import alone
from trainer.sharing import grouping_key

_POLL_S, _NOTE_EVERY_S = 0.1, 60.0
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
Job = list[Stage]  # Stages that one command carries out.


def jobs_of(stages: Iterable[Stage], together: int) -> list[Job]:
    """The stages that are not done as jobs: each alone, but up to `together` students that share all they must."""
    jobs: list[Job] = []
    for stage in stages:
        if not stage.is_done:
            key = _grouping_key(stage)
            alike = [job for job in jobs if len(job) < together and key is not None and _grouping_key(job[0]) == key]
            job = alike[0] if alike else []
            if not job:
                jobs.append(job)
            job.append(stage)
    return jobs


def _grouping_key(stage: Stage) -> dict[str, Any] | None:
    return grouping_key(stage.config) if stage.kind == "train" and stage.config is not None else None


def command_of_job(job: Job) -> list[str]:
    """The command line that carries out a job."""
    return job[0].command if len(job) == 1 else command_of("trainer/together.py", *(s.folder / SETTINGS for s in job))


class Process:
    """The process of a job.

    It gets SIGTERM when this process ends, however that ends, and until its own end it holds a lock on the log of each
    stage. So a study that is started again waits until the processes of a killed one have saved.

    Of students that are trained together each log gets the lines that do not begin with the folder of another one, and
    the output of all is in `log_of` the job.

    Args:
      cores: that it may use; None for all.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], cores: set[int] | None = None):
        self.job, self.command = job, command_of_job(job)
        self._training, self._noted_s = [*job], time.monotonic()  # Stages that share the time, and since when.
        self._errors: dict[Stage, str] = {}  # Why a student has ended among others.
        self._last_line = self._begun_line = ""
        with contextlib.ExitStack() as closing:
            logs = []
            output = log_of(job)
            for stage in job:
                stage.folder.mkdir(parents=True, exist_ok=True)
                logs.append(closing.enter_context(open(stage.folder / LOG, "a")))
                fcntl.flock(logs[-1], fcntl.LOCK_EX)
                stage.note(self.command)
                of_all = "" if len(job) == 1 else f" # the output of all is in {output}"
                print(f"$ {' '.join(self.command)}{of_all}", file=logs[-1], flush=True)
            written = logs[0] if len(job) == 1 else closing.enter_context(open(output, "a"))
            # It stays readable if somebody deletes the folder.
            self._output = open(output, errors="replace")  # noqa: SIM115  (`note_result` closes it.)
            self._output.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on.
                pass_fds=[log.fileno() for log in logs],
                preexec_fn=functools.partial(_before_command, cores),
            )

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def last_line(self) -> str:
        """The last line that it has printed."""
        return clipped(self._last_line, 300) or "it has printed nothing"

    def stop(self) -> None:
        """Make the process, and all that it has started, save and end."""
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGTERM)

    def note_progress(self, screen: Screen) -> None:
        """Note every minute how long it has run, for the case that all processes are killed, and show how far it is."""
        self._read()
        if time.monotonic() - self._noted_s >= _NOTE_EVERY_S:
            self._note()
            screen.show_progress(self.job, self.last_line)

    def note_result(self, *, stopped: bool = False) -> None:
        """Wait for its end, and note for each stage whether it is done or has failed, which no `stopped` one has."""
        code = self._process.wait()
        self._read("\n")
        self._output.close()
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._note(done=code == 0, ending="" if stopped or code == 0 else ending)

    def _read(self, end: str = "") -> None:
        """Read the lines since the last time, and notice which students have ended. `end` completes the last line."""
        *lines, self._begun_line = (self._begun_line + self._output.read() + end).split("\n")
        lines = [line for line in lines if line.strip()]
        if not lines:
            return
        self._last_line = lines[-1]
        if len(self.job) > 1:
            for stage in self.job:
                self._hand_out(lines, stage)
            training = [stage for stage in self._training if stage not in self._errors and not stage.is_done]
            if training != self._training:
                self._note()
                self._training = training

    def _hand_out(self, lines: list[str], stage: Stage) -> None:
        """Write to a student's log what concerns it among the output of all."""
        others = [f"{other.product}: " for other in self.job if other is not stage]
        own = [line for line in lines if not any(other in line for other in others)]
        errors = [line for line in own if f"error: {stage.product}: " in line]
        if errors:
            self._errors[stage] = clipped(errors[-1], 300)
        stage.folder.mkdir(parents=True, exist_ok=True)
        with open(stage.folder / LOG, "a") as log:
            log.writelines(f"{line}\n" for line in own)

    def _note(self, done: bool = False, ending: str = "") -> None:
        """Note the time since the last note, in equal parts for those that are still training, and how all ended."""
        now, sharing = time.monotonic(), self._training or self.job
        for stage in self.job:
            is_done, seconds = done or stage.is_done, (now - self._noted_s) / len(sharing) if stage in sharing else 0.0
            failure = f"{ending}: {self._errors.get(stage, self.last_line)}" if ending and not is_done else ""
            stage.note(self.command, done=is_done, failure=failure, seconds=seconds)
        self._noted_s = now


def _before_command(cores: set[int] | None) -> None:
    """Set up the new process for its command: SIGTERM when its parent ends, and its cores."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if cores is not None:
        os.sched_setaffinity(0, cores)


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
                    # The students wait for the stages before theirs, which therefore keep all cores.
                    cores = cores_of(slot, slots) if job[0].subject else None
                    running[slot] = Process(job, environment_of(slot, slots), cores)
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
    """Give each of several jobs a GPU of its own, or the number of threads for its cores; {} for a single job."""
    if slots == 1:
        return {}
    if devices := _devices():
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // slots)))}


def cores_of(slot: int, slots: int) -> set[int] | None:
    """The cores of a job where several run at once without GPUs, at least one; None for all."""
    if slots == 1 or _devices():
        return None
    return part_of_cores(slot, slots)


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
