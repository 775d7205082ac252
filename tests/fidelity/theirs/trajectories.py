"""50 updates of a small model by the authors' step, made of timm 0.5.4's parts."""

import arguments
import torch
from distillation import Teacher, train_epoch
from mixing import mixed
from timm.loss import SoftTargetCrossEntropy
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV2

CLASSES = 10


def vit() -> torch.nn.Module:
    """The installed timm's test_vit with two blocks, for 32 pixels and without biases of queries, keys and values."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 3}
    return VisionTransformer(**sizes, qkv_bias=False, num_classes=CLASSES)


def cnn(act_layer: str = "silu") -> torch.nn.Module:
    """tiny_cnn of tests/support/tiny_model.py."""
    blocks = tuple(ByoBlockCfg("edge", d=1, c=channels, s=2, gs=0, br=1.0) for channels in (16, 32))
    layers = {"downsample": "conv1x1", "act_layer": act_layer, "zero_init_last": False}
    config = ByoModelCfg(blocks=blocks, stem_chs=16, stem_type="3x3", stem_pool="", **layers)
    return ByobNet(config, num_classes=CLASSES)


MODELS = {"test_vit": vit, "tiny_cnn": cnn}


def run(given: dict) -> dict:
    """Return `student KEY` and `ema KEY`, the states after the last update.

    Args:
      given: name of the student; `student KEY` and `teacher KEY`, the states that both start from; mean and std
        float64 [2, 3] of student and teacher; `args KEY`, changes of the authors' arguments; images uint8
        [updates, B, 3, S, S], labels int64 [updates, B], lam float64 [updates], box int64 [updates, 4]; per_epoch, the
        updates of an epoch.
    """
    args = arguments.defaults(**{key: value.item() for key, value in part(given, "args").items()})
    student, teacher = MODELS[str(given["name"])](), cnn("relu")
    for name, model in (("student", student), ("teacher", teacher)):
        model.load_state_dict({key: torch.from_numpy(value) for key, value in part(given, name).items()})
    config = [dict(zip(("mean", "std"), (given["mean"][i], given["std"][i]), strict=True)) for i in (0, 1)]
    student.default_cfg, teacher_config = ({key: tuple(value.tolist()) for key, value in of.items()} for of in config)
    ema = ModelEmaV2(student, decay=args.model_ema_decay)
    batches = [_batch(given, number, student.default_cfg) for number in range(len(given["images"]))]
    _train(args, student, Teacher(teacher, teacher_config), ema, batches, int(given["per_epoch"]))
    states = {"student": student.state_dict(), "ema": ema.module.state_dict()}
    return {f"{name} {key}": value.numpy() for name, state in states.items() for key, value in state.items()}


def part(given: dict, name: str) -> dict:
    """The arrays whose names are `NAME KEY`, by KEY."""
    return {key.removeprefix(f"{name} "): value for key, value in given.items() if key.startswith(f"{name} ")}


def _train(args, student: torch.nn.Module, teacher: Teacher, ema: ModelEmaV2, batches: list, per_epoch: int) -> None:
    """The epochs of the authors' main()."""
    optimizer = create_optimizer_v2(student, **optimizer_kwargs(cfg=args))
    scheduler, num_epochs = create_scheduler(args, optimizer)
    assert num_epochs * per_epoch == len(batches)
    for epoch in range(num_epochs):
        epochs_batches = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        train_epoch(epoch, student, epochs_batches, optimizer, SoftTargetCrossEntropy(), teacher, ema)
        scheduler.step(epoch + 1)


def _batch(given: dict, number: int, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels and soft labels of an update, as timm's PrefetchLoader hands them over."""
    images, labels, lam, box = (given[name][number] for name in ("images", "labels", "lam", "box"))
    pixels, targets = mixed(images, labels, float(lam), box.tolist(), CLASSES)
    mean, std = (torch.tensor([255 * value for value in config[name]]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return torch.from_numpy(pixels).float().sub_(mean).div_(std), torch.from_numpy(targets)
