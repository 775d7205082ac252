"""A study on a cluster: a job of SLURM for each command, submitted through submitit."""

import functools
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.common.errors import UserError
from tools.lib.study.graph import Graph
from tools.lib.study.running import finish, jobs_of, run
from tools.lib.study.screen import Screen
from tools.lib.study.stage import REPOSITORY, Stage

# The signal that comes before a time limit, as submitit names it; `run` stops at it, and not at the usual SIGUSR2.
os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"


def work_on(work: Callable[..., int], stages: list[Stage]) -> None:
    """A job of SLURM: do the work, and back into the queue where a time limit or a preemption stops it."""
    if work(screen=Screen(stages)):
        job = os.environ["SLURM_JOB_ID"]
        state = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
        if "JobState=RUNNING" in state:  # Otherwise somebody has cancelled it, or SLURM itself requeues it.
            subprocess.run(["scontrol", "requeue", job])
    if missing := [stage.name for stage in stages if not stage.is_done]:
        raise UserError(f"{', '.join(missing)}: not done. The stage's folder has its log")


def submit(graph: Graph, parameters: Mapping[str, Any], screen: Screen) -> None:
    """Submit all that is not done, and speed and the report behind it.

    A job waits until those that it needs have ended, in whatever way (afterany), and then looks for itself whether its
    inputs are there: behind afterok the jobs of a failed student would stay in the queue for ever, and with several
    students in one job a single failure would keep back all of them.

    Args:
      parameters: are given to submitit's AutoExecutor, such as timeout_min, gpus_per_node, slurm_partition.
    Raises:
      UserError: submitit is not installed, there is no SLURM here, it refuses a job, or a parameter is the study's own.
    """
    common = _common_parameters(parameters)
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise UserError("--slurm needs submitit: python -m pip install 'submitit>=1.5'") from error
    ids: dict[Stage, str] = {}  # The number of the job of each stage.
    try:
        for job in [*jobs_of(graph.stages, graph.study.together), []]:  # The last one has no stage: it waits for all.
            names = ", ".join(stage.name for stage in job) or "speed and report"
            work = functools.partial(run, job, together=len(job)) if job else functools.partial(finish, graph)
            needed = [ids[need] for stage in job for need in stage.needs if need in ids] if job else [*ids.values()]
            executor = submitit.AutoExecutor(graph.out / "slurm", cluster="slurm")
            executor.update_parameters(
                **common,
                name=names.partition(",")[0].replace(" ", "-"),
                **({"slurm_dependency": f"afterany:{':'.join(dict.fromkeys(needed))}"} if needed else {}),
            )
            number = executor.submit(work_on, work, job).job_id
            ids |= dict.fromkeys(job, number)
            screen.say(f"job {number}: {names}")
    except (RuntimeError, ValueError, NameError, FailedJobError) as error:
        raise UserError(f"--slurm: {error}. Already submitted: {', '.join({*ids.values()}) or 'nothing'}") from error


def _common_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of all jobs: those that the user gives, and in the same lists and mappings what each job needs."""
    if decided := {"name", "slurm_dependency", "tasks_per_node", "nodes"} & {*given}:
        raise UserError(f"--slurm: the study decides {min(decided)}. Leave it out")
    setup, additional = given.get("slurm_setup") or [], given.get("slurm_additional_parameters") or {}
    if not isinstance(additional, dict):
        raise UserError(f"--slurm: slurm_additional_parameters is {additional}; give keys with values: {{KEY: VALUE}}")
    lines = [f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}", *(setup if isinstance(setup, list) else [setup])]
    own = {"slurm_setup": lines, "slurm_additional_parameters": {"requeue": True, **additional}}
    return {"timeout_min": 720, **given, **own}
