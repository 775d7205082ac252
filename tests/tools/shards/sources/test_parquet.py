"""Parquet files of other people: every row becomes a sample or is named, and what a message advises works."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pipelines.common.errors import UserError
from pipelines.shards.manifest import class_order_doubt
from support.hand_made import images_of, jpeg, put, refused
from tools.lib.shards.build import BuildOptions, build
from tools.lib.shards.sources.source import SourceOptions

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


def table(images, labels, names: list[str] | None = None, columns=("image", "label")) -> pa.Table:
    made = pa.table([images, labels], names=columns)
    features = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(features)}) if names else made


def put_rows(path: Path, count: int = 4, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table([jpeg(i) for i in range(count)], [i % 3 for i in range(count)], **options), path)
    return path


def structs(paths: bool = True) -> pa.Array:
    return pa.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} if paths else {"bytes": jpeg(i)} for i in range(4)])


CONTENTS = [jpeg(i) for i in range(4)]


@pytest.mark.parametrize(
    "images",
    [
        structs(),
        structs(paths=False),
        pa.array(CONTENTS, pa.binary()),
        pa.array(CONTENTS, pa.large_binary()),
        pa.array(CONTENTS, pa.binary_view()),
        pa.array(CONTENTS, pa.binary()).dictionary_encode(),
    ],
    ids=lambda array: str(array.type)[:30],
)
def test_images_are_taken_from_bytes_of_every_type(tmp_path, images):
    (tmp_path / "src").mkdir()
    parquet.write_table(table(images, [0, 1, 2, 0]), tmp_path / "src" / "train-0.parquet", row_group_size=3)
    build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert sorted(images_of(tmp_path / "out").values()) == sorted(zip(CONTENTS, [0, 1, 2, 0], strict=True))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_of_text_are_sorted_into_classes_and_their_order_is_stated_or_doubted(tmp_path, kind):
    words = ["10", "9", "cat", "9"]
    (tmp_path / "src").mkdir()
    parquet.write_table(table(CONTENTS, pa.array(words, kind)), tmp_path / "src" / "train-0.parquet")
    for order, classes in (("", ["10", "9", "cat"]), ("text", ["10", "9", "cat"]), ("numeric", ["9", "10", "cat"])):
        options = SourceOptions(class_order=order)
        manifest = build(tmp_path / "src", tmp_path / f"out{order}", BuildOptions(), source_options=options)
        assert (manifest["classes"], manifest["class_order"]) == (classes, order or "unstated")
        assert bool(class_order_doubt(manifest)) == (order == "")
        labels = [classes.index(word) for word in words]
        assert sorted(images_of(tmp_path / f"out{order}").values()) == sorted(zip(CONTENTS, labels, strict=True))


@pytest.mark.parametrize("names", [None, ["b", "a", "c"], ["crane", "dog", "crane"]])
def test_numbers_and_class_label_names_keep_their_order_and_equal_names_stay_two_classes(tmp_path, names):
    put_rows(tmp_path / "src" / "train-0.parquet", names=names)
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert (manifest["classes"], manifest["class_order"]) == (names or ["0", "1", "2"], "given")
    assert sorted(label for _, label in images_of(tmp_path / "out").values()) == [0, 0, 1, 2]
    with pytest.raises(UserError, match="numbers its classes itself"):
        build(tmp_path / "src", tmp_path / "b", BuildOptions(), source_options=SourceOptions(class_order="numeric"))


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/valid-0.parquet", "data/test-0.parquet"),
        ("train/0000.parquet", "val/0000.parquet", "test/0000.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet", "default/test/0000.parquet"),
        ("cifar10/train-0.parquet", "cifar10/val-0.parquet", "cifar10/test-0.parquet"),
        ("data/train/part-0.parquet", "data/valid/part-0.parquet", "data/test/part-0.parquet"),
    ],
)
def test_splits_are_found_by_names_of_files_and_folders_and_a_test_split_is_listed(tmp_path, names):
    for number, name in enumerate(names):
        put_rows(tmp_path / "src" / name, count=6 - number)
    for name in ("README.md", "dataset_infos.json", "LICENSE.txt", "imagenet.py", ".gitattributes"):
        put(tmp_path / "src" / name, b"text")
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert {split: entry["samples"] for split, entry in manifest["splits"].items()} == {"train": 6, "val": 5}
    left_out = {item["source"] for item in manifest["audit"]["left_out"]}
    assert left_out == {"README.md", "dataset_infos.json", "LICENSE.txt", "imagenet.py", names[2]}
    assert manifest["audit"]["hidden"] == [".gitattributes"]


@pytest.mark.parametrize(
    ("name", "helps"),
    [
        ("more-0.parquet", "states no split"),
        ("training_data.arrow", "not a parquet file"),
        ("partial-train/0000.parquet", "states no split"),
        ("extra.csv", "not a parquet file"),
        ("data.parquet.tmp", "not a parquet file"),
    ],
)
def test_everything_visible_beside_parquet_files_is_named_or_left_out_by_decision(tmp_path, name, helps):
    put_rows(tmp_path / "src" / "train-0.parquet")
    put_rows(tmp_path / "src" / name)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"{name}: " in message and helps in message
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)
    assert [item["source"] for item in manifest["audit"]["left_out"]] == [name]


@pytest.mark.parametrize(
    ("names", "missing", "pattern"),
    [
        (["train-00000-of-00002.parquet"], "train-00001-of-00002.parquet", "train-*-of-00002*"),
        (["data/train-00001-of-00002-0f3a.parquet"], "data/train-00000-of-00002-1b.parquet", "data/train-*-of-00002*"),
        (["train-0.parquet", "validation_2_of_2.parquet"], "validation_1_of_2.parquet", "validation_*_of_2*"),
    ],
)
def test_files_that_the_names_of_others_count_are_named_and_taken_once_they_are_there(
    tmp_path, names, missing, pattern
):
    for name in names:
        put_rows(tmp_path / "src" / name)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"would be left out: {pattern}: 1 of 2 files are there: download the others" in message
    put_rows(tmp_path / "src" / missing)
    build(tmp_path / "src", tmp_path / "whole", BuildOptions())


def test_files_of_a_test_split_that_are_missing_are_no_error(tmp_path):
    put_rows(tmp_path / "src" / "train-00000-of-00001.parquet")
    put_rows(tmp_path / "src" / "test-00000-of-00004.parquet")
    build(tmp_path / "src", tmp_path / "out", BuildOptions())


@pytest.mark.parametrize("names", [["0.parquet"], ["data/0.parquet", "data/1.parquet"], ["x.parquet", "val-0.parquet"]])
def test_files_that_state_no_split_are_no_training_files(tmp_path, names):
    for name in names:
        put_rows(tmp_path / "src" / name)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert (
        "no training files below it. The name of a file or of its folder states the split: train-*.parquet" in message
    )


def test_two_datasets_below_one_folder_are_never_mixed(tmp_path):
    put_rows(tmp_path / "src" / "32px" / "train" / "0.parquet")
    put_rows(tmp_path / "src" / "64px" / "train" / "0.parquet")
    assert "several datasets, in 32px, 64px. Give the folder" in refused(
        build, tmp_path / "src", tmp_path / "out", BuildOptions()
    )
    build(tmp_path / "src" / "32px", tmp_path / "out", BuildOptions())
    assert len(images_of(tmp_path / "out")) == 4


def test_links_in_a_circle_are_named(tmp_path):
    put_rows(tmp_path / "src" / "data" / "train-0.parquet")
    (tmp_path / "src" / "data" / "up").symlink_to(tmp_path / "src")
    assert "data/up: a link to a folder above it" in refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite(images=None, labels=(0, 1, 2, 0), **options):
    """Spoils a file by other columns."""
    made = table(CONTENTS if images is None else images, pa.array(labels, options.pop("kind", None)), **options)
    return lambda path: parquet.write_table(made, path)


def spoil_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the first page's header
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: cut(path, 900), "damaged, cut off or no parquet file"),
        (lambda path: cut(path, 0), "damaged, cut off"),
        (spoil_page, "damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda path: path.write_bytes(b"<!doctype html><p>404"), "a web page"),
        (rewrite([], []), "expected encoded images"),
        (rewrite(pa.array([], pa.binary()), (), kind=pa.int64()), "has no rows"),
        (rewrite(labels=(0, 1, None, 0)), "label None; expected an integer"),
        (rewrite(labels=(0, 1, 2, -1)), "label -1; expected an integer"),
        (rewrite(labels=(0.0, 1.0, 2.0, 0.5)), "column label is double; expected labels, as integers or text"),
        (rewrite(labels=(True, False, True, True)), "column label is bool"),
        (rewrite(labels=([0], [1], [2], [0])), "column label is list"),
        (rewrite(labels=(0, 2**62, 2, 0)), "label 4611686018427387904 is too large"),
        (rewrite(labels=(0, 1, 2**64 - 1, 0), kind=pa.uint64()), "label 18446744073709551615 is too large"),
        (rewrite(labels=("a", "b", "c", "a")), "the kind or list of its classes is not that of"),
        (rewrite(names=["a", "b", "c"]), "the kind or list of its classes is not that of"),
        (
            rewrite(columns=("image", "class")),
            "label not once among its columns, image, class. Name one: --label-c",
        ),
        (rewrite(["a", "b", "c", "d"]), "column image is string"),
        (rewrite([[1], [2], [3], [4]]), "column image is list"),
        (rewrite(pa.array([{"path": "a.jpg"}] * 4)), "column image is struct"),
        (rewrite(pa.array([{"bytes": {"bytes": CONTENTS[0]}}] * 4)), "column image is struct"),
        (rewrite(pa.array([{"bytes": [CONTENTS[0]]}] * 4)), "column image is list"),
        (rewrite(pa.array([{"bytes": "text"}] * 4)), "column image is string"),
        (
            rewrite(pa.array([{"bytes": None, "path": "img/a.jpg"}] * 4, structs().type)),
            "names the file img/a.jpg",
        ),
    ],
)
def test_a_parquet_file_that_cannot_be_used_is_one_line_with_the_file_and_the_row(tmp_path, spoil, reason):
    put_rows(tmp_path / "src" / "train-0.parquet")
    spoil(put_rows(tmp_path / "src" / "train-1.parquet"))
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert message.startswith(f"{tmp_path}/src/train-1.parquet") and reason in message


@pytest.mark.parametrize("labels", [[0, 3], ["a", "z"]])
def test_a_label_of_val_that_train_lacks_is_named_with_its_row(tmp_path, labels):
    known = [0, 1, 2, 0] if labels[0] == 0 else ["a", "b", "c", "a"]
    (tmp_path / "src").mkdir()
    parquet.write_table(table(CONTENTS, known), tmp_path / "src" / "train-0.parquet")
    parquet.write_table(table(CONTENTS[:2], labels), tmp_path / "src" / "val-0.parquet")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"val-0.parquet: label {labels[1]} is none of the 3 classes" in message


def test_an_empty_image_is_rejected_by_name_and_can_be_left_out(tmp_path):
    (tmp_path / "src").mkdir()
    images = pa.array([jpeg(0), None, b"", jpeg(3)])
    parquet.write_table(table(images, [0, 1, 1, 1]), tmp_path / "src" / "train-0.parquet")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert "train-0.parquet: row 1 (empty file)" in message and "row 2 (empty file)" in message
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)
    assert len(images_of(tmp_path / "out")) == 2


def test_an_unfinished_conversion_is_not_resumed_with_other_columns(tmp_path):
    (tmp_path / "src").mkdir()
    made = table(CONTENTS[:3] + [b"broken"], [0, 1, 2, 0]).append_column("coarse", pa.array([2, 1, 0, 2]))
    parquet.write_table(made, tmp_path / "src" / "train-0.parquet")
    assert "cannot be used" in refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    other = SourceOptions(label_column="coarse")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions(), source_options=other)
    assert "unfinished conversion that is another one: columns was None, now it is ['image', 'coarse']" in message
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions(), source_options=other)
    assert "made differently: columns was None, now it is ['image', 'coarse']" in message
