"""Measures what the golden files hold."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import support.tiny_model  # noqa: F401  (registers the student of the checkpoint)
from pipelines import Pipeline, PipelineConfig, open_pipeline
from pipelines.common.errors import UserError
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from support.forked_python import executable
from support.processes import REPOSITORY, without_workers
from tools.lib.common.hardware import machine
from tools.lib.common.photos import write_photographs
from tools.lib.shards.build import BuildOptions, build
from trainer.builder import build as build_run
from trainer.cluster.world import World
from trainer.config.sections import parse, to_yaml
from trainer.loop import train
from trainer.state import checkpoint

FOLDER = Path(__file__).resolve().parent
CPU = torch.device("cpu")
RUN = {
    "data.pipeline": "synthetic",
    "data.synthetic_samples": 384,
    "data.synthetic_classes": 10,
    "data.image_size": 32,
    "student.name": "tiny_cnn",
    "teacher.name": "null",
    "augment.mix_group": 32,
    "run.global_batch": 64,
    "run.device": "cpu",
    "schedule.epochs": 5,
    "schedule.warmup_epochs": 1,
    "schedule.cooldown_epochs": 0,
    "ema.decay": 0.9,
}
STOPPED, STEPS = 6, 10
_OPTION = re.compile(r"--[a-z][\w.-]*")


def where() -> dict[str, str]:
    """What the last bit of a float depends on: software, and the processor's instructions."""
    found = machine()
    kept = ("python", "torch", "torchvision", "pillow", "numpy", "nvidia-dali-cuda120", "timm")
    packages = {name: str(found[name]) for name in kept if name in found}
    return {"cpu": found["cpu"], "instructions": torch.backends.cpu.get_cpu_capability(), **packages}


def recorded() -> list[dict]:
    """Read the software, the processor and the bits of each machine in bits.json."""
    return json.loads((FOLDER / "bits.json").read_text())


def resume(out: Path) -> dict:
    """Resume the run of the golden checkpoint in a new folder, to its end. Returns the summary."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(FOLDER / f"step-{STOPPED:08d}.pt", out / "checkpoints")
    return run_to(out, STEPS)


def resumed_weights() -> str:
    """Resume the golden checkpoint and return `weights_in` its run."""
    with tempfile.TemporaryDirectory() as folder:
        resume(Path(folder) / "run")
        return weights_in(Path(folder) / "run")


def bits() -> dict[str, str]:
    """sha256 of the weights after ten updates, and of the pixels of 64 positions in each pipeline, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        return {"weights": weights(Path(folder) / "run"), **pixels(Path(folder) / "photos")}


def weights(out: Path) -> str:
    """Of a run of ten updates, as `weights_in`."""
    run_to(out, STEPS)
    return weights_in(out)


def weights_in(out: Path) -> str:
    """sha256 of the student, its average and AdamW's state in the checkpoint of the tenth update."""
    last = checkpoint.read(checkpoint.path_of(out / "checkpoints", STEPS))
    return checkpoint.digest_of([last["student"], last["ema"], last["optimizer"]["state"]])


def run_to(out: Path, step: int) -> dict:
    """Start the run, or resume it, until it has done `step` updates. Returns its summary."""
    torch.set_num_threads(1)
    settings = {**RUN, "run.out": out, "run.stop_after_steps": step}
    arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return train(build_run(parse(arguments), World(0, 1, 1, CPU)))


def pixels(folder: Path) -> dict[str, str]:
    """pipeline -> sha256 of the images of positions [0, 64), uint8 [64, 48, 48, 3]."""
    write_photographs(folder / "images")
    with without_workers():
        build(folder / "images", folder / "data", BuildOptions(samples_per_shard=4))
    index = read_index(folder / "data", "train")
    found = {}
    for name in ("torchvision", "dali"):
        config = PipelineConfig(pipeline=name, threads=1, prefetch=1, decode="roi", hw_decoder_load=0.0)
        with contextlib.suppress(UserError):  # DALI is not installed
            pipeline = open_pipeline(index, config, device=CPU, on_damage=lambda *_: None)
            found[name] = _pixels_of(pipeline, index)
    return found


def _pixels_of(pipeline: Pipeline, index: ShardIndex) -> str:
    plan = TrainPlan(index, AugmentConfig(mix_group=8), seed=0, global_batch=8, image_size=48, fill=(124, 116, 104))
    sha = hashlib.sha256()
    plans = (plan.rows(start, start + 8) for start in range(0, 64, 8))
    with contextlib.closing(pipeline.batches(plans)) as batches:
        for batch in batches:
            sha.update(batch.images.numpy())
    return sha.hexdigest()


def settings() -> str:
    """The configuration with its defaults, as YAML."""
    return to_yaml(parse([]))


def options() -> dict[str, list[str]]:
    """command -> the options that its --help names, its subcommands' among them."""
    commands = [
        REPOSITORY / "trainer/run.py",
        *sorted((REPOSITORY / "tools").glob("*.py")),
    ]
    found = {}
    for path in commands:
        if "__main__" in path.read_text():
            found[path.relative_to(REPOSITORY).as_posix()] = sorted(_options_of(path))
    return found


def _options_of(path: Path, *subcommand: str) -> set[str]:
    said = _help([executable(), str(path), *subcommand, "--help"])
    arguments = said.partition("positional arguments:")[2].partition("options:")[0]
    below = [] if subcommand else re.findall(r"^    ([a-z][\w-]*)(?: |$)", arguments, re.MULTILINE)
    inner = (_options_of(path, name) for name in below)
    return functools.reduce(set.union, inner, set(_OPTION.findall(said)))


def _help(command: list[str]) -> str:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
