"""The converter: what goes in comes out, from every kind of source, and at any number of workers and machines."""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from pipelines.shards.index import read_index
from pipelines.shards.manifest import read_manifest
from pipelines.shards.reader import ShardReader
from tools.lib.common.photos import photographs
from tools.lib.shards import manifest_builder
from tools.lib.shards.build import BuildOptions, build, describe, merge
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources import open_source
from tools.lib.shards.sources.source import RECOGNISE, Source, SourceOptions
from tools.shard_imagenet import main

TOOL = [sys.executable, str(REPOSITORY / "tools" / "shard_imagenet.py")]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(src: Path, out: Path, *, samples_per_shard=100, seed=0, audit=True, resize_short=0, **arguments) -> dict:
    image = ImageOptions(audit=audit, resize_short=resize_short)
    return build(src, out, BuildOptions(seed, samples_per_shard, image), **arguments)


def jpeg_of(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def samples_of(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """key -> JPEG and label."""
    index = read_index(root, split)
    jpegs = ShardReader(index).read(np.arange(len(index)))
    rows = zip(index.samples, jpegs, strict=True)
    return {row["key"].decode(): (jpeg.tobytes(), int(row["label"])) for row, jpeg in rows}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes with a PNG, a grayscale JPEG, an upper-case suffix and a name with a dot."""
    src = tmp_path / "src"
    images = [image for _, image, _ in photographs()]
    for i, name in enumerate(("a.JPEG", "b.jpg", "c.jpeg", "d.png", "e.v2.jpg", "f g.jpg")):
        path = src / "train" / ("cat", "dog")[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images[i].save(path, None if path.suffix == ".png" else "JPEG")
    (src / "train" / "cat" / ".DS_Store").write_text("not an image")
    return src


# --- image folders ---


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


def test_the_share_of_a_machine_comes_from_torchrun_or_slurm(digits_folder, tmp_path, monkeypatch, capsys):
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


# --- ImageNet as distributed, Kaggle, parquet, existing tars ---

WNIDS = ["n01440764", "n01443537", "n01484850"]
# the devkit's own numbers are not in the order of the WordNet ids
DEVKIT_NUMBERS = {1: "n01484850", 2: "n01440764", 3: "n01443537"}
GROUND_TRUTH = [3, 1, 2, 1]


def imagenet_images() -> tuple[dict[str, dict[str, bytes]], dict[str, bytes]]:
    """Small stand-ins under ImageNet's names: training by class, validation by file."""
    photos = [image for _, image, _ in photographs()]
    train = {
        wnid: {f"{wnid}_{k}.JPEG": jpeg_of(photos[3 * c + k].resize((60 + k, 40 + c))) for k in range(3)}
        for c, wnid in enumerate(WNIDS)
    }
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg_of(photos[i].resize((50, 70 + i))) for i in range(4)}
    return train, val


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_ilsvrc(root: Path) -> None:
    from scipy.io import savemat

    train, val = imagenet_images()
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, content in reversed(train[wnid].items()):
                    add(inner, name, content)
            add(outer, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, content in reversed(val.items()):
            add(tar, name, content)
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros(4, dtype=[(name, object) for name in (*fields, "num_train_images")])
    for row, (number, wnid) in enumerate(DEVKIT_NUMBERS.items()):
        synsets[row] = (number, wnid, f"words of {wnid}", "gloss", 0, np.zeros(0), 0, 3)
    synsets[3] = (4, "n00001740", "entity", "inner node", 2, np.array([1, 2]), 5, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in GROUND_TRUTH).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


def write_as_folder(root: Path) -> None:
    train, val = imagenet_images()
    labelled = zip(val.items(), GROUND_TRUTH, strict=True)
    files = {f"train/{wnid}/{name}": content for wnid in train for name, content in train[wnid].items()}
    files |= {f"val/{DEVKIT_NUMBERS[number]}/{name}": content for (name, content), number in labelled}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_kaggle(root: Path) -> None:
    train, val = imagenet_images()
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    files = {f"train/{wnid}/{name}": content for wnid in train for name, content in train[wnid].items()}
    files |= {f"val/{name}": content for name, content in val.items()}
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, number in reversed(list(zip(val, GROUND_TRUTH, strict=True))):
            writer.writerow([Path(name).stem, f"{DEVKIT_NUMBERS[number]} 1 2 3 4 {DEVKIT_NUMBERS[number]} 5 6 7 8 "])
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} words of {wnid}\n" for wnid in WNIDS))


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    write_as_folder(root / "src")
    convert(root / "src", root / "out")
    return root / "out"


@pytest.mark.parametrize("write", [write_ilsvrc, write_kaggle])
def test_imagenets_own_layouts_give_the_samples_of_the_folder(write, from_folder, tmp_path):
    write(tmp_path / "src")
    manifest = convert(tmp_path / "src", tmp_path / "out")
    assert manifest["source"]["kind"] == write.__name__.removeprefix("write_")
    assert manifest["classes"] == WNIDS
    assert manifest["class_names"] == [f"words of {wnid}" for wnid in WNIDS]
    for split in ("train", "val"):
        assert samples_of(tmp_path / "out", split) == samples_of(from_folder, split)
    # the label of each validation image, from the ground truth
    labels = [label for _, (_, label) in sorted(samples_of(tmp_path / "out", "val").items(), key=lambda s: s[0][-4:])]
    assert labels == [WNIDS.index(DEVKIT_NUMBERS[number]) for number in GROUND_TRUTH]
    assert (tmp_path / "out" / "train" / "train-00000.tar").read_bytes() == (
        from_folder / "train" / "train-00000.tar"
    ).read_bytes()


@pytest.mark.parametrize("named", [True, False])
def test_parquet_files_give_the_images_and_labels_of_their_rows(tmp_path, named):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    train, val = imagenet_images()
    src = tmp_path / "src"
    (src / "data").mkdir(parents=True)
    rows = [(content, label) for label, wnid in enumerate(WNIDS) for content in train[wnid].values()]
    splits = {"train-00000-of-00002": rows[:5], "train-00001-of-00002": rows[5:]}
    splits["validation-00000-of-00001"] = [(content, 1) for content in val.values()]
    metadata = {"huggingface": '{"info": {"features": {"label": {"names": ["tench", "goldfish", "shark"]}}}}'}
    for name, part in splits.items():
        images = [{"bytes": content, "path": f"{i}.JPEG"} for i, (content, _) in enumerate(part)]
        table = pa.table({"image": images, "label": [label for _, label in part]})
        table = table.replace_schema_metadata(metadata if named else None)
        parquet.write_table(table, src / "data" / f"{name}.parquet", row_group_size=2)
    manifest = convert(src, tmp_path / "out")
    assert manifest["classes"] == (["tench", "goldfish", "shark"] if named else ["0", "1", "2"])
    assert sorted(samples_of(tmp_path / "out").values()) == sorted(rows)
    assert sorted(samples_of(tmp_path / "out", "val").values()) == sorted(splits["validation-00000-of-00001"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "audit.jsonl", "train", "val"}


def test_existing_webdataset_tars_are_indexed_and_not_touched(digits, tmp_path):
    root = tmp_path / "wds"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for path in sorted((digits / split).glob("*.tar")):
            (root / split / path.name).write_bytes(path.read_bytes())
    (root / "train" / "train-00000.idx").write_text("v1.2 1\njpg 1 2 other.jpg\n")
    with pytest.raises(UserError, match="train-00000.idx: describes another tar"):
        index_webdataset(root)
    (root / "train" / "train-00000.idx").unlink()
    before = tree(root)
    index_webdataset(root, workers=2)
    after = tree(root)
    assert {name: after[name] for name in before} == before
    for split in ("train", "val"):
        assert samples_of(root, split) == samples_of(digits, split)
        ours, theirs = read_index(digits, split).samples, read_index(root, split).samples
        assert np.array_equal(ours, theirs)
        assert (root / split / f"{split}-00000.idx").read_bytes() == (
            digits / split / f"{split}-00000.idx"
        ).read_bytes()


def test_tars_of_another_writer_are_indexed_too(tmp_path):
    """Other members, other order, another extension, a sample without a label and one with a PNG."""
    root = tmp_path / "wds"
    (root / "train").mkdir(parents=True)
    photo = photographs()[0][1].resize((40, 30))
    with tarfile.open(root / "train" / "a.tar", "w") as tar:
        add(tar, "x/1.json", b"{}")
        add(tar, "x/1.jpeg", jpeg_of(photo))
        add(tar, "x/1.cls", b"2\n")
        add(tar, "x/2.jpg", jpeg_of(photo))
        add(tar, "x/3.jpg", jpeg_of(photo, format="PNG"))
        add(tar, "x/3.cls", b"0")
    with pytest.raises(UserError, match=r"2 samples cannot be used: train/a.tar: x/2: has jpg; .*x/3: PNG image"):
        index_webdataset(root)
    assert not (root / "manifest.json").exists()
    (root / "train" / "b.tar.gz").touch()
    with pytest.raises(UserError, match=r"b.tar.gz: compressed, .*unpack it with gunzip"):
        index_webdataset(root)
    (root / "train" / "b.tar.gz").unlink()
    manifest = index_webdataset(root, skip_bad=True)
    assert samples_of(root) == {"x/1": (jpeg_of(photo), 2)}
    assert manifest["audit"]["counts"]["rejected"] == 2 and len(manifest["classes"]) == 3
    with pytest.raises(UserError, match="exists already"):
        index_webdataset(root)


@pytest.mark.parametrize("position", [0, 512 * 4 + 3, -1])
def test_damaged_headers_of_tars_are_named_and_not_taken_for_the_end(digits, tmp_path, position):
    root = tmp_path / "wds"
    (root / "train").mkdir(parents=True)
    content = bytearray((digits / "train" / "train-00000.tar").read_bytes())
    if position < 0:
        content = content[: 512 * 9 + 100]  # cut off within a header
    else:
        content[position] ^= 1
    (root / "train" / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a.tar: (damaged or cut off at byte|not an uncompressed tar, or damaged)"):
        index_webdataset(root)


def test_names_that_occur_twice_in_a_tar_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        for name in ("1.cls", "1.jpg", "2.cls", "2.jpg", "1.cls"):
            add(tar, name, b"0")
    with pytest.raises(UserError, match="1.cls occurs twice"):
        index_webdataset(tmp_path)


def test_absurd_class_numbers_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        add(tar, "1.cls", b"3000000")
        add(tar, "1.jpg", jpeg_of(photographs()[0][1]))
    with pytest.raises(UserError, match="class numbers up to 3000000 for 1 samples"):
        index_webdataset(tmp_path)


def test_a_kind_of_source_can_be_forced(tmp_path):
    write_kaggle(tmp_path / "src")
    write_as_folder(tmp_path / "src")
    assert open_source(tmp_path / "src", RECOGNISE, tmp_path).kind == "kaggle"
    assert open_source(tmp_path / "src", SourceOptions("folder"), tmp_path).kind == "folder"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: (src / "ILSVRC2012_devkit_t12.tar.gz").unlink(), "devkit_t12.tar.gz: not found. Expected"),
        (lambda src: (src / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x"), "not the ILSVRC2012 devkit, or damaged"),
        (lambda src: (src / "ILSVRC2012_img_train.tar").write_bytes(b"x" * 999), "not an uncompressed tar, or damaged"),
        (lambda src: spoil_byte(src / "ILSVRC2012_img_train.tar", -1024 * 12), "damaged or cut off at byte"),
        (lambda src: spoil_byte(src / "ILSVRC2012_img_train.tar", 512 + 3), "damaged"),
        (lambda src: spoil_byte(src / "ILSVRC2012_img_train.tar", 3), "damaged"),
        (lambda src: cut(src / "ILSVRC2012_devkit_t12.tar.gz", 300), "not the ILSVRC2012 devkit, or damaged"),
        (lambda src: cut(src / "ILSVRC2012_img_val.tar", 3000), "damaged"),
    ],
)
def test_damaged_imagenet_files_are_named(tmp_path, spoil, message):
    write_ilsvrc(tmp_path / "src")
    spoil(tmp_path / "src")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil_byte(path: Path, position: int) -> None:
    """Flip a bit of the header at `position`, or of the last header before it where it is counted from the end."""
    content = bytearray(path.read_bytes())
    if position < 0:
        with tarfile.open(path) as tar:
            position = tar.getmembers()[-1].offset + 3
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_a_kaggle_solution_that_lacks_images_is_refused(tmp_path):
    write_kaggle(tmp_path / "src")
    solution = tmp_path / "src" / "LOC_val_solution.csv"
    solution.write_text("\n".join(solution.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(UserError, match=r"ILSVRC2012_val_\d+ is not among its lines \(2 such\)"):
        convert(tmp_path / "src", tmp_path / "out")


def test_rejected_images_of_containers_are_named(tmp_path):
    write_ilsvrc(tmp_path / "src")
    path = tmp_path / "src" / "ILSVRC2012_img_val.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
    content = bytearray(path.read_bytes())
    content[member.offset_data : member.offset_data + 4] = b"oops"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"ILSVRC2012_img_val.tar: {member.name} \(not an image\)"):
        convert(tmp_path / "src", tmp_path / "out")


# --- the audit ---


def misfits() -> dict[str, tuple[bytes, str]]:
    """File name -> content and what it is repaired for: every kind of image that cannot be used as it is."""
    photo = photographs()[0][1].resize((80, 60))
    deep = (np.asarray(photo.convert("L")).astype(np.uint16) << 8) | 0x34
    palette = photo.quantize(32)
    rgba = photo.convert("RGBA")
    rgba.putalpha(128)
    return {
        "png.JPEG": (jpeg_of(photo, format="PNG"), "PNG image, mode RGB"),
        "cmyk.jpg": (jpeg_of(photo.convert("CMYK")), "JPEG of mode CMYK"),
        "alpha.png": (jpeg_of(rgba, format="PNG"), "PNG image, mode RGBA"),
        "deep.png": (jpeg_of(Image.fromarray(deep), format="PNG"), "PNG image, mode I;16"),
        "palette.png": (jpeg_of(palette, format="PNG"), "PNG image, mode P"),
        "gif.jpg": (jpeg_of(photo, format="GIF"), "GIF image, mode P"),
        "gray-alpha.png": (jpeg_of(photo.convert("LA"), format="PNG"), "PNG image, mode LA"),
    }


def rejects() -> dict[str, tuple[bytes, str]]:
    photo = photographs()[0][1].resize((80, 60))
    whole = jpeg_of(photo)
    bomb = jpeg_of(Image.new("L", (30_000, 5_000)), format="PNG")
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"this is not an image", "not an image"),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "header.jpg": (whole[:200], "cannot be decoded"),
        "bomb.png": (bomb, "absurd dimensions: 30000 x 5000"),
    }


def put(folder: Path, files: dict[str, tuple[bytes, str]], class_id: str = "cat") -> None:
    for name, (content, _) in files.items():
        path = folder / "train" / class_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_misfits_become_rgb_jpegs_of_the_same_picture_and_are_listed(folder, tmp_path):
    put(folder, misfits())
    manifest = convert(folder, tmp_path / "out")
    listed = {item["sample"]: item["reason"] for item in manifest["audit"]["repaired"]}
    assert listed == {
        **{f"train/cat/{Path(name).stem}": reason for name, (_, reason) in misfits().items()},
        "train/dog/d": "PNG image, mode RGB",
    }
    photo = np.asarray(photographs()[0][1].resize((80, 60))).astype(int)
    gray = np.asarray(photographs()[0][1].resize((80, 60)).convert("L")).astype(int)
    samples = samples_of(tmp_path / "out")
    for name in misfits():
        image = Image.open(io.BytesIO(samples[f"cat/{Path(name).stem}"][0]))
        assert image.format == "JPEG" and image.mode == "RGB" and image.size == (80, 60)
        expected = np.repeat(gray[..., None], 3, 2) if name in ("deep.png", "gray-alpha.png") else photo
        assert abs(np.asarray(image).astype(int) - expected).mean() < 12, name  # 32 colours are the coarsest


def test_plain_jpegs_keep_their_bytes(folder, tmp_path):
    photo = photographs()[1][1].resize((70, 90))
    plain = {
        "gray.jpg": (jpeg_of(photo.convert("L")), ""),
        "progressive.jpg": (jpeg_of(photo, progressive=True), ""),
        "exif.jpg": (jpeg_of(photo, exif=_orientation(6)), ""),
    }
    put(folder, plain)
    manifest = convert(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    for name, (content, _) in plain.items():
        assert samples[f"cat/{Path(name).stem}"][0] == content
    assert manifest["audit"]["oriented"] == ["train/cat/exif"]
    rows = read_index(tmp_path / "out", "train").samples
    row = rows[rows["key"] == b"cat/exif"][0]
    assert (row["orientation"], row["height"], row["width"]) == (6, 90, 70)


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_images_that_cannot_be_used_are_all_named_and_nothing_is_made(folder, tmp_path):
    put(folder, rejects())
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "out")
    assert "5 images cannot be used" in str(error.value) and "--on-bad skip" in str(error.value)
    for name, (_, reason) in rejects().items():
        assert f"train/cat/{name} (" in str(error.value) and reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used_are_left_out_when_asked_and_listed(folder, tmp_path):
    convert(folder, tmp_path / "clean")
    put(folder, rejects())
    with pytest.raises(UserError):
        convert(folder, tmp_path / "out")
    manifest = convert(folder, tmp_path / "out", skip_bad=True)
    assert {Path(item["source"]).name for item in manifest["audit"]["rejected"]} == set(rejects())
    assert samples_of(tmp_path / "out") == samples_of(tmp_path / "clean")


def test_images_that_were_repaired_in_place_are_taken_the_second_time(folder, tmp_path):
    bad = folder / "train" / "cat" / "bad.jpg"
    bad.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"1 images cannot be used: train/cat/bad.jpg"):
        convert(folder, tmp_path / "out")
    bad.write_bytes(jpeg_of(photographs()[0][1]))
    convert(folder, tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 7


def test_duplicates_are_found_within_a_split_and_across_splits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_builder, "_HASHES_AT_A_TIME", 3)  # several passes
    for copy in ("train/dog/copy.jpg", "val/cat/leak.jpg"):
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        (folder / copy).write_bytes((folder / "train" / "cat" / "a.JPEG").read_bytes())
    (folder / "val" / "dog").mkdir()
    (folder / "val" / "dog" / "other.jpg").write_bytes(jpeg_of(photographs()[7][1]))
    manifest = convert(folder, tmp_path / "out", samples_per_shard=2)
    assert manifest["audit"]["duplicates"] == [["train/cat/a", "train/dog/copy", "val/cat/leak"]]


