"""The whole training against a plain loop made of timm's and PyTorch's own parts, given the same batches.

The loop below has no code in common with `trainer/` but the pipeline of its uint8 images. It mixes in float64,
normalises as one reads it in a paper, and takes the mean over the global batch in one piece.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2
from torch.nn import functional

from conftest import TINY
from pipelines.batch import Batch
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.loop import train

ONE = World(0, 1, 1, torch.device("cpu"))
STEPS, PER_EPOCH, GROUP, GROUPS = 50, 5, 16, 4
SCHEDULE = {"epochs": 8, "warmup_epochs": 2, "cooldown_epochs": 2}  # 320 images, 64 an update: 5 updates an epoch
TOLERANCE = 1e-5  # absolute, of every parameter


def mixed(batch: Batch) -> np.ndarray:
    """One group, mixed as docs/recipe.md says: uint8 [B, S, S, 3]."""
    own = batch.images.numpy()
    other, lam, box = own[::-1], batch.lam.double().numpy(), batch.box.numpy()
    result = np.empty_like(own)
    for i, (top, left, height, width) in enumerate(box):
        if height * width:
            result[i] = own[i]
            area = np.s_[top : top + height, left : left + width]
            result[i][area] = other[i][area]
        else:
            result[i] = np.rint(lam[i] * own[i].astype(np.float64) + (1 - lam[i]) * other[i]).astype(np.uint8)
    return result


def targets(batch: Batch) -> torch.Tensor:
    """Soft labels of one group: float32 [B, 10]."""
    own, lam = functional.one_hot(batch.labels, 10).double(), batch.lam.double()[:, None]
    return (lam * own + (1 - lam) * own.flip(0)).float()


def normalized(pixels: np.ndarray, model: torch.nn.Module) -> torch.Tensor:
    """float32 [B, 3, S, S]."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def forward_in_groups(student: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of a global batch whose groups BatchNorm sees apart; its running statistics become the groups' mean."""
    logits, after = [], []
    for group in images.split(GROUP):
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        logits.append(torch.func.functional_call(student, buffers, (group,)))
        after.append(buffers)
    for name, buffer in student.named_buffers():  # a counter of updates: all groups have added 1
        buffer.copy_(torch.stack([buffers[name].double() for buffers in after]).mean(0))
    return torch.cat(logits)


class PlainLoop:
    """The recipe with timm's parts."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module, forward, eps: float):
        self.student, self.teacher, self.forward = student, teacher, forward
        self.ema = ModelEmaV2(student, decay=0.9)
        self.optimizer = create_optimizer_v2(student, opt="adamw", lr=2e-3, weight_decay=2e-2, eps=eps)
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=SCHEDULE["epochs"], lr_min=1e-6, warmup_t=2, warmup_lr_init=1e-4
        )

    def update(self, number: int, groups: list[Batch]) -> None:
        """Update `number`, counted from 0, with its global batch."""
        self.scheduler.step(number // PER_EPOCH)
        pixels = np.concatenate([mixed(group) for group in groups])
        logits = self.forward(self.student, normalized(pixels, self.student))
        with torch.no_grad():
            soft = self.teacher(normalized(pixels, self.teacher)).softmax(1)
        loss = SoftTargetCrossEntropy()(logits, torch.cat([targets(group) for group in groups]))
        loss = loss + 5.0 * functional.kl_div(logits.log_softmax(1), soft, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.student)


def whole(student: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of a global batch in one forward pass."""
    return student(images)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that two correct loops in float32 can agree on for 50 updates, and how.

    Rounding differs between the loops, by 1e-7 of whatever is computed. Most models make that large:
    - Adam divides by the root of the second moment. Where a gradient is little but rounding, the update is up to
      lr x rounding / eps. ViT's bias of the keys has no other gradient (a softmax does not see it), and the first ones
      of a residual branch are tiny whose last BatchNorm weight starts at zero; neither is here. Elsewhere it meets
      single weights whose first gradient is near eps. A larger eps ends it.
    - ReLU and max-pooling have kinks. One activation that falls on the other side changes a gradient by 1e-3, and
      BatchNorm over 16 images makes more of it with every update: timm's test_resnet drifts 0.2 apart, in running
      statistics. So the one here has SiLU, and no max-pooling.

    Attributes:
      forward: how the plain loop computes the logits of a global batch.
      kwargs: of the model.
      eps: of AdamW; the recipe's is 1e-8.
      outliers: single weights, of some 100,000, that may be further apart than the tolerance.
    """

    name: str
    forward: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    kwargs: dict
    eps: float
    outliers: int


SMOOTH = {"act_layer": "silu", "zero_init_last": False}
CASES = [
    # the trainer's 4 micro-batches against the whole global batch at once: the split does not matter
    Case("test_vit", whole, {"qkv_bias": False, "img_size": 32, "depth": 2}, eps=1e-8, outliers=3),
    Case("tiny_cnn", forward_in_groups, SMOOTH, eps=1e-6, outliers=0),
]


def arguments_of(case: Case, digits: Path, teacher: Path, out: Path) -> list[str]:
    """A run of 50 updates with a checkpoint at every tenth."""
    settings = {
        "data.root": digits,
        "student.name": case.name,
        "teacher.name": "tiny_cnn",
        "teacher.checkpoint": teacher,
        "optim.eps": case.eps,
        "augment.mix_group": GROUP,
        "run.eval_every": 100,
        "run.checkpoint_every": 10,
        "run.keep_checkpoints": 5,
        "run.out": out,
        **{f"schedule.{name}": value for name, value in SCHEDULE.items()},
        **{f"student.kwargs.{name}": str(value).lower() for name, value in case.kwargs.items()},
    }
    return [*TINY, *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def assert_follows(ours: dict, theirs: torch.nn.Module, outliers: int) -> None:
    """Parameters within 1e-5; running statistics, which go up to 10, within 5e-5 of their layer's largest."""
    weights = dict(theirs.named_parameters())
    apart = {
        name: (ours[name] - value).abs() for name, value in theirs.state_dict().items() if "num_batches" not in name
    }
    assert ours.keys() == theirs.state_dict().keys()
    assert sum((apart[name] > TOLERANCE).sum().item() for name in weights) <= outliers
    assert max(apart[name].max().item() for name in weights) <= 1e-3
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            assert apart[name].max() <= 5e-5 * max(1.0, buffer.abs().max().item()), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_50_updates_follow_a_plain_loop_of_timms_parts(digits, tmp_path, case):
    torch.manual_seed(5)
    teacher = timm.create_model("tiny_cnn", num_classes=10).eval()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    config = parse(arguments_of(case, digits, tmp_path / "teacher.pth", tmp_path / "run"))
    run = build(config, ONE)
    with contextlib.closing(run.pipelines.of["train"].batches(rank_plans(run.plan, 0, STEPS, ONE, GROUP))) as batches:
        groups = list(batches)
    train(build(config, ONE))
    torch.manual_seed(config.run.seed)
    plain = PlainLoop(timm.create_model(case.name, num_classes=10, **case.kwargs), teacher, case.forward, case.eps)
    for number in range(STEPS):
        plain.update(number, groups[number * GROUPS : (number + 1) * GROUPS])
        done = number + 1
        if done % 10 == 0:
            saved = torch.load(tmp_path / "run" / "checkpoints" / f"step-{done:08d}.pt", weights_only=True)
            assert_follows(saved["student"], plain.student, case.outliers)
            assert_follows(saved["ema"], plain.ema.module, case.outliers)
            counters = {value.item() for name, value in saved["student"].items() if "num_batches" in name}
            assert counters <= {done}
