"""The order and the names of class folders."""

import os
import tarfile
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from pipelines.shards.index import read_index
from pipelines.shards.manifest import class_order_doubt, read_manifest
from support.small_sources import (
    add,
    convert,
    make_folder,
    plain_jpeg,
    put_images,
    samples_and_unused,
    samples_of,
    tree,
    write_ilsvrc,
    write_kaggle,
)
from tools.lib.shards.build import BuildOptions, describe
from tools.lib.shards.sources import open_source
from tools.lib.shards.sources.source import MISPLACED, SourceOptions
from tools.shard_imagenet import main

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


@pytest.fixture
def src(tmp_path) -> Path:
    return make_folder(tmp_path / "src")


def numbered(root: Path) -> Path:
    return make_folder(root, [str(number) for number in range(12)])


def test_an_order_that_tools_disagree_on_is_spoken_of_by_build_and_info(tmp_path, capsys):
    src, out = numbered(tmp_path / "src"), tmp_path / "out"
    main(["build", str(src), str(out), "--workers", "1"])
    assert "class 2 is '10' in text order" in (said := capsys.readouterr().err) and "--class-order" in said
    main(["info", str(out)])
    assert "class 2 is '10'" in " ".join(capsys.readouterr().out.split())
    assert read_manifest(out)["class_order"] == "unstated"


def test_an_order_that_is_stated_is_taken_and_not_doubted(tmp_path, capsys):
    src = numbered(tmp_path / "src")
    for order, third in (("text", "10"), ("numeric", "2")):
        out = tmp_path / order
        main(["build", str(src), str(out), "--class-order", order, "--workers", "1"])
        manifest = read_manifest(out)
        assert manifest["classes"][2] == third and class_order_doubt(manifest) == ""
        label = int(read_index(out, "train").samples["label"][0])
        key = read_index(out, "train").samples["key"][0].decode()
        assert manifest["classes"][label] == key.partition("/")[0]
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "doubt"),
    [
        (["a", "b", "c"], False),
        ([f"n{number:08d}" for number in range(5)], False),
        (["class1", "class2", "class10"], True),
        (["Zebra", "apple"], True),
        (["01", "02", "10"], False),
        (["v1.9", "v1.10"], True),
    ],
)
def test_only_names_whose_text_and_numeric_orders_differ_are_in_doubt(tmp_path, names, doubt):
    source = open_source(make_folder(tmp_path / "src", names), SourceOptions(), tmp_path)
    assert source.classes == sorted(names)
    assert bool(class_order_doubt(describe(source, BuildOptions()))) == doubt


def test_the_numeric_order_is_the_one_of_timms_reader(tmp_path):
    from timm.data.readers.reader_image_folder import find_images_and_targets

    src = make_folder(tmp_path / "src", ["b10", "b9", "A", "c", "10", "9"], splits=("train",))
    _, timms = find_images_and_targets(str(src / "train"))
    assert open_source(src, SourceOptions(class_order="numeric"), tmp_path).classes == sorted(timms, key=timms.get)


def test_stating_the_order_that_was_taken_needs_no_second_conversion(tmp_path):
    src, out = numbered(tmp_path / "src"), tmp_path / "out"
    convert(src, out)
    before = {name: content for name, content in tree(out).items() if name != "manifest.json"}
    stated = convert(src, out, source_options=SourceOptions(class_order="text"))
    assert stated["class_order"] == "text" and class_order_doubt(stated) == ""
    assert convert(src, out)["class_order"] == "text"  # the statement stays
    assert {name: content for name, content in tree(out).items() if name != "manifest.json"} == before
    with pytest.raises(UserError, match="made differently: class"):
        convert(src, out, source_options=SourceOptions(class_order="numeric"))


def test_a_source_that_numbers_its_classes_refuses_another_order(tmp_path):
    write_ilsvrc(tmp_path / "src")
    with pytest.raises(UserError, match="--class-order is numeric, and this ilsvrc source numbers its classes itself"):
        convert(tmp_path / "src", tmp_path / "out", source_options=SourceOptions(class_order="numeric"))


