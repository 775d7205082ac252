"""Finds this process's rank among those that one launcher started: torchrun, srun, or a script that sets RANK.

Variables of a launcher outlive it: a shell inside an allocation, a pod, or a line in somebody's profile hands them to
programs that were started once and alone. So they count only where they are complete and sane, and where that launcher
started this process.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# Variables of launchers, and what each is for a single process.
_RANKS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
_ALONE = {**_RANKS, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
# SLURM's higher numbers mark batch scripts, interactive shells and the like, which are no steps of srun.
_LAST_STEP = 0xFFFFFFF0


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process among those of its launcher.

    Attributes:
      by: "torchrun", "srun", "RANK and WORLD_SIZE" where something else has set these, "" for a process of its own.
      rank, size: among all processes; local_rank, local_size: among those on this machine. (srun gives each task its
        own cores, so local_size stays 1 there.)
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
    if launch := _by_ranks(environment, by_hand) or _by_srun(environment, proc):
        return launch
    others = {name: environment[name] for name, alone in _ALONE.items() if environment.get(name, "") not in ("", alone)}
    if not others:
        return Launch()
    shown = ", ".join(f"{name}={text[:40]}" for name, text in others.items())
    return Launch(ignored=f"{shown} ignored (incomplete, or not for this process): this process works alone")


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


def _by_ranks(environment: Mapping[str, str], by_hand: bool) -> Launch | None:
    """The launch that RANK and its companions describe; None where they are incomplete, insane or of one process."""
    rank, size, local_rank, local_size = (_number(environment.get(name) or alone) for name, alone in _RANKS.items())
    if rank is None or size is None or local_rank is None or not local_size or not environment.get("RANK"):
        return None
    by_torchrun = bool(environment.get("TORCHELASTIC_RUN_ID"))
    addressed = environment.get("MASTER_ADDR") or environment.get("MASTER_PORT")
    if size == 1 or rank >= size or not (by_torchrun or (by_hand and addressed)):
        return None
    return Launch("torchrun" if by_torchrun else "RANK and WORLD_SIZE", rank, size, local_rank, local_size)


def _by_srun(environment: Mapping[str, str], proc: Path) -> Launch | None:
    """The step of srun that started this process; None where none did, or it has one task."""
    names = ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_TASK_PID")
    rank, step, size, task = (_number(environment.get(name, "")) for name in names)
    if rank is None or step is None or size is None or task is None or size == 1:
        return None
    if rank >= size or step > _LAST_STEP:
        return None
    in_terminal = environment.get("SLURM_PTY_PORT") and task != os.getpid()  # a shell that 'srun --pty' opened
    if in_terminal or task not in _ancestors(proc):
        return None
    return Launch("srun", rank, size, _number(environment.get("SLURM_LOCALID", "")) or 0)


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
