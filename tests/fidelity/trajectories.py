"""50 updates end with the authors' weights and EMA, within float32's rounding, given the same images.

The other side is their step with timm 0.5.4's own model, mixing, optimizer, schedule and EMA, and where AUTHORS is
given their own train_one_epoch. tests/trainer/update/test_oracle.py says for which models two correct loops can agree
at all: rounding grows where an activation has a kink, or where Adam divides a gradient that is little but rounding.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch

import support.tiny_model  # noqa: F401  (registers tiny_cnn)
from fidelity.old_timm import authors, theirs
from fidelity.rows import Row, within
from support.processes import without_workers
from tools.lib.common.photos import write_digits
from tools.lib.shards.build import BuildOptions
from tools.lib.shards.build import build as build_dataset
from trainer.builder import Run, build
from trainer.cluster.world import World
from trainer.config.sections import Config, parse
from trainer.feed import rank_plans
from trainer.loop import train
from trainer.models.preprocessing import preprocessing

ONE = World(0, 1, 1, torch.device("cpu"))
STEPS, PER_EPOCH, BATCH, DECAY = 50, 5, 64, 0.9
TOLERANCE = 1e-5  # absolute, of weights; of statistics as a fraction of the largest


@dataclasses.dataclass(frozen=True)
class Case:
    """A student.

    Attributes:
      kwargs: the arguments of the installed timm's model.
      eps: AdamW's epsilon; the recipe's is 1e-8.
    """

    name: str
    kwargs: dict
    eps: float


CASES = (
    Case("test_vit", {"qkv_bias": False, "img_size": 32, "depth": 2}, eps=1e-8),
    Case("tiny_cnn", {"act_layer": "silu", "zero_init_last": False}, eps=1e-6),
)


def rows() -> Iterator[Row]:
    """A transformer and a network with BatchNorm, on 320 handwritten digits."""
    with tempfile.TemporaryDirectory() as folder, without_workers():
        write_digits(Path(folder, "images"), num_train=PER_EPOCH * BATCH, num_val=96)
        build_dataset(Path(folder, "images"), Path(folder, "dataset"), BuildOptions())
        torch.manual_seed(5)
        torch.save(timm.create_model("tiny_cnn", num_classes=10).state_dict(), Path(folder, "teacher.pth"))
        for case in CASES:
            yield from _compared(case, Path(folder))


def _compared(case: Case, folder: Path) -> Iterator[Row]:
    config = parse(_arguments(case, folder))
    run = build(config, ONE)
    given = _given(case, config, run, folder)
    found = theirs("trajectories", **given)
    train(build(config, ONE))
    saved = torch.load(folder / case.name / "checkpoints" / f"step-{STEPS:08d}.pt", weights_only=True)
    names = "TrainStep", "train_one_epoch" if authors() else "its steps"
    weights = {name for name, _ in run.state.student.named_parameters()}
    for part, what in (("student", "weights"), ("ema", "EMA")):
        ours = {f"{part} {name}": value.numpy() for name, value in saved[part].items() if "num_batches" not in name}
        chosen = [key for key in ours if key.removeprefix(f"{part} ") in weights]
        pair = [np.concatenate([side[key].ravel() for key in chosen]) for side in (ours, found)]
        begun = np.concatenate([given[key.replace("ema ", "student ")].ravel() for key in chosen])
        note = f"the updates moved them by up to {np.abs(pair[0] - begun).max():.2g}"
        yield within(f"{case.name}: {what} after {STEPS} updates", names, *pair, TOLERANCE, note=note)
        if others := [key for key in ours if key not in chosen]:
            pair = [np.concatenate([side[key].ravel() for key in others]) for side in (ours, found)]
            yield within(f"{case.name}: statistics, {what}", names, *pair, TOLERANCE, relative=True)


def _arguments(case: Case, folder: Path) -> list[str]:
    """A run of ten epochs of five updates, in batches of one group."""
    settings = {
        "data.root": folder / "dataset",
        "data.image_size": 32,
        "student.name": case.name,
        "teacher.name": "tiny_cnn",
        "teacher.checkpoint": folder / "teacher.pth",
        "augment.mix_group": BATCH,
        "run.global_batch": BATCH,
        "run.device": "cpu",
        "run.eval_every": 100,
        "run.out": folder / case.name,
        "optim.eps": case.eps,
        "ema.decay": DECAY,
        "schedule.epochs": 8,
        "schedule.warmup_epochs": 2,
        "schedule.cooldown_epochs": 2,
        **{f"student.kwargs.{name}": str(value).lower() for name, value in case.kwargs.items()},
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def _given(case: Case, config: Config, run: Run, folder: Path) -> dict[str, np.ndarray]:
    """The images before they are mixed, the draws of a plan, the initial weights and the settings."""
    plans = rank_plans(run.plan, 0, STEPS, ONE, BATCH)
    with contextlib.closing(run.pipelines.of["train"].batches(plans)) as batches:
        groups = list(batches)
    teacher = timm.create_model("tiny_cnn", num_classes=10)
    teacher.load_state_dict(torch.load(folder / "teacher.pth", weights_only=True))
    expected = [preprocessing(model) for model in (run.state.student, teacher)]
    return {
        "name": np.array(case.name),
        "per_epoch": np.array(PER_EPOCH),
        "images": np.stack([group.images.permute(0, 3, 1, 2).numpy() for group in groups]),
        "labels": np.stack([group.labels.numpy() for group in groups]),
        "lam": np.array([float(group.lam[0]) for group in groups]),
        "box": np.stack([group.box[0].numpy() for group in groups]),
        "mean": np.array([each.mean for each in expected]),
        "std": np.array([each.std for each in expected]),
        **{f"student {key}": value.numpy().copy() for key, value in run.state.student.state_dict().items()},
        **{f"teacher {key}": value.numpy() for key, value in teacher.state_dict().items()},
        "args opt_eps": np.array(case.eps),
        "args model_ema_decay": np.array(DECAY),
        "args epochs": np.array(config.schedule.epochs),
        "args warmup_epochs": np.array(config.schedule.warmup_epochs),
        "args cooldown_epochs": np.array(config.schedule.cooldown_epochs),
    }
