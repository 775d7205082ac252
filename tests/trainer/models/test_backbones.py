"""The recipe of configs/usi.yaml on a small model of each family that the paper names, through the whole trainer."""

import json

import pytest
import timm
import torch
from timm.models import mlp_mixer

from conftest import REPOSITORY, run_trainer
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.processes import without_workers
from tools.lib.common.photos import write_digits
from tools.lib.shards.build import BuildOptions
from tools.lib.shards.build import build as build_dataset
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.recipe import audit
from trainer.config.sections import parse
from trainer.loop import train

ONE = World(0, 1, 1, torch.device("cpu"))
SIZE = 32

# Name and arguments. Small variants, and fewer or narrower blocks where there is no small one.
BACKBONES = {
    "ResNet": ("resnet10t", {"channels": [16, 32, 64, 128], "drop_rate": 0.1}),
    "TResNet": ("tresnet_m", {"layers": [1, 1, 1, 1], "width_factor": 0.25}),
    "MobileNetV3": ("mobilenetv3_small_050", {}),
    "EfficientNet": ("tinynet_e", {"drop_rate": 0.2, "drop_path_rate": 0.2}),  # a shallower EfficientNet-B0
    "RegNet": ("regnety_002", {"depth": 7}),
    "LeViT": (
        "levit_128s",
        {"embed_dim": [64, 96, 128], "depth": [1, 1, 1], "num_heads": [2, 3, 4]},
    ),  # two classifiers, one of them of a distillation head
    "DeiT": ("deit_tiny_distilled_patch16_224", {"depth": 2}),  # a distillation token
    "ViT": ("vit_tiny_patch16_224", {"depth": 2, "drop_path_rate": 0.1, "proj_drop_rate": 0.1}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.2},
    ),
    "TNT": ("tnt_s_patch16_224", {"depth": 2, "embed_dim": 192, "num_heads_outer": 3}),
    "Mixer": ("mixer_s16_224", {"mlp_ratio": [0.25, 0.5]}),
    "ResMLP": ("resmlp_12_224", {}),
    "ConvNeXt": ("convnext_atto", {"depths": [1, 1, 1, 1], "drop_path_rate": 0.1}),
    "EdgeNeXt": ("edgenext_xx_small", {"depths": [1, 2, 2, 2]}),
    "CoaT": (
        "coat_tiny",
        {"serial_depths": [1, 1, 1, 1], "parallel_depth": 1, "embed_dims": [32, 40, 40, 40]},
    ),  # blocks that share layers, under several names
}

