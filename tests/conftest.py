"""Small real datasets: scikit-learn's handwritten digits, and crops of its two photographs.

torch and timm are imported where they are used: the process that starts those of xdist runs no test, and does without.
"""

import contextlib
import fcntl
import functools
import gc
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; before torch is imported

import numpy as np
import pytest

from pipelines.shards.index import ShardIndex, read_index
from support.forked_python import executable, start_for_workers
from support.processes import REPOSITORY, without_workers
from tools.lib.common.photos import write_digits, write_photographs
from tools.lib.shards.build import BuildOptions, build

# A worker takes one file after the other. These take 10 s or more and come first: none is left when the rest is done.
SLOW = (
    *("test_gpu_stub", "test_replay", "test_chaos", "test_shard_faults", "test_benchmark", "test_backbones"),
    *("test_resume_ranks", "test_compare", "test_watchdog", "test_resume", "test_record_teacher", "test_run"),
    *("test_doctor", "test_exact_resume", "test_together", "test_rendezvous", "test_recorders", "test_torch_ops"),
    *("test_compiler", "test_export", "test_compiled_kernels", "test_teacher_agreement", "test_two_hosts"),
    *("test_attention", "test_checkpoint_settings", "test_preemption", "test_study_graph", "test_study_running"),
    *("test_parity", "test_oracle", "test_quarantine", "test_full_disk", "test_teacher", "test_dali", "test_codec"),
    *("test_evaluate", "test_bounds", "test_uneven_ranks", "test_nonfinite", "test_factory", "test_report"),
    *("test_writer", "test_batch_norm"),
)


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """`-m gpu` opens no file without such tests: a borrowed machine may lack what the other files import."""
    if config.option.markexpr == "gpu" and collection_path.is_file() and "mark.gpu" not in collection_path.read_text():
        return True
    return None


def pytest_collection_modifyitems(items):
    import torch

    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_configure(config):
    """The processes of xdist are forks of one that has imported everything, and share it for those that tests start."""
    if config.getoption("numprocesses", None) and not config.option.collectonly and not hasattr(config, "workerinput"):
        config.option.tx = [f"popen//python={start_for_workers(config.args)}"] * len(config.option.tx)
    else:
        import support.tiny_model  # noqa: F401  (registers the student of most runs here)


def pytest_collection_finish():
    """Keep the garbage collector from looking through all imported modules again and again: they stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same random numbers every time, alone or behind any others."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """The report at a run's end gets empty pictures: to draw them takes as long as a short run. test_report.py does."""
    report = sys.modules.get("trainer.monitor.report.page")
    if report is not None and request.path.stem != "test_report":
        monkeypatch.setattr(report, "draw", lambda chart: b"")


