"""Finds this process's rank among those that one launcher started: torchrun, srun, or a script that sets RANK.

Variables of a launcher outlive it: a shell inside an allocation, a pod, or a line in somebody's profile hands them to
programs that were started once and alone. So they count only where they are complete and sane, and where that launcher
started this process.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# SLURM's higher numbers mark batch scripts, interactive shells and the like, which are no steps of srun.
_LAST_STEP = 0xFFFFFFF0


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process among those of its launcher.

    Attributes:
      by: "torchrun", "srun", "RANK and WORLD_SIZE" where something else has set these, "" for a process of its own.
      rank, size: among all processes; local_rank, local_size: among those on this machine.
      ignored: a sentence about variables of a launcher that were ignored, without its end; "" where none were.
    """

    by: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    ignored: str = ""


def launched(
    environment: Mapping[str, str] | None = None, *, by_hand: bool = True, proc: Path = Path("/proc")
) -> Launch:
    """Find this process's launcher in its environment. Raises nothing.

    Args:
      environment: os.environ by default.
      by_hand: whether RANK and WORLD_SIZE count where torchrun did not set them. Scripts and the pods of Kubernetes set
        them for training; a conversion in such a pod is no part of a larger one.
      proc: where the system lists processes.
    """
    environment = os.environ if environment is None else environment
    by_ranks = _by_ranks(environment, by_hand)
    if isinstance(by_ranks, Launch):
        return by_ranks
    by_srun = _by_srun(environment, proc)
    if isinstance(by_srun, Launch):
        return by_srun
    return Launch(ignored="; ".join(reason for reason in (by_ranks, by_srun) if reason))


def array_task(environment: Mapping[str, str] | None = None) -> Launch:
    """This process as a task of SLURM's job array, such as `sbatch --array=1-8` starts; elsewhere a process of its own.

    A training is no such task: the tasks of an array start at different times and do not know of each other.
    """
    environment = os.environ if environment is None else environment
    names = ("TASK_ID", "TASK_MIN", "TASK_STEP", "TASK_COUNT")
    task, first, step, count = (_number(environment.get(f"SLURM_ARRAY_{name}", "")) for name in names)
    if task is None or first is None or step is None or count is None or count < 2:
        return Launch()
    # A list such as 1,2,7 has no step. Nothing says which of its tasks comes first.
    index, rest = divmod(task - first, step) if step else (count, 0)
    if rest or not 0 <= index < count:
        return Launch(ignored=f"SLURM_ARRAY_TASK_ID={task} is ignored (--array is no range): this process works alone")
    return Launch("SLURM's job array", index, count)


def _by_ranks(environment: Mapping[str, str], by_hand: bool) -> Launch | str:
    """The launch that RANK and its companions describe, or why they do not count; "" where there is none."""
    texts = {name: environment[name] for name in _ALONE if environment.get(name)}
    if all(text == _ALONE[name] for name, text in texts.items()):
        return ""
    if reason := _insane(texts):
        return _ignored(texts, reason)
    by_torchrun = bool(environment.get("TORCHELASTIC_RUN_ID"))
    if not by_torchrun and not by_hand:
        return _ignored(texts, "torchrun did not set this")
    numbers = {name: int(texts.get(name, alone)) for name, alone in _ALONE.items()}
    addressed = environment.get("MASTER_ADDR") or environment.get("MASTER_PORT")
    if numbers["WORLD_SIZE"] > 1 and not by_torchrun and not addressed:
        return _ignored(texts, "MASTER_ADDR and MASTER_PORT are not set")
    return Launch(
        by="torchrun" if by_torchrun else "RANK and WORLD_SIZE",
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_size=numbers["LOCAL_WORLD_SIZE"],
    )


def _insane(texts: Mapping[str, str]) -> str:
    """Why RANK and its companions cannot come from a launcher; "" where they can."""
    for name, text in texts.items():
        if _number(text) is None:
            return f"{name} is not a whole number"
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in texts]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
    if int(texts["RANK"]) >= int(texts["WORLD_SIZE"]):
        return "RANK is not below WORLD_SIZE"
    return "LOCAL_WORLD_SIZE is 0" if _number(texts.get("LOCAL_WORLD_SIZE", "1")) == 0 else ""


def _by_srun(environment: Mapping[str, str], proc: Path) -> Launch | str:
    """The step of srun that started this process, or why SLURM's variables do not count; "" where there are none."""
    names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_TASK_PID")
    texts = {name: environment[name] for name in names if environment.get(name)}
    if all(texts.get(name, "1") == "1" for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")):
        return ""
    _, rank, step, size, task = (_number(texts.get(name, "")) for name in names)
    shown = {name: texts[name] for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID") if name in texts}
    if step is None or step > _LAST_STEP:
        return _ignored(shown, "no step of srun started this process")
    if rank is None or size is None or rank >= size:
        return _ignored(shown, "SLURM_PROCID is not a number below SLURM_STEP_NUM_TASKS")
    if task is None or task not in _ancestors(proc):
        return _ignored(shown, "no task of that step started this process")
    if environment.get("SLURM_PTY_PORT") and task != os.getpid():
        return _ignored(shown, "it was started in a shell that 'srun --pty' opened")
    return Launch("srun", rank, size)


def _ignored(texts: Mapping[str, str], reason: str) -> str:
    shown = ", ".join(f"{name}={text[:40]}" for name, text in texts.items())
    return f"{shown} {'is' if len(texts) == 1 else 'are'} ignored ({reason}): this process works alone"


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _ancestors(proc: Path) -> Iterator[int]:
    """This process, its parent, and so on."""
    pid = os.getpid()
    while pid > 0:
        yield pid
        try:
            # The file holds PID (NAME) STATE PARENT ..., and the name may hold spaces and brackets.
            pid = int((proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