# The machine leaves no choice in these: with 224 px and 1024 images, one update of ResNet-50 takes two cores minutes.
# Smaller images and fewer of them take seconds, for the same number of updates and forward passes.
MACHINE = {"data.image_size", "run.global_batch", "augment.mix_group"}
OVERRIDES = [
    *("--config", str(REPOSITORY / "configs" / "usi.yaml"), "--run.device", "cpu", "--run.log_every", "1"),
    *("--data.image_size", str(SIZE), "--run.global_batch", "16", "--augment.mix_group", "8"),
]


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """Mixer and ResMLP have two blocks: timm takes no argument for their number."""
    create = mlp_mixer._create_mixer
    monkeypatch.setattr(mlp_mixer, "_create_mixer", lambda *args, **kwargs: create(*args, **kwargs | {"num_blocks": 2}))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Arguments: 16 digits to train on, one update an epoch, as many to validate on, and a teacher of weights."""
    folder = tmp_path_factory.mktemp("small")
    write_digits(folder / "images", num_train=16, num_val=16)
    with without_workers():
        build_dataset(folder / "images", folder / "dataset", BuildOptions())
    torch.manual_seed(5)
    torch.save(timm.create_model("tiny_cnn", num_classes=10).state_dict(), folder / "teacher.pth")
    teacher = ["--teacher.name", "tiny_cnn", "--teacher.checkpoint", str(folder / "teacher.pth")]
    return [*OVERRIDES, "--data.root", str(folder / "dataset"), *teacher]


def student(name: str, kwargs: dict) -> list[str]:
    return ["--student.name", name, "--student.kwargs", json.dumps(kwargs)]


@pytest.mark.parametrize("family", BACKBONES)
def test_the_recipe_trains_evaluates_and_resumes(small, tmp_path, family):
    """Two updates; then the second once more, from the checkpoint between them."""
    arguments = [*small, *student(*BACKBONES[family]), "--run.out", str(tmp_path), "--run.stop_after_steps", "2"]
    config = parse([*arguments, "--run.checkpoint_every", "1"])
    assert {deviation["key"] for deviation in audit(config)} <= MACHINE | {"student.kwargs", "teacher.name"}
    run = build(config, ONE)
    summary = train(run)
    first, second = sorted((tmp_path / "checkpoints").glob("step-*"))
    before, after = (torch.load(path, weights_only=True) for path in (first, second))
    names = [name for name, _ in run.state.student.named_parameters()]
    assert len(after["optimizer"]["state"]) == len(names)  # AdamW keeps nothing of what never had a gradient
    # some do not move in their first digits: queries of attention over a single token, scales behind a layer scale
    moved = [not torch.equal(before["student"][name], after["student"][name]) for name in names]
    assert sum(moved) > 0.9 * len(moved)
    assert all(weights.isfinite().all() for weights in after["student"].values())
    lines = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, 4.8e-4])  # The recipe's first two epochs have these.
    assert all(0 < line["loss"] < 100 for line in lines)
    for weights in ("raw", "ema"):
        assert summary["evaluation"][weights]["images"] == 16
        assert 0 < summary["evaluation"][weights]["loss"] < 100
    second.unlink()
    again = train(build(config, ONE))
    assert again["session"]["start_step"] == 1 and again["evaluation"] == summary["evaluation"]
    resumed = torch.load(second, weights_only=True)
    for part in ("student", "ema"):
        assert all(torch.equal(after[part][name], resumed[part][name]) for name in after[part])


@pytest.mark.long
def test_a_model_that_uses_layers_twice_trains_alike_on_one_rank_and_on_two(small, tmp_path):
    arguments = [*small, *student(*BACKBONES["CoaT"]), "--run.stop_after_steps", "3", "--run.out"]
    train(build(parse([*arguments, str(tmp_path / "1")]), ONE))
    run_trainer(*arguments, tmp_path / "2", ranks=2)
    one, two = (
        torch.load(tmp_path / ranks / "checkpoints" / "step-00000003.pt", weights_only=True) for ranks in ("1", "2")
    )
    for name, weights in one["student"].items():
        assert torch.allclose(weights, two["student"][name], rtol=1e-3, atol=1e-4), name


FIXED = ["LeViT", "DeiT", "ViT", "Swin", "TNT", "Mixer", "ResMLP"]


@pytest.mark.parametrize("family", FIXED)
def test_a_model_of_one_size_is_built_for_the_images_and_refuses_others(small, tmp_path, family):
    name, kwargs = BACKBONES[family]
    assert timm.get_pretrained_cfg(name).fixed_input_size
    assert timm.get_pretrained_cfg(name).input_size[-1] != SIZE
    arguments = [*small, *student(name, kwargs), "--run.out", str(tmp_path / "run"), "--data.eval_image_size", "96"]
    with pytest.raises(UserError, match=f"model '{name}' cannot take images of 96 px"):
        train(build(parse(arguments), ONE))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nest_tiny", "vit_tiny_r_s16_p8_224", "xcit_nano_12_p8_224"])
def test_a_size_that_a_model_cannot_be_built_for_is_refused(small, tmp_path, name):
    """timm asserts it, at times without a word."""
    arguments = [*small, *student(name, {}), "--run.out", str(tmp_path / "run"), "--data.image_size", "50"]
    with pytest.raises(
        UserError, match=f"model '{name}' cannot be built for images of 50 px .* Change the image size or its kwargs"
    ):
        train(build(parse(arguments), ONE))


def test_a_model_that_refuses_a_size_without_a_word_is_refused_with_its_line_of_code(small, tmp_path):
    arguments = [
        *small,
        *student("eca_halonext26ts", {}),
        "--run.out",
        str(tmp_path / "run"),
        "--data.image_size",
        "40",
    ]
    with pytest.raises(UserError, match=r"cannot take images of 40 px in evaluation \(\w+.py:\d+: "):
        train(build(parse(arguments), ONE))


@pytest.mark.parametrize(
    ("name", "kwargs", "found"),
    [
        ("inception_v3", {"aux_logits": True}, "2 outputs"),
        ("vit_tiny_patch16_224", {"depth": 1, "global_pool": ""}, r"\[2, 325, 10\]"),
    ],
)
def test_a_model_that_gives_something_else_than_logits_is_refused(small, tmp_path, name, kwargs, found):
    with pytest.raises(UserError, match=f"model '{name}' gives {found} for 2 images in evaluation, not .2, 10."):
        train(
            build(
                parse([*small, *student(name, kwargs), "--data.image_size", "299", "--run.out", str(tmp_path / "run")]),
                ONE,
            )
        )
    assert not (tmp_path / "run").exists()