@pytest.fixture(scope="session")
def made_once(request, tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Gives the file or folder of a name; the first of xdist's processes that asks for it makes it with a function."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # The processes have it in common.

    def made(name: str, make: Callable[[Path], object]) -> Path:
        complete = root / f"{name}.complete"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                make(root / name)
                complete.touch()
        return root / name

    return made


def convert_here(source: Path, out: Path, samples_per_shard: int) -> None:
    """Convert a folder of images without workers."""
    with without_workers():
        build(source, out, BuildOptions(samples_per_shard=samples_per_shard))


@pytest.fixture(scope="session")
def digits_folder(made_once) -> Path:
    """An image folder of 320 training and 96 validation digits, 8 x 8 pixels, ten classes."""
    return made_once("digits-images", lambda folder: write_digits(folder, num_train=320, num_val=96))


@pytest.fixture(scope="session")
def digits(digits_folder, made_once) -> Path:
    """The same as a dataset folder, in several shards."""
    return made_once("digits", lambda out: convert_here(digits_folder, out, samples_per_shard=100))


@pytest.fixture(scope="session")
def photos(made_once) -> ShardIndex:
    """The photographs as a dataset's training split."""
    folder = made_once("photographs", write_photographs)
    return read_index(made_once("photos", lambda out: convert_here(folder, out, samples_per_shard=4)), "train")


@pytest.fixture
def jobs_in_this_process() -> Iterator[None]:
    """Jobs of `build`, `index` and `verify` run here: test_build.py and test_shard_faults.py use workers."""
    with without_workers():
        yield


@pytest.fixture(scope="module")
def onnx_translations_read_once() -> Iterator[None]:
    """Inside, torch reads the sources of its translations to ONNX once, and not for each file, which takes a second."""
    with pytest.MonkeyPatch.context() as here:
        with contextlib.suppress(ImportError):  # where another torch has it elsewhere, the tests take longer
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            here.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


def fake_index(num_samples: int, num_classes: int = 10, seed: int = 0) -> ShardIndex:
    """An index without shards, with the sizes of ordinary photographs: enough for the plan."""
    from pipelines.shards.index import synthetic_index

    index = synthetic_index(num_samples, num_classes)
    generator = np.random.default_rng(seed)
    index.samples["height"] = generator.integers(50, 800, num_samples)
    index.samples["width"] = generator.integers(50, 800, num_samples)
    return index


TINY = [
    *("--student.name", "tiny_cnn", "--teacher.name", "null", "--data.image_size", "32"),
    *("--augment.mix_group", "32", "--run.global_batch", "64", "--ema.decay", "0.9", "--run.device", "cpu"),
    *("--schedule.epochs", "4", "--schedule.warmup_epochs", "1", "--schedule.cooldown_epochs", "0"),
]
DROPOUT = ["--student.kwargs.drop_rate", "0.2", "--student.kwargs.drop_path_rate", "0.1"]
EVERY_3 = ["--run.checkpoint_every", "3", "--run.log_every", "1"]


@pytest.fixture(scope="session")
def tiny_run(digits, made_once) -> Path:
    """A run of 30 steps on the digits, a little better than chance, with checkpoints of the steps 10, 20 and 30."""
    settings = {"schedule.epochs": 6, "optim.lr": 0.01, "run.checkpoint_every": 10, "run.keep_checkpoints": 3}
    arguments = [text for key, value in settings.items() for text in (f"--{key}", value)]
    return made_once("tiny", lambda out: train_here(digits, out, *arguments))


@pytest.fixture(scope="session")
def tiny_teacher(tiny_run) -> list[str]:
    """Arguments for a teacher that has learned a little: the end of `tiny_run`."""
    checkpoint = tiny_run / "checkpoints" / "step-00000030.pt"
    return ["--teacher.name", "tiny_cnn", "--teacher.checkpoint", str(checkpoint)]


@pytest.fixture(scope="session")
def undisturbed(digits, made_once) -> Path:
    """The folder of a run of 20 steps that nothing has stopped. Tests copy what they change."""
    return made_once("undisturbed", lambda out: train_here(digits, out))


@pytest.fixture(scope="session")
def teacher(made_once) -> list[str]:
    """Arguments for a teacher with weights of its own (not a good one)."""
    import timm
    import torch

    def save(path: Path) -> None:
        torch.manual_seed(5)
        torch.save({"model": timm.create_model("test_resnet", num_classes=10).state_dict()}, path)

    return ["--teacher.name", "test_resnet", "--teacher.checkpoint", str(made_once("teacher.pth", save))]


@pytest.fixture(scope="session")
def distilled(digits, teacher, made_once) -> Path:
    """The folder of a run of 20 steps (4 epochs of 5) that was never stopped, with dropout and a teacher."""
    return made_once("distilled", lambda out: train_here(digits, out, *teacher, *DROPOUT, *EVERY_3))


@pytest.fixture
def one_machine(monkeypatch):
    """This process is rank 0 of two on one machine."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())


def train_here(root: Path, out: Path, *arguments) -> dict:
    """A run with the settings in TINY in this process, of one rank. Returns its summary; mistakes are UserErrors."""
    import torch

    from trainer.builder import build as build_run
    from trainer.cluster.world import World
    from trainer.config.sections import parse
    from trainer.loop import train

    settings = [*TINY, "--data.root", root, "--run.out", out, *arguments]
    config = parse([str(text) for text in settings])
    device = torch.device("cuda", 0) if config.run.device == "cuda" else torch.device("cpu")
    return train(build_run(config, World(0, 1, 1, device)))


def run_trainer(
    *arguments, ranks: int = 1, torchrun: bool = False, check: bool = True, **popen
) -> subprocess.CompletedProcess:
    """trainer/run.py in a process of its own, with the settings in TINY; under torchrun if that is asked for, or needed
    for several ranks."""
    command = [executable()]
    if ranks > 1 or torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(REPOSITORY / "trainer" / "run.py"), *TINY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **popen)
    assert not check or done.returncode == 0, done.stderr
    return done
