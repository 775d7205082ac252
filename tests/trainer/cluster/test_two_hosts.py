"""Two hosts, as network namespaces: they train what two ranks of one do, and notice when they lose each other."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch

from conftest import REPOSITORY, TINY
from support.forked_python import executable
from support.ranks import JOIN, LOOP, run_ranks


def ip(*arguments) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two hosts that only a cable connects: network namespaces with 10.77.0.1 and 10.77.0.2. Gives their names."""
    tag = f"usi{os.getpid() % 10000:04d}{time.monotonic_ns() % 1000:03d}"
    names = [f"{tag}a", f"{tag}b"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and iproute2 ({getattr(error, 'stderr', None) or error})")
        for number, name in enumerate(names, 1):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on(host: str, command: list, **environment) -> subprocess.Popen:
    """Python on one of the hosts, which Gloo connects by their cable."""
    return subprocess.Popen(
        ["ip", "netns", "exec", host, executable(), *map(str, command)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": host, **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]


def rendezvous(backend: str, node: int) -> list:
    """The arguments of torchrun on each of the two hosts."""
    if backend == "static":
        return ["--node-rank", node, "--master-addr", "10.77.0.1", "--master-port", 29400]
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-conf", f"is_host={1 - node}"] + [
        *("--rdzv-id", "two-hosts", "--local-addr", f"10.77.0.{node + 1}")
    ]


@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.long)])
def test_two_hosts_train_what_two_ranks_on_one_machine_do(digits, hosts, tmp_path, backend):
    arguments = [*TINY, "--data.root", digits, "--run.stop_after_steps", 3, "--run.log_every", 1]
    trainer = [REPOSITORY / "trainer" / "run.py", *arguments, "--run.out", tmp_path / "two"]
    processes = [start_on(host, [*TORCHRUN, *rendezvous(backend, n), *trainer]) for n, host in enumerate(hosts)]
    try:
        for process in processes:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
    finally:
        end_all(processes)
    run_ranks(2, *arguments[len(TINY) :], "--run.out", tmp_path / "one")
    runs = [
        torch.load(tmp_path / run / "checkpoints" / "step-00000003.pt", weights_only=True) for run in ("one", "two")
    ]
    for name, weights in runs[0]["student"].items():
        assert torch.equal(weights, runs[1]["student"][name]), name


def ranks_on(hosts: list[str], command: list, **environment) -> list[subprocess.Popen]:
    """A rank on each host, as srun starts them."""
    master = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29400", "WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return [start_on(host, command, RANK=str(rank), **{**master, **environment}) for rank, host in enumerate(hosts)]


def test_a_cable_that_is_pulled_is_reported_on_both_hosts(hosts):
    processes = ranks_on(hosts, ["-c", LOOP, 4, 0, "nothing"])
    try:
        assert processes[0].stdout.readline() == "now\n"
        ip("-n", hosts[0], "link", "set", hosts[0], "down")
        for rank, process in enumerate(processes):
            _, error = process.communicate(timeout=300)
            assert process.returncode == 1
            assert re.search(rf"\[rank {rank}\] error: (watchdog: )?lost rank {1 - rank} on \S+ in 'step: ", error), (
                error
            )
    finally:
        end_all(processes)


def test_hosts_that_gloo_cannot_connect_say_what_to_look_at(hosts):
    """Both take the loopback for the network, as a machine does whose own name has the address 127.0.0.1."""
    processes = ranks_on(hosts, ["-c", JOIN, 6], FACTS="{}", GLOO_SOCKET_IFNAME="lo")
    try:
        for process in processes:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 1 and "GLOO_SOCKET_IFNAME=eth0 or the like sets it" in error, error
    finally:
        end_all(processes)


@pytest.mark.long
def test_the_trainer_on_two_hosts_ends_when_the_cable_is_pulled(digits, hosts, tmp_path):
    arguments = [*TINY, "--data.root", digits, "--run.out", tmp_path, "--run.watchdog_s", 8, "--schedule.epochs", 400]
    trainer = [REPOSITORY / "trainer" / "run.py", *arguments, "--run.log_every", 1, "--run.eval_every", 400]
    processes = [start_on(host, [*TORCHRUN, *rendezvous("static", n), *trainer]) for n, host in enumerate(hosts)]
    try:
        while "step 60/" not in (line := processes[0].stdout.readline()):
            assert line
        ip("-n", hosts[0], "link", "set", hosts[0], "down")
        for rank, process in enumerate(processes):
            _, error = process.communicate(timeout=300)
            assert process.returncode == 1
            assert re.search(rf"\[rank {rank}\] error: (watchdog: )?lost rank {1 - rank} on \S+ in 'step ", error), (
                error
            )
    finally:
        end_all(processes)
