"""A conversion of an image folder: what goes in comes out, at any number of workers and machines; and mistakes."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.shards.index import read_index
from pipelines.shards.manifest import read_manifest
from pipelines.shards.reader import ShardReader
from support.small_sources import TOOL, convert, jpeg_of, make_mixed_folder, samples_of, tree, write_images
from tools.lib.common.photos import photographs
from tools.lib.shards.build import BuildOptions, describe, merge
from tools.lib.shards.sources.source import Source
from tools.shard_imagenet import main


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_mixed_folder(tmp_path / "src")


def test_every_image_of_the_folder_is_in_the_shards_with_its_bytes_label_and_size(digits_folder, digits):
    manifest = read_manifest(digits)
    assert manifest["classes"] == [str(digit) for digit in range(10)]
    for split, count in (("train", 320), ("val", 96)):
        files = sorted((digits_folder / split).glob("*/*.jpg"))
        assert len(files) == count == manifest["splits"][split]["samples"]
        expected = {f"{p.parent.name}/{p.stem}": (p.read_bytes(), int(p.parent.name)) for p in files}
        assert samples_of(digits, split) == expected
        index = read_index(digits, split)
        assert set(zip(index.samples["height"].tolist(), index.samples["width"].tolist(), strict=True)) == {(8, 8)}
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


def test_the_idx_files_are_what_dalis_own_tool_writes(digits, tmp_path):
    for shard in sorted(digits.rglob("*.tar")):
        command = [Path(sys.executable).with_name("wds2idx"), shard, tmp_path / "own.idx"]
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / "own.idx").read_text().split() == shard.with_suffix(".idx").read_text().split()


def test_plain_tar_lists_the_shards(digits):
    index = read_index(digits, "val")
    listed = subprocess.run(["tar", "tf", index.paths[0]], capture_output=True, text=True, check=True).stdout.split()
    keys = [key.decode() for key in index.samples["key"]]
    assert listed == [f"{key}.{extension}" for key in keys for extension in ("cls", "jpg")]


def test_training_samples_are_shuffled_by_the_seed_and_validation_is_not(digits_folder, digits, tmp_path):
    convert(digits_folder, tmp_path / "other", seed=1)
    ours, other = read_index(digits, "train"), read_index(tmp_path / "other", "train")
    assert sorted(ours.samples["key"]) == sorted(other.samples["key"])
    assert (ours.samples["key"] != other.samples["key"]).mean() > 0.9
    assert (np.diff(ours.samples["label"]) != 0).mean() > 0.8  # about 0.9 when shuffled
    assert (np.diff(read_index(digits, "val").samples["label"]) >= 0).all()
    assert ours.digest != other.digest


def test_the_same_bytes_for_any_number_of_workers_and_machines(digits_folder, digits, tmp_path):
    convert(digits_folder, tmp_path / "three", workers=3)
    assert tree(tmp_path / "three") == tree(digits)
    for part in (2, 0, 1):
        assert convert(digits_folder, tmp_path / "parts", part=(part, 3)) is None
    merge(tmp_path / "parts")
    assert tree(tmp_path / "parts") == tree(digits)


def test_merge_names_the_shards_that_are_missing(digits_folder, tmp_path):
    convert(digits_folder, tmp_path / "parts", part=(0, 2))
    with pytest.raises(UserError, match=r"2 shards are missing \(train-00001, train-00003\)"):
        merge(tmp_path / "parts")
    with pytest.raises(UserError, match="none.partial: not found. Run 'build' with --part"):
        merge(tmp_path / "none")


def test_the_part_of_a_machine_comes_from_torchrun_or_slurm(digits_folder, tmp_path, monkeypatch, capsys):
    arguments = ["build", str(digits_folder), str(tmp_path / "out"), "--samples-per-shard", "100"]
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, size, number in (("RANK", "WORLD_SIZE", "0"), ("SLURM_PROCID", "SLURM_NTASKS", "1")):
        monkeypatch.setenv(rank, number)
        monkeypatch.setenv(size, "2")
        main(arguments)
        if rank == "RANK":
            monkeypatch.delenv(rank)
            monkeypatch.delenv(size)
        out, err = capsys.readouterr()
        assert f"part {int(number) + 1}/2 is done" in out
        launcher = "torchrun" if rank == "RANK" else "srun"
        assert f"this is part {int(number) + 1}/2, for {launcher} started 2 processes. --part 1/1 converts" in err
    main(["merge", str(tmp_path / "out")])
    assert len(read_index(tmp_path / "out", "train")) == 320


def test_other_formats_become_jpeg_and_their_size_is_recorded(folder, tmp_path):
    convert(folder, tmp_path / "out")
    index = read_index(tmp_path / "out", "train")
    keys = [key.decode() for key in index.samples["key"]]
    assert sorted(keys) == ["cat/a", "cat/c", "cat/e_v2", "dog/b", "dog/d", "dog/f_g"]
    for row, jpeg in zip(index.samples, ShardReader(index).read(np.arange(6)), strict=True):
        image = Image.open(io.BytesIO(jpeg))
        assert image.format == "JPEG" and image.size == (row["width"], row["height"])
    png = np.asarray(Image.open(folder / "train" / "dog" / "d.png")).astype(int)
    converted = np.asarray(Image.open(io.BytesIO(samples_of(tmp_path / "out")["dog/d"][0])))
    assert abs(png - converted).mean() < 2


def test_tar_headers_carry_no_time_user_or_host(digits):
    for path in sorted(digits.rglob("*.tar")):
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_the_manifest_counts_and_hashes(digits):
    manifest = read_manifest(digits)
    assert manifest["source"]["kind"] == "folder" and manifest["options"]["samples_per_shard"] == 100
    for split, entry in manifest["splits"].items():
        assert entry["samples"] == sum(shard["samples"] for shard in entry["shards"])
        for shard in entry["shards"]:
            content = (digits / split / shard["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_a_class_folder_without_images(folder, tmp_path):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty: no images"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_validation_class_that_is_not_in_training(folder, tmp_path):
    (folder / "val" / "horse").mkdir(parents=True)
    with pytest.raises(UserError, match="val/horse: not a class folder that train has"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("parts", [[], [""], ["train"]], ids=["missing", "empty", "no classes"])
def test_a_source_without_anything(tmp_path, parts):
    for part in parts:
        (tmp_path / "src" / part).mkdir(parents=True)
    with pytest.raises(UserError, match="Expected"):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("val/loose.jpg", "val: has no class folders"),
        ("train/cat/sub/x.jpg", "train/cat/sub: a folder inside a class"),
    ],
)
def test_images_in_the_wrong_place_are_not_left_out_unnoticed(folder, tmp_path, file, message):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(jpeg_of(photographs()[0][1]))
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "out")


def test_a_broken_link_is_not_left_out_unnoticed(folder, tmp_path):
    (folder / "train" / "cat" / "link.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="train/cat/link.jpg: a link to nowhere.jpg, which is not there"):
        convert(folder, tmp_path / "out")


def test_what_is_no_image_is_refused_with_its_name(folder, tmp_path):
    (folder / "train" / "cat" / "a.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"1 images cannot be used: train/cat/a.txt \(not an image\)"):
        convert(folder, tmp_path / "out")
    assert len(samples_of_skipping(folder, tmp_path / "out")) == 6


def samples_of_skipping(folder: Path, out: Path) -> dict:
    convert(folder, out, skip_bad=True)
    return samples_of(out)


def test_a_dataset_is_not_written_into_its_source(folder):
    with pytest.raises(UserError, match="lies inside its own source"):
        convert(folder, folder / "out")


def test_a_long_list_of_rejected_images_goes_into_a_file(folder, tmp_path):
    write_images(folder, {f"{i}.jpg": (b"", "") for i in range(120)})
    with pytest.raises(UserError, match=r"120 images cannot be used: .* and 115 more, all of them in .*rejected.txt"):
        convert(folder, tmp_path / "out")
    assert len((tmp_path / "out.partial" / "rejected.txt.partial").read_text().splitlines()) == 120


def test_two_classes_of_one_name(folder, tmp_path):
    for name in ("a b", "a_b"):
        (folder / "train" / name).mkdir()
    with pytest.raises(UserError, match="folders that would be one class: a b and a_b"):
        convert(folder, tmp_path / "out")


def test_a_source_that_changes_during_or_after_a_conversion_is_noticed(folder, tmp_path):
    convert(folder, tmp_path / "parts", samples_per_shard=2, part=(0, 2))
    convert(folder, tmp_path / "done")
    photographs()[1][1].save(folder / "train" / "cat" / "new.jpg")
    with pytest.raises(UserError, match="its train images have changed since the conversion began"):
        convert(folder, tmp_path / "parts", samples_per_shard=2, part=(1, 2))
    with pytest.raises(UserError, match="made differently: the source's train images are others by now"):
        convert(folder, tmp_path / "done")
    (folder / "val" / "cat").mkdir(parents=True)
    photographs()[1][1].save(folder / "val" / "cat" / "new.jpg")
    with pytest.raises(UserError, match=r"made differently: splits was \['train'\], now it is \['train', 'val'\]"):
        convert(folder, tmp_path / "done")


def test_two_files_of_one_name(folder, tmp_path):
    (folder / "train" / "cat" / "a.jpg").write_bytes((folder / "train" / "cat" / "a.JPEG").read_bytes())
    with pytest.raises(UserError, match="train/cat/a.jpg: would be the same sample as a.JPEG: rename one"):
        convert(folder, tmp_path / "out")


def test_names_may_be_long_and_of_any_script(folder, tmp_path):
    content = (folder / "train" / "cat" / "a.JPEG").read_bytes()
    names = ["x" * 150, "\u732b \u4e00", 'it\'s "quoted"']
    for name in names:
        (folder / "train" / "cat" / f"{name}.jpg").write_bytes(content)
    convert(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert all(samples[f"cat/{name.replace(' ', '_')}"] == (content, 0) for name in names)
    index = read_index(tmp_path / "out", "train")
    read = webdataset.WebDataset([str(path) for path in index.paths], shardshuffle=False)
    assert {sample["__key__"] for sample in read} == set(samples)


def test_another_commands_leftovers_are_never_touched(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="exists already and is not a dataset"):
        convert(folder, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "precious").touch()
    with pytest.raises(UserError, match="was not left by this tool"):
        convert(folder, tmp_path / "new")
    assert (tmp_path / "out" / "precious").exists() and (tmp_path / "new.partial" / "precious").exists()


def test_an_unfinished_conversion_with_other_options_is_refused_with_the_difference(digits_folder, tmp_path):
    convert(digits_folder, tmp_path / "out", part=(0, 2))
    with pytest.raises(UserError, match="another one: samples_per_shard was 100, now it is 50"):
        convert(digits_folder, tmp_path / "out", samples_per_shard=50)


def test_a_finished_dataset_is_left_alone(digits_folder, digits):
    before = tree(digits)
    convert(digits_folder, digits)
    with pytest.raises(UserError, match="made differently: seed was 0, now it is 1"):
        convert(digits_folder, digits, seed=1)
    assert tree(digits) == before


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [*TOOL, "build", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/none: not found. Expected") and done.stderr.count("\n") == 1


def test_info_shows_what_a_dataset_holds(digits, capsys):
    main(["info", str(digits)])
    text = capsys.readouterr().out
    assert "320 images in 4 shards" in text and "96 images in 1 shards" in text and "folder: digits" in text


def test_options_are_plain_values_of_the_manifest():
    described = describe(_source(), BuildOptions())
    assert described["options"] == {
        "seed": 0,
        "samples_per_shard": 5000,
        "audit": True,
        "resize_short": 0,
        "quality": 90,
    }


def _source():
    return Source("folder", Path(os.devnull), ["a"], [], {}, lambda location: b"")
