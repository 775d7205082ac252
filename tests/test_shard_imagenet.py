import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import REPOSITORY, photographs
from PIL import Image

from pipelines.errors import UserError
from pipelines.index import read_index, read_manifest
from pipelines.reader import ShardReader
from tools.shard_imagenet import build

TOOL = [sys.executable, str(REPOSITORY / "tools" / "shard_imagenet.py"), "build"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(src: Path, out: Path, **options) -> dict:
    return build(src, out, **{"seed": 0, "samples_per_shard": 100, "workers": 1, **options})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes with a PNG, a grayscale JPEG, an upper-case suffix and a name with a dot."""
    src = tmp_path / "src"
    images = [image for _, image, _ in photographs()]
    for i, name in enumerate(("a.JPEG", "b.jpg", "c.jpeg", "d.png", "e.v2.jpg", "f.jpg")):
        path = src / "train" / ("cat", "dog")[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images[i].save(path, None if path.suffix == ".png" else "JPEG")
    (src / "train" / "cat" / "notes.txt").write_text("not an image")
    return src


def test_every_image_of_the_folder_is_in_the_shards_with_its_bytes_label_and_size(digits_folder, digits):
    manifest = read_manifest(digits)
    assert manifest["classes"] == [str(digit) for digit in range(10)]
    for split, count in (("train", 320), ("val", 96)):
        index = read_index(digits, split)
        found = {}
        for row, jpeg in zip(index.samples, ShardReader(index).read(np.arange(count)), strict=True):
            found[row["key"].decode()] = (jpeg.tobytes(), int(row["label"]), (int(row["height"]), int(row["width"])))
        files = sorted((digits_folder / split).glob("*/*.jpg"))
        assert len(files) == count == len(found) == manifest["splits"][split]["samples"]
        for path in files:
            key = f"{path.parent.name}/{path.stem}"
            assert found[key] == (path.read_bytes(), int(path.parent.name), (8, 8))
        labels = [int(path.parent.name) for path in files]
        assert manifest["splits"][split]["class_counts"] == np.bincount(labels, minlength=10).tolist()


def test_webdataset_reads_the_shards(digits):
    index = read_index(digits, "train")
    samples = list(webdataset.WebDataset([str(path) for path in index.paths], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key.decode() for key in index.samples["key"]]
    assert [int(sample["cls"]) for sample in samples] == index.samples["label"].tolist()


def test_dali_reads_the_shards_through_their_idx_files(digits):
    from nvidia.dali import fn, pipeline_def

    index = read_index(digits, "val")

    @pipeline_def(batch_size=96, num_threads=1, device_id=None)
    def graph():
        paths = [str(path) for path in index.paths]
        idx = [path.replace(".tar", ".idx") for path in paths]
        return tuple(fn.readers.webdataset(paths=paths, index_paths=idx, ext=["jpg", "cls"]))

    pipeline = graph()
    pipeline.build()
    jpegs, labels = pipeline.run()
    expected = ShardReader(index).read(np.arange(96))
    for i in range(96):
        assert np.array_equal(np.array(jpegs.at(i)), expected[i])
        assert int(bytes(np.array(labels.at(i)))) == index.samples["label"][i]


def test_training_samples_are_shuffled_by_the_seed_and_validation_is_not(digits_folder, digits, tmp_path):
    convert(digits_folder, tmp_path / "other", seed=1)
    ours, other = read_index(digits, "train"), read_index(tmp_path / "other", "train")
    assert sorted(ours.samples["key"]) == sorted(other.samples["key"])
    assert (ours.samples["key"] != other.samples["key"]).mean() > 0.9
    assert (np.diff(ours.samples["label"]) != 0).mean() > 0.8  # about 0.9 when shuffled
    assert (np.diff(read_index(digits, "val").samples["label"]) >= 0).all()
    assert ours.digest != other.digest


def test_the_same_bytes_for_any_number_of_workers(digits_folder, digits, tmp_path):
    convert(digits_folder, tmp_path / "again", workers=3)
    assert tree(tmp_path / "again") == tree(digits)


def test_other_formats_become_jpeg_and_their_size_is_recorded(folder, tmp_path):
    convert(folder, tmp_path / "out")
    index = read_index(tmp_path / "out", "train")
    keys = [key.decode() for key in index.samples["key"]]
    assert sorted(keys) == ["cat/a", "cat/c", "cat/e_v2", "dog/b", "dog/d", "dog/f"]
    for row, jpeg in zip(index.samples, ShardReader(index).read(np.arange(6)), strict=True):
        image = Image.open(io.BytesIO(jpeg))
        assert image.format == "JPEG" and image.size == (row["width"], row["height"])
    png = np.asarray(Image.open(folder / "train" / "dog" / "d.png")).astype(int)
    converted = np.asarray(Image.open(io.BytesIO(ShardReader(index).read(np.array([keys.index("dog/d")]))[0])))
    assert abs(png - converted).mean() < 2


def test_tar_headers_carry_no_time_user_or_host(digits):
    for path in sorted(digits.rglob("*.tar")):
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_images_that_cannot_be_read_are_all_named_and_nothing_is_left(folder, tmp_path, content):
    for name in ("bad1.jpg", "bad2.jpg"):
        damaged = (folder / "train" / "cat" / "a.JPEG").read_bytes()[:2000] if content is None else content
        (folder / "train" / "cat" / name).write_bytes(damaged)
    with pytest.raises(UserError, match=r"2 images cannot be read.*bad1.jpg.*bad2.jpg"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_class_folder_without_images(folder, tmp_path):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty: no images"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_validation_class_that_is_not_in_training(folder, tmp_path):
    (folder / "val" / "horse").mkdir(parents=True)
    with pytest.raises(UserError, match="val/horse: a class without a training folder"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("make", [lambda src: None, lambda src: (src / "train").mkdir(parents=True)])
def test_a_source_without_anything(tmp_path, make):
    make(tmp_path / "src")
    with pytest.raises(UserError, match="Expected"):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name(folder, tmp_path):
    (folder / "train" / "cat" / "a.jpg").write_bytes((folder / "train" / "cat" / "a.JPEG").read_bytes())
    with pytest.raises(UserError, match="would both be sample cat/a. Rename one"):
        convert(folder, tmp_path / "out")


def test_an_existing_folder_is_never_touched(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="exists already"):
        convert(folder, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match="was not left by this tool"):
        convert(folder, tmp_path / "new")
    assert (tmp_path / "out" / "precious").exists() and (tmp_path / "new.partial").exists()


def test_a_killed_conversion_leaves_no_dataset_and_can_be_repeated(digits_folder, digits, tmp_path):
    out = tmp_path / "out"
    command = [*TOOL, str(digits_folder), str(out), "--samples-per-shard", "100", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "out.partial" / "train").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    subprocess.run(command, check=True, capture_output=True)
    assert tree(out) == tree(digits)
    assert not (tmp_path / "out.partial").exists()


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    done = subprocess.run([*TOOL, str(tmp_path / "none"), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "none/train: not found" in done.stderr


def test_the_manifest_counts_and_hashes(digits):
    import hashlib

    manifest = json.loads((digits / "manifest.json").read_text())
    for split, entry in manifest["splits"].items():
        assert entry["samples"] == sum(shard["samples"] for shard in entry["shards"])
        for shard in entry["shards"]:
            content = (digits / split / shard["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
