"""What GPUs add to a run: NCCL between its ranks, one process on each GPU, a micro-batch found by trying.

Where a claim does not need a GPU it is made about a CPU and Gloo, too, so that the test itself is known to work.
"""

import ast
import contextlib
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import REPOSITORY, TINY, run_trainer, train_here
from pipelines.common.files import read_json_lines
from tools.lib.benchmark import gpu as gpus
from trainer.builder import build
from trainer.cluster import rendezvous
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.update.step import TrainStep, data_parallel

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
GPUS = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")],
)
# Losses differ: the order of sums does, and GPUs choose among algorithms.
TOLERANCE = {"cpu": 1e-4, "cuda": 0.01}
PLAIN = ["--data.pipeline", "torchvision", "--run.compile", "false", "--run.precision", "fp32", "--run.log_every", 1]


@contextlib.contextmanager
def group_of_one(device: torch.device):
    """The default process group, of this process alone, over NCCL on a GPU and Gloo on a CPU."""
    try:
        rendezvous.connect(dist.HashStore(), 0, 1, device, 60)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def lines_of(out: Path, kind: str) -> list[dict]:
    return [line for line in read_json_lines(out / "metrics.jsonl") if line["kind"] == kind]


# --- NCCL ---


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_single_rank_connects_to_itself_and_its_collectives_give_back_what_they_get(device):
    device = torch.device(device, 0)
    with group_of_one(device):
        assert dist.get_backend() == {"cpu": "gloo", "cuda": "nccl"}[device.type]
        values = torch.arange(6.0, device=device)
        dist.all_reduce(values)
        dist.broadcast(values, 0)
        assert values.tolist() == [0, 1, 2, 3, 4, 5]
        chosen, gathered = [{"decode": "roi"}], [None]
        dist.broadcast_object_list(chosen, device=device)
        dist.all_gather_object(gathered, ["a sample"])
        dist.barrier()
        assert (chosen, gathered) == ([{"decode": "roi"}], [["a sample"]])


def gradients_of_an_update(digits: Path, out: Path, device: torch.device, *, ddp: bool) -> torch.Tensor:
    """The student's, float64 [N], of an update of two micro-batches, with or without DDP around it."""
    arguments = [*TINY, "--data.root", digits, "--run.out", out, *PLAIN, "--run.device", device.type]
    world = World(0, 1, 1, device)
    run = build(parse([str(text) for text in arguments]), world)
    if ddp:
        run.step._model = data_parallel(run.step._model)
    plans = rank_plans(run.plan, 0, 1, world, run.state.micro_batch)
    assert run.config.run.global_batch == 2 * run.state.micro_batch
    with contextlib.closing(run.pipelines.of["train"].batches(plans)) as batches:
        run.step(batches, 0)
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in run.state.student.parameters()])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_ddp_over_a_single_rank_gives_the_gradients_that_there_are_without_it(digits, tmp_path, device):
    """Its buckets, and gradients that are summed over the ranks behind the last micro-batch only."""
    device = torch.device(device, 0)
    plain = gradients_of_an_update(digits, tmp_path, device, ddp=False)
    with group_of_one(device):
        found = gradients_of_an_update(digits, tmp_path, device, ddp=True)
    assert (found - plain).norm() <= TOLERANCE[device.type] * plain.norm() and plain.norm() > 0


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_torchrun_with_a_single_rank_trains_what_the_plain_command_does(digits, tmp_path, device):
    arguments = ["--data.root", digits, *PLAIN, "--run.stop_after_steps", 4, "--run.device", device, "--run.out"]
    run_trainer(*arguments, tmp_path / "plain")
    run_trainer(*arguments, tmp_path / "torchrun", torchrun=True)
    plain, found = ([line["loss"] for line in lines_of(tmp_path / out, "train")] for out in ("plain", "torchrun"))
    assert len(found) == 4 and found == pytest.approx(plain, rel=0 if device == "cpu" else TOLERANCE[device])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), GPUS])
