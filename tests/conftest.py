"""Small real datasets: scikit-learn's handwritten digits, and crops of its two photographs."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; before torch is imported

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.index import ShardIndex, read_index
from tools.demo import write_digits
from tools.sharding.job import BuildOptions, build

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """An image folder of 320 training and 96 validation digits, 8 x 8 pixels, ten classes."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, num_train=320, num_val=96)
    return folder


@pytest.fixture(scope="session")
def digits(digits_folder, tmp_path_factory) -> Path:
    """The same as a dataset folder, in several shards."""
    out = tmp_path_factory.mktemp("datasets") / "digits"
    build(digits_folder, out, BuildOptions(samples_per_shard=100), workers=2)
    return out


def photographs() -> list[tuple[str, Image.Image, dict]]:
    """Name, picture and JPEG options: ImageNet-like sizes, tall, wide, tiny, grayscale, progressive, without chroma
    subsampling."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    return [
        ("usual", china.crop((60, 20, 560, 395)), {}),
        ("flower", flower.crop((100, 30, 600, 405)), {"quality": 85}),
        ("tall", china.crop((200, 0, 300, 420)), {}),
        ("wide", flower.crop((0, 200, 640, 290)), {}),
        ("small", china.resize((64, 48), Image.Resampling.LANCZOS), {}),
        ("tiny", flower.resize((9, 7), Image.Resampling.LANCZOS), {}),
        ("gray", flower.convert("L"), {}),
        ("progressive", china, {"progressive": True}),
        ("full-chroma", flower.crop((37, 11, 401, 318)), {"subsampling": "4:4:4"}),
        ("odd", china.crop((1, 2, 334, 225)), {"subsampling": "4:2:0", "quality": 75}),
    ]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> ShardIndex:
    """The photographs as a dataset's training split."""
    folder = tmp_path_factory.mktemp("photos")
    for i, (name, image, options) in enumerate(photographs()):
        path = folder / "train" / f"class{i % 2}" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "JPEG", **{"quality": 92, **options})
    out = tmp_path_factory.mktemp("datasets") / "photos"
    build(folder, out, BuildOptions(samples_per_shard=4))
    return read_index(out, "train")


def fake_index(num_samples: int, num_classes: int = 10, seed: int = 0) -> ShardIndex:
    """An index without shards, with the sizes of ordinary photographs: enough for the plan."""
    from pipelines.synthetic import synthetic_index

    index = synthetic_index(num_samples, num_classes)
    generator = np.random.default_rng(seed)
    index.samples["height"] = generator.integers(50, 800, num_samples)
    index.samples["width"] = generator.integers(50, 800, num_samples)
    return index


TINY = [
    *("--student.name", "test_resnet", "--teacher.name", "null", "--data.image_size", "32"),
    *("--augment.mix_group", "16", "--run.global_batch", "64", "--ema.decay", "0.9", "--run.device", "cpu"),
    *("--schedule.epochs", "4", "--schedule.warmup_epochs", "1", "--schedule.cooldown_epochs", "0"),
]


def run_trainer(*arguments, ranks: int = 1, check: bool = True, **popen) -> subprocess.CompletedProcess:
    """trainer/run.py in a process of its own, with the settings in TINY."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(REPOSITORY / "trainer" / "run.py"), *TINY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **popen)
    assert not check or done.returncode == 0, done.stderr
    return done
