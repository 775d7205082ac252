"""A study on a cluster: a job of SLURM for each command, submitted through submitit."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.common.errors import UserError
from tools.lib.study.outcome import finish
from tools.lib.study.running import REPOSITORY, Job, Process, dependencies, jobs_of
from tools.lib.study.settings import Study
from tools.lib.study.stage import Stage
from trainer.cluster.preemption import REQUEUE

# submitit's name of the signal that comes before a time limit. A training saves at SIGUSR1, and SIGUSR2 would end it.
os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
# How a command ends that a preemption has stopped, as in tools/slurm/train.sbatch.
_STOPPED = (REQUEUE, -signal.SIGTERM, -signal.SIGUSR1)
_TIMEOUT_MIN, _MOST_TIMEOUTS = 720, 1000


class ClusterJob:
    """A job of a study: submitit calls it, and again after a time limit or a preemption."""

    def __init__(self, job: Job):
        self.job = job
        self._process: Process | None = None

    def __call__(self) -> None:
        """Carry out the stages whose needs are there."""
        job = [stage for stage in self.job if not stage.is_blocked]
        if job:
            self._process = Process(job)
            if self._process.note_result() in _STOPPED:
                requeue()
        if missing := [stage.name for stage in self.job if not stage.is_done]:
            raise UserError(f"{', '.join(missing)}: not done. The stage's folder has its log")

    def checkpoint(self, *_: object) -> Any:
        """Let the command save what it has, and return what the requeued job is to do."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.signal(signal.SIGTERM)
            self._process.note_result(stopped=True)
        return DelayedSubmission(ClusterJob(self.job))


class LastJob:
    """The job behind all others: speed and the report."""

    def __init__(self, study: Study, out: Path):
        self.study, self.out = study, out

    def __call__(self) -> None:
        """Make them of what is there."""
        finish(self.study, self.out)

    def checkpoint(self, *_: object) -> Any:
        """As for ClusterJob."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(LastJob(self.study, self.out))


def requeue() -> None:
    """Put this job back into the queue, unless somebody has cancelled it: then it is no longer running."""
    job = os.environ["SLURM_JOB_ID"]
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    if "JobState=RUNNING" in shown.stdout:
        subprocess.run(["scontrol", "requeue", job])


def submit(study: Study, stages: list[Stage], out: Path, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Submit all that is not done.

    A job waits until those that it needs have ended, in whatever way (afterany), and then looks for itself whether its
    inputs are there: behind afterok the jobs of a failed student would stay in the queue for ever, and with several
    students in one job a single failure would keep back all of them.

    Args:
      parameters: of submitit's AutoExecutor, such as timeout_min, gpus_per_node, slurm_partition.
    Returns:
      the number of each job, by the names of its stages.
    Raises:
      UserError: submitit is not installed, there is no SLURM here, or it refuses a job.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--slurm needs submitit: python -m pip install 'submitit>=1.5'") from error
    jobs, numbers = jobs_of(stages, study.together), {}
    ids: list[str] = []

    def submitted(call: ClusterJob | LastJob, names: str, needed: list[str]) -> str:
        executor = submitit.AutoExecutor(out / "slurm", cluster="slurm", slurm_max_num_timeout=_MOST_TIMEOUTS)
        executor.update_parameters(
            **{"timeout_min": _TIMEOUT_MIN, **parameters},
            name=names.partition(",")[0].replace(" ", "-"),
            slurm_setup=[f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}"],
            slurm_additional_parameters={"requeue": True},
            **({"slurm_dependency": f"afterany:{':'.join(needed)}"} if needed else {}),
        )
        numbers[names] = executor.submit(call).job_id
        return numbers[names]

    try:
        for number, needed in dependencies(jobs).items():
            names = ", ".join(stage.name for stage in jobs[number])
            ids.append(submitted(ClusterJob(jobs[number]), names, [ids[n] for n in sorted(needed)]))
        submitted(LastJob(study, out), "speed and report", ids)
    except (RuntimeError, ValueError, NameError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"--slurm: {error}. Already submitted: {', '.join(numbers.values()) or 'nothing'}") from error
    return numbers