def test_any_utf_8_name_is_taken(tmp_path):
    strange = [
        "\u200b zero width",
        "\u3000wide",
        "a\tb",
        "line\nbreak",
        "\u202eright",
        "\x07bell",
        "\U0001f600",
        "e\u0301",
    ]
    src = make_folder(tmp_path / "src", ["\u732b", "caf\u00e9 \u00df"], splits=("train",))
    put_images(src, *(f"train/\u732b/{name}.jpg" for name in strange))
    convert(src, tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 4 + len(strange)
    with tarfile.open(read_index(tmp_path / "out", "train").paths[0]) as tar:
        assert len([name for name in tar.getnames() if name.endswith(".jpg")]) == 4 + len(strange)


def test_all_names_that_are_not_utf_8_are_named_at_once(src, tmp_path):
    for name in (b"\xff.jpg", b"\xe9t\xe9.jpg"):
        with open(os.fsencode(src / "train" / "ant") + b"/" + name, "wb") as file:
            file.write(plain_jpeg())
    with pytest.raises(UserError, match=r"train/ant/\\xe9t\\xe9.jpg, train/ant/\\xff.jpg: .* a name that is not UTF-8"):
        convert(src, tmp_path / "out")
    os.rename(os.fsencode(src / "train" / "ant") + b"/\xff.jpg", src / "train" / "ant" / "y.jpg")
    os.rename(os.fsencode(src / "train" / "ant") + b"/\xe9t\xe9.jpg", src / "train" / "ant" / "z.jpg")
    assert convert(src, tmp_path / "out")["splits"]["train"]["samples"] == 8


def test_a_class_folder_whose_name_is_not_utf_8_is_named(src, tmp_path):
    os.mkdir(os.fsencode(src / "train") + b"/\xff")
    with pytest.raises(UserError, match=r"names are not UTF-8: \\xff. Rename them"):
        convert(src, tmp_path / "out")


@pytest.mark.parametrize(
    "forms", [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9"), ("\uac00", "\u1100\u1161")]
)
def test_a_class_that_is_written_in_two_unicode_forms_is_one_class(tmp_path, forms):
    src = make_folder(tmp_path / "src", [forms[0], "tea"], splits=("train",))
    make_folder(src, [forms[1], "tea"], splits=("val",))
    manifest = convert(src, tmp_path / "out")
    assert manifest["classes"] == sorted([forms[0], "tea"])
    assert all(manifest["splits"]["val"]["class_counts"])


def test_two_training_folders_that_look_alike_are_named(tmp_path):
    src = make_folder(tmp_path / "src", ["caf\u00e9", "cafe\u0301"], splits=("train",))
    with pytest.raises(UserError, match="folders that would be one class"):
        convert(src, tmp_path / "out")


def test_of_two_names_that_fall_onto_one_the_second_is_named_in_every_source(tmp_path):
    src = make_folder(tmp_path / "forms", ["caf\u00e9", "tea"])
    put_images(src, "val/cafe\u0301/9.jpg", "train/tea/a.b.jpg", "train/tea/a_b.jpg")
    samples, unused = samples_and_unused(src)
    assert len(samples) == 8  # the decomposed form sorts first, with one image
    assert [each.source for each in unused[MISPLACED]] == ["train/tea/a_b.jpg", "val/caf\u00e9"]

    write_kaggle(tmp_path / "kaggle")
    put_images(tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.jpg")
    _, unused = samples_and_unused(tmp_path / "kaggle")
    assert [Path(each.source).name for each in unused[MISPLACED]] == ["ILSVRC2012_val_00000001.jpg"]

    write_ilsvrc(tmp_path / "ilsvrc")
    train = tmp_path / "ilsvrc" / "ILSVRC2012_img_train.tar"
    with tarfile.open(train) as tar:
        first = tar.getnames()[0]
        content = tar.extractfile(first).read()
    with tarfile.open(train, "a") as tar:
        add(tar, f"again/{first}", content)
    with tarfile.open(tmp_path / "ilsvrc" / "ILSVRC2012_img_val.tar", "a") as tar:
        add(tar, "more/ILSVRC2012_val_00000001.JPEG", plain_jpeg())
    _, unused = samples_and_unused(tmp_path / "ilsvrc")
    ends = [each.source.rpartition(": ")[2] for each in unused[MISPLACED]]
    assert ends == [f"again/{first}", "more/ILSVRC2012_val_00000001.JPEG"]
