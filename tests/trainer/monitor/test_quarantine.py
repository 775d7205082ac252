"""Damaged images never end a run, and are named exactly once; too many of them do end it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from conftest import TINY, run_trainer, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.index import read_index
from pipelines.shards.quarantine import QUARANTINE
from support.ranks import run_ranks
from support.tiny_runs import ONE
from tools.lib.shards.build import BuildOptions, build
from trainer.monitor.quarantine import Quarantine
from trainer.run import main


def flip_bytes(root, split: str, samples: np.ndarray, seed: int = 0) -> set[tuple[str, str, str, int]]:
    """Change one random byte of each sample's JPEG. Returns their (split, shard, key, offset)."""
    index, generator = read_index(root, split), np.random.default_rng(seed)
    changed = set()
    for row in index.samples[samples]:
        path = index.paths[row["shard"]]
        with open(path, "r+b") as file:
            place = int(row["offset"]) + int(generator.integers(row["nbytes"]))
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ int(generator.integers(1, 256))]))
        changed.add((split, path.name, row["key"].decode(), int(row["offset"])))
    return changed


def named(run) -> list[tuple[str, str, str, int]]:
    return [(line["split"], line["shard"], line["key"], line["offset"]) for line in read_json_lines(run / QUARANTINE)]


@pytest.fixture(scope="module")
def damaged(digits, tmp_path_factory):
    """The digits with 5 damaged training and 3 damaged validation images, and which these are."""
    root = shutil.copytree(digits, tmp_path_factory.mktemp("quarantine") / "damaged")
    bad = flip_bytes(root, "train", np.array([0, 17, 100, 101, 319])) | flip_bytes(root, "val", np.array([0, 50, 95]))
    return root, bad


EACH = ("--augment.repeats", "1")  # every image is shown
ALL = (*EACH, "--data.max_bad_fraction", "0.04")


@pytest.fixture(scope="module")
def stopped(damaged, tmp_path_factory) -> Path:
    """A run of the damaged digits that was stopped after its first epoch, in which all were shown."""
    out = tmp_path_factory.mktemp("quarantine") / "stopped"
    train_here(damaged[0], out, *EACH, "--data.max_bad_fraction", "1", "--run.stop_after_steps", 5)
    assert len(named(out)) == 8
    return out


def assert_each_named_once(run: Path, bad: set, said: str) -> None:
    """Of a run that ended normally."""
    assert len(named(run)) == 8 and set(named(run)) == bad
    said = " ".join(said.split())  # a terminal's width breaks lines
    assert "damaged and replaced: train: sample" in said and f"8 in all, named in {run}" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["quarantined"] == 8


def test_each_damaged_image_is_named_once_and_the_run_ends_normally(damaged, tmp_path, capsys):
    root, bad = damaged
    train_here(root, tmp_path / "run", *ALL)
    assert_each_named_once(tmp_path / "run", bad, capsys.readouterr().out)


def test_two_ranks_name_each_damaged_image_once_and_end_normally(damaged, tmp_path):
    """Some of the validation images are seen by the second one alone, in every epoch."""
    root, bad = damaged
    few = ("--schedule.epochs", "2", "--run.eval_batch", "16")
    said = run_ranks(2, "--data.root", root, "--run.out", tmp_path / "run", *ALL, *few)
    assert_each_named_once(tmp_path / "run", bad, said)


def test_a_run_that_goes_on_names_nothing_twice(damaged, stopped, tmp_path):
    root, bad = damaged
    run = shutil.copytree(stopped, tmp_path / "run")
    path = run / QUARANTINE
    path.write_text(path.read_text() + '{"split": "tr')  # killed while it wrote
    assert train_here(root, run, *ALL)["session"]["start_step"] == 5
    assert len(named(run)) == 8 and set(named(run)) == bad


def test_the_limit_counts_what_earlier_sessions_found(damaged, stopped, tmp_path):
    """It is not passed by stopping and resuming, if only for a step."""
    run = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match="5 of the 320 images in 'train' are damaged"):
        train_here(damaged[0], run, *EACH, "--data.max_bad_fraction", "0.01", "--run.stop_after_steps", 6)


def test_too_many_damaged_images_end_the_run_and_are_named(damaged, tmp_path, capsys):
    root, bad = damaged
    strict = (*EACH, "--data.max_bad_fraction", "0.01", "--run.log_every", "5")
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--data.root", str(root), "--run.out", str(tmp_path / "run"), *strict])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "of the 320 images in 'train' are damaged, more than data.max_bad_fraction, 0.01" in said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert named(tmp_path / "run") and set(named(tmp_path / "run")) <= bad


def test_recorders_of_one_store_count_what_each_other_have_named(digits, tmp_path):
    """Each is a world of its own, and all write the same file."""
    index, path = read_index(digits, "train"), tmp_path / QUARANTINE
    one, other = (Quarantine(path, {"train": index}, 0.004, ONE) for _ in range(2))  # one of 320 images
    one.collector("train")(3, "cut off")
    assert "1 new, 1 in all" in one.record_new()
    other.collector("train")(3, "cut off")
    assert other.record_new() == "" and len(read_json_lines(path)) == 1
    other.collector("train")(200, "cut off")
    for each in (other, one):
        with pytest.raises(UserError, match="2 of the 320 images in 'train' are damaged"):
            each.record_new()


def test_a_single_damaged_image_never_ends_a_run(digits, tmp_path):
    root = shutil.copytree(digits, tmp_path / "damaged")
    bad = flip_bytes(root, "train", np.array([5]))
    arguments = (*EACH, "--schedule.epochs", "2")
    assert train_here(root, tmp_path / "run", *arguments)["finished"]
    assert set(named(tmp_path / "run")) == bad
    with pytest.raises(UserError, match="1 of the 320 images in 'train' are damaged"):
        train_here(root, tmp_path / "none", *arguments, "--data.max_bad_fraction", "0")


@pytest.mark.long
@pytest.mark.parametrize("pipeline", ["torchvision", "dali"])
def test_a_thousand_damaged_of_twenty_thousand_are_named_exactly(tmp_path, pipeline):
    write_crops(tmp_path / "src", 20_000)
    build(tmp_path / "src", tmp_path / "data", BuildOptions(samples_per_shard=2000), workers=2)
    bad = flip_bytes(tmp_path / "data", "train", np.random.default_rng(1).permutation(20_000)[:1000])
    arguments = ("--augment.repeats", "1", "--data.max_bad_fraction", "0.1", "--data.pipeline", pipeline)
    # 80 divides 20,000: nothing is dropped.
    epochs = ("--schedule.epochs", "2", "--run.global_batch", "80", "--augment.mix_group", "16")
    run_trainer("--data.root", tmp_path / "data", "--run.out", tmp_path / "run", *arguments, *epochs)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
    assert len(named(tmp_path / "run")) == 1000 and set(named(tmp_path / "run")) == bad


def write_crops(folder: Path, count: int) -> None:
    """Small pieces of a photograph, each another one."""
    picture = Image.fromarray(load_sample_images().images[0])
    for i in range(count):
        left, top = i % 500, i // 500
        path = folder / "train" / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.crop((left, top, left + 64, top + 48)).save(path)