def test_tiny_images_are_counted_with_examples(digits):
    audit = read_manifest(digits)["audit"]
    assert audit["counts"]["tiny"] == 416 and len(audit["tiny"]) == 416
    remarks = [json.loads(line) for line in (digits / "audit.jsonl").read_text().splitlines()]
    assert [remark["what"] for remark in remarks if remark["kind"] == "tiny"] == audit["tiny"]


def test_without_the_audit_bytes_are_the_same_and_damage_stays_unnoticed(digits_folder, digits, folder, tmp_path):
    convert(digits_folder, tmp_path / "fast", audit=False)
    assert samples_of(tmp_path / "fast") == samples_of(digits)
    whole = jpeg_of(photographs()[0][1])
    put(folder, {"truncated.jpg": (whole[: len(whole) // 2], "")})
    convert(folder, tmp_path / "out", audit=False)
    assert "cat/truncated" in samples_of(tmp_path / "out")


def test_shrinking_only_ever_shrinks_and_the_index_follows(folder, tmp_path):
    manifest = convert(folder, tmp_path / "out", resize_short=60)
    assert manifest["options"]["resize_short"] == 60
    rows = {row["key"].decode(): row for row in read_index(tmp_path / "out", "train").samples}
    originals = {"a": "cat/a.JPEG", "c": "cat/c.jpeg", "d": "dog/d.png", "e_v2": "cat/e.v2.jpg", "f_g": "dog/f g.jpg"}
    resized = 0
    for name, file in originals.items():
        original = Image.open(folder / "train" / file)
        row = rows[f"{Path(file).parent}/{name}"]
        if min(original.size) > 60:
            resized += 1
            assert min(row["height"], row["width"]) == 60
            assert row["height"] / row["width"] == pytest.approx(original.height / original.width, rel=0.02)
        else:
            assert (row["width"], row["height"]) == original.size
        jpeg = Image.open(io.BytesIO(samples_of(tmp_path / "out")[f"{Path(file).parent}/{name}"][0]))
        assert jpeg.size == (row["width"], row["height"])
    assert manifest["audit"]["counts"]["resized"] == resized + 1  # and dog/b


# --- mistakes ---


def test_a_class_folder_without_images(folder, tmp_path):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty: no images"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_validation_class_that_is_not_in_training(folder, tmp_path):
    (folder / "val" / "horse").mkdir(parents=True)
    with pytest.raises(UserError, match="val/horse: a class that train lacks"):
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
        ("val/loose.jpg", "1 images lie directly in it"),
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


def test_a_validation_folder_of_another_name_is_not_left_out_unnoticed(folder, tmp_path):
    (folder / "validation").mkdir()
    with pytest.raises(UserError, match="validation: the validation images belong in .*val. Rename it"):
        convert(folder, tmp_path / "out")


def test_a_dataset_is_not_written_into_its_source(folder):
    with pytest.raises(UserError, match="lies inside its own source"):
        convert(folder, folder / "out")


def test_a_long_list_of_rejected_images_goes_into_a_file(folder, tmp_path):
    put(folder, {f"{i}.jpg": (b"", "") for i in range(120)})
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
    assert done.stderr.splitlines()[-1].startswith("error: ") and "none: not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_tells_what_a_dataset_holds(digits, capsys):
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