def test_two_ranks_train_and_evaluate_what_one_does(digits, tmp_path, device):
    arguments = ["--data.root", digits, *PLAIN, "--augment.mix_group", 16, "--run.stop_after_steps", 5]
    for ranks in (1, 2):
        run_trainer(*arguments, "--run.device", device, "--run.out", tmp_path / str(ranks), ranks=ranks)
    one, two = (lines_of(tmp_path / ranks, "train") for ranks in ("1", "2"))
    assert len(one) == 5
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=TOLERANCE[device])
    (alone,), (together,) = (lines_of(tmp_path / ranks, "eval") for ranks in ("1", "2"))
    assert alone["raw"]["images"] == together["raw"]["images"] == 96
    assert together["raw"]["loss"] == pytest.approx(alone["raw"]["loss"], rel=10 * TOLERANCE[device])


# --- the micro-batch that was found ---


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_after_auto_a_run_evaluates_and_changes_its_size_as_with_the_same_micro_batch_by_hand(digits, tmp_path, device):
    """What was tried for it leaves nothing behind in pipelines, statistics or the memory of the GPU."""
    arguments = [*PLAIN, "--data.pipeline", {"cpu": "torchvision", "cuda": "dali"}[device], "--data.decode", "full"]
    arguments += ["--data.image_size", "[[0,24],[1,32]]", "--run.stop_after_steps", 7]
    for name, micro_batch in (("auto", "auto"), ("by hand", {"cpu": 32, "cuda": 64}[device])):
        train_here(digits, tmp_path / name, *arguments, "--run.device", device, "--run.micro_batch", micro_batch)
    found, by_hand = (lines_of(tmp_path / name, "train") for name in ("auto", "by hand"))
    exact = device == "cpu"
    expected = [line["loss"] for line in by_hand]
    assert len(found) == 7
    assert [line["loss"] for line in found] == (expected if exact else pytest.approx(expected, rel=TOLERANCE[device]))
    (evaluated,), (other,) = (lines_of(tmp_path / name, "eval") for name in ("auto", "by hand"))
    assert evaluated["step"] == 5 and evaluated["raw"]["images"] == evaluated["ema"]["images"] == 96
    assert evaluated["raw"]["loss"] == pytest.approx(other["raw"]["loss"], rel=0 if exact else 0.1)


# --- one process on a GPU ---


def test_the_probe_is_the_only_process_that_a_rank_starts():
    """Another one could open the GPU, which exclusive-process mode refuses, and would take memory in any mode."""
    starting = {"subprocess", "Popen", "Process", "fork", "posix_spawn", "ProcessPoolExecutor"}
    for path in [path for folder in ("pipelines", "trainer") for path in sorted((REPOSITORY / folder).rglob("*.py"))]:
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
        assert not names & starting or path.name == "dali_probe.py", f"{path.name}: {names & starting}"


def test_what_starts_the_parts_of_the_first_ten_minutes_leaves_the_gpu_alone(tmp_path, monkeypatch):
    def open_gpu(*_):
        raise AssertionError("this process opens the GPU")

    for name in ("_lazy_init", "get_device_name", "get_device_properties", "set_device"):
        monkeypatch.setattr(torch.cuda, name, open_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus, "_MACHINE", 'print(\'{"gpu": "one"}\')')
    gpus.gpu(tmp_path, parts={"part": ("-c pass", 60)})
    assert re.search('"part": "done"', (tmp_path / gpus.SUMMARY).read_text())


@pytest.mark.gpu
def test_a_run_is_the_only_new_process_on_its_gpu(digits, tmp_path, monkeypatch):
    """Compiling has workers; none may have opened the GPU by the second update."""
    nvml = pytest.importorskip("pynvml")
    nvml.nvmlInit()
    torch.ones(1, device="cuda")
    gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")

    def processes() -> set[int]:
        return {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}

    before, meanwhile = processes(), []
    if os.getpid() not in before:
        pytest.skip("NVML does not name this process: it is another one outside of this container")
    call = TrainStep.__call__

    def looking(self, batches, number):
        meanwhile.append(processes())
        return call(self, batches, number)

    monkeypatch.setattr(TrainStep, "__call__", looking)
    arguments = ["--run.device", "cuda", "--run.compile", "true", "--run.stop_after_steps", 2]
    arguments += ["--data.pipeline", "torchvision"]
    train_here(digits, tmp_path, *arguments)
    assert len(meanwhile) == 2 and meanwhile[0] | meanwhile[1] <= before
