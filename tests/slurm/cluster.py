"""A SLURM cluster of one node in a folder of its own: munged, slurmctld and slurmd on the loopback interface.

It needs Debian's packages slurm-wlm and munge, and root. Its files, ports and key are its own, so it meets no other
SLURM on the machine.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
# A job that goes back into the queue starts again when its old credential has expired; the default is two minutes.
_CREDENTIAL_S = 5
_CPUS = 8  # More than the machine may have: jobs of eight tasks are tried, too.

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_s}
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
MinJobAge=86400
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """The programs of SLURM and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A running cluster.

    Args:
      folder: holds its files; its path must be short enough for a socket.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def call(self, *command: object) -> str:
        """Call a command of SLURM. Returns what it prints; raises an AssertionError if it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
        return done.stdout

    def submit(self, *arguments: object) -> int:
        """Submit a job with sbatch. Returns its number."""
        return int(self.call("sbatch", "--parsable", *arguments).split()[-1])

    def states(self, job: int) -> list[str]:
        """The state of a job, such as PENDING, RUNNING or COMPLETED; of an array, that of each of its tasks."""
        return re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))

    def await_end(self, job: int, timeout_s: float) -> list[str]:
        """Wait until a job, or each task of an array, has left the queue for good. Returns their states."""
        wait_until(lambda: _GOING_ON.isdisjoint(self.states(job)), timeout_s, f"job {job} has not ended")
        return self.states(job)


_GOING_ON = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}


def wait_until(condition: Callable[[], bool], timeout_s: float, error: str) -> None:
    """Ask twice a second until a condition holds. Raises an AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{error} within {timeout_s:g} s"
        time.sleep(0.5)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that runs inside the block; all its processes end with it."""
    cluster = Cluster(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname(),
            cpus=_CPUS,
            credential_s=_CREDENTIAL_S,
            controller_port=free_port(),
            node_port=free_port(),
        )
    )
    paths = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
    try:
        # --force: the folders above belong to whoever runs the tests.
        options = [f"--{name}={folder / file}" for name, file in paths.items()]
        cluster.call("munged", "--force", f"--key-file={key}", *options)
        cluster.call("slurmctld")
        cluster.call("slurmd")
        wait_until(lambda: "idle" in cluster.call("sinfo", "--noheader"), 60, "the node is not idle")
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            cluster.call("scancel", "--user", "root")
        for name in ("slurmd", "slurmctld", "munged"):
            _end(folder / f"{name}.pid")


def _end(pid_file: Path) -> None:
    """End the process that wrote a file with its number, and wait for it."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except (OSError, ValueError):
        return
