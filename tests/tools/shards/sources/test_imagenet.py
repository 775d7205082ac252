"""ImageNet's own tars, Kaggle's copy and parquet files of the same images."""

import tarfile
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from support.small_sources import (
    DEVKIT_NUMBERS,
    GROUND_TRUTH,
    WNIDS,
    add,
    convert,
    imagenet_images,
    make_folder,
    put_images,
    samples_and_unused,
    samples_of,
    write_as_folder,
    write_ilsvrc,
    write_kaggle,
)
from tools.lib.shards.sources import open_source
from tools.lib.shards.sources.source import EXPECTED, HIDDEN, MISPLACED, RECOGNISE, SourceOptions

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


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


def damage(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


NO_SOLUTIONS = (
    b"",
    b"a,b\n1,2\n",
    b"ImageId,PredictionString\nx,\n",
    bytes(range(256)) * 20,
    b"ImageId,PredictionString\nx\n",
)


@pytest.mark.parametrize("content", NO_SOLUTIONS, ids=["empty", "columns", "no class", "binary", "cut off"])
def test_a_list_that_is_not_kaggles_is_named_in_one_short_line(tmp_path, content):
    write_kaggle(tmp_path / "src")
    damage(tmp_path / "src" / "LOC_val_solution.csv", content)
    with pytest.raises(UserError, match="LOC_val_solution.csv: ") as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_an_image_to_which_kaggles_list_gives_two_classes_is_named(tmp_path):
    write_kaggle(tmp_path / "src")
    path = tmp_path / "src" / "LOC_val_solution.csv"
    header, first, second, *rest = path.read_text().splitlines()
    image, other = first.partition(",")[0], second.partition(",")[2]
    path.write_text("\n".join([header, first, first, second, *rest]))
    convert(tmp_path / "src", tmp_path / "out")  # the same line twice says the same
    path.write_text("\n".join([header, first, second, f"{image},{other}", *rest]))
    with pytest.raises(UserError, match=f"LOC_val_solution.csv: two classes for {image}"):
        convert(tmp_path / "src", tmp_path / "other")


NO_DEVKITS = {
    "not a gzip": lambda tar: None,
    "no meta": lambda tar: add(tar, "x.txt", b"1"),
    "a matlab 7.3 file": lambda tar: add_devkit(tar, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600)),
    "garbage": lambda tar: add_devkit(tar, bytes(range(256))),
}


def add_devkit(tar: tarfile.TarFile, meta: bytes) -> None:
    add(tar, "data/meta.mat", meta)
    add(tar, "data/ILSVRC2012_validation_ground_truth.txt", b"1\n")


@pytest.mark.parametrize("fill", NO_DEVKITS.values(), ids=NO_DEVKITS)
def test_a_devkit_that_is_none_is_named_in_one_line(tmp_path, fill):
    write_ilsvrc(tmp_path / "src")
    path = tmp_path / "src" / "ILSVRC2012_devkit_t12.tar.gz"
    damage(path, b"no gzip")
    if fill is not NO_DEVKITS["not a gzip"]:
        with tarfile.open(path, "w:gz") as tar:
            fill(tar)
    with pytest.raises(UserError, match="not the ILSVRC2012 devkit, or damaged") as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_usual_company_of_imagenets_files_is_listed_and_strangers_are_named(tmp_path):
    write_kaggle(tmp_path / "kaggle")
    put_images(tmp_path / "kaggle", "ILSVRC/Annotations/x.xml", "ILSVRC/ImageSets/", "ILSVRC/Data/CLS-LOC/test/x.JPEG")
    put_images(tmp_path / "kaggle", "LOC_train_solution.csv", "LOC_sample_submission.csv")
    _, unused = samples_and_unused(tmp_path / "kaggle")
    assert len(unused[EXPECTED]) == 5 and not unused[MISPLACED]
    put_images(tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/extra/x.JPEG", "ILSVRC/Data/CLS-LOC/val/more/x.JPEG", "my.zip")
    put_images(tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/train/n01440764.tar")
    _, unused = samples_and_unused(tmp_path / "kaggle")
    assert [each.source.rpartition("/")[2] for each in unused[MISPLACED]] == [
        "my.zip",
        "extra",
        "n01440764.tar",
        "more",
    ]

    write_ilsvrc(tmp_path / "ilsvrc")
    put_images(tmp_path / "ilsvrc", "ILSVRC2012_img_test_v10102019.tar", "meta.bin", "ILSVRC2012_bbox_train_v2.tar.gz")
    _, unused = samples_and_unused(tmp_path / "ilsvrc")
    assert len(unused[EXPECTED]) == 3 and not unused[MISPLACED]


def test_two_kinds_of_sources_in_one_folder_are_distinguished_by_the_option(tmp_path):
    write_ilsvrc(tmp_path / "src")
    make_folder(tmp_path / "src")
    with pytest.raises(UserError, match="train, val: not part of the layout: move it away, or say with --source"):
        convert(tmp_path / "src", tmp_path / "out")
    samples, unused = samples_and_unused(tmp_path / "src", kind="folder")
    assert len(samples) == 12 and len(unused[EXPECTED]) == 3 and not unused[MISPLACED]
    _, unused = samples_and_unused(tmp_path / "src", kind="ilsvrc")
    assert len(unused[EXPECTED]) == 2 and not unused[MISPLACED]


def test_files_in_imagenets_tars_that_are_no_images_are_named(tmp_path):
    write_ilsvrc(tmp_path / "src")
    with tarfile.open(tmp_path / "src" / "ILSVRC2012_img_val.tar", "a") as tar:
        for name in ("labels.txt", "._ILSVRC2012_val_00000001.JPEG"):
            tar.addfile(tarfile.TarInfo(name))
    _, unused = samples_and_unused(tmp_path / "src")
    assert [each.source for each in unused[MISPLACED]] == ["ILSVRC2012_img_val.tar: labels.txt"]
    assert len(unused[HIDDEN]) == 1


def test_hidden_files_are_passed_over_and_counted_in_kaggles_layout(tmp_path):
    write_kaggle(tmp_path / "src")
    before, _ = samples_and_unused(tmp_path / "src")
    folders = ("", "ILSVRC", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val")
    for folder in folders:
        (tmp_path / "src" / folder / "._x.JPEG").write_bytes(b"x")
    after, unused = samples_and_unused(tmp_path / "src")
    assert after == before and len(unused[HIDDEN]) == len(folders)
