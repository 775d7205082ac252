"""The samples of tars of another writer: their parts, labels and names."""

import re

import pytest

from pipelines.common.errors import UserError
from support.hand_made import images_of, jpeg, keys, put, refused, run, samples, tar_of
from tools.lib.shards.build import BuildOptions, build
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.verify import verify

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


def test_parts_that_training_does_not_read_are_counted_by_extension(tmp_path):
    more = {f"{i:04d}.{part}": b"{}" for i in range(3) for part in ("json", "txt", "seg.png")}
    put(tmp_path / "train" / "a.tar", tar_of(dict(sorted((samples(3) | more).items()))))
    manifest = index_webdataset(tmp_path)
    left_out = [item["source"] for item in manifest["audit"]["left_out"]]
    assert left_out == [f"train: 3 parts .{part}" for part in ("json", "seg.png", "txt")]
    assert images_of(tmp_path) == {f"{i:04d}": (jpeg(i), i) for i in range(3)}


@pytest.mark.parametrize(("image", "label"), [("jpeg", "cls"), ("JPEG", "class"), ("JPG", "label"), ("jpg", "CLS")])
def test_usual_names_of_parts_are_taken(tmp_path, image, label):
    members = {f"1.{image}": jpeg(), f"1.{label}": b" 2\n", f"x/2.{label}": b"+0", f"x/2.{image}": jpeg(1)}
    put(tmp_path / "train" / "a.tar", tar_of(members))
    index_webdataset(tmp_path)
    assert images_of(tmp_path) == {"1": (jpeg(), 2), "x/2": (jpeg(1), 0)}
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            {"1.png": jpeg(0, "PNG"), "1.jpg": jpeg(), "1.cls": b"0"},
            "several images, 'png, jpg': pack the tar again",
        ),
        ({"1.jpg": jpeg(), "1.json": b'{"label": 3}'}, "has jpg, json; expected a cls, too: pack"),
        ({"1.jpg": jpeg(), "1.txt": b"3"}, "has jpg, txt; expected a cls, too"),
        ({"1.jpg": jpeg(), "1.index": b"3"}, "has jpg, index; expected a cls, too"),
        ({"1.left.jpg": jpeg(), "1.right.jpg": jpeg(1), "1.cls": b"0"}, "several images, 'left.jpg, right.jpg'"),
        ({"1.rgb.jpg": jpeg(), "1.cls": b"0"}, "its image is 'rgb.jpg': pack the tar again with it as KEY.jpg"),
        ({"cat/1.jpg": jpeg()}, "has jpg; expected a cls, too"),
        ({"./cat/1.v2.jpg": jpeg()}, "it has '.v2.jpg': names end at their first dot"),
        ({"1.cls": b"0"}, "has cls; expected an image"),
        ({"1.jpg": jpeg(), "1.cls": b"dog"}, "its cls is 'dog', not a class number: number the classes"),
        ({"1.jpg": jpeg(), "1.cls": b"3.0"}, "'3.0', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"1_0"}, "'1_0', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b""}, "'', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"9" * 5000}, "not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"\xff\xfe3\0"}, "not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"-1"}, "its cls is '-1', not a class number"),
        ({"1.png": jpeg(0, "PNG"), "1.cls": b"0"}, "PNG image, mode RGB: unpack the tars into train/CLASS/"),
        ({"1.webp": jpeg(0, "WEBP"), "1.cls": b"0"}, "WEBP image"),
        ({"README": b"text"}, "has no extension; expected an image, jpg"),
        ({"README.txt": b"text"}, "has txt; expected an image, jpg"),
        ({"a.b.jpg": jpeg(), "a.b.cls": b"0"}, "first dot"),
        (
            {"a.jpg": jpeg(), "a.cls": b"0", "a.1.jpg": jpeg(), "a.1.cls": b"0"},
            "it has '.1.cls': names end at their first",
        ),
        ({"img.v2.1.JPEG": jpeg(), "img.v2.1.class": b"0"}, "first dot"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named_with_what_helps(tmp_path, members, reason):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2) | members))
    message = refused(index_webdataset, tmp_path)
    assert message.startswith("1 sample cannot be used: train/a.tar: ") and reason in message
    assert index_webdataset(tmp_path, skip_bad=True)["audit"]["counts"]["rejected"] == 1
    assert keys(tmp_path) == ["0000", "0001"]


def test_many_samples_that_cannot_be_used_are_a_few_names_and_a_count(tmp_path):
    members = {f"{'long' * 40}{i}.jpg": jpeg(i) for i in range(30)} | {f"x{i}.cls": b"cat%d" % i for i in range(30)}
    put(tmp_path / "train" / "a.tar", tar_of(members | {f"x{i}.jpg": jpeg(i) for i in range(30)}))
    with pytest.raises(UserError) as found:
        index_webdataset(tmp_path)
    message = str(found.value)
    assert message.startswith("60 samples") and "and 28 more: has jpg; expected" in message
    assert "and 28 more: its cls is 'cat0', 'cat1' and 28 more, not a class number: number the" in message
    assert message.endswith("Or leave out what cannot: --on-bad skip") and len(message) < 400


@pytest.mark.parametrize(
    "labels",
    [
        ["goldfish", "great white shark", "tiger shark", "hammerhead", "ray", "cock"],
        ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"],
        ["it's", "dog's", "n01440764", "-3", "", "1e3"],
    ],
)
def test_labels_of_one_wrong_kind_are_one_cause_with_two_examples_and_numbers_are_taken(tmp_path, labels):
    members = {f"{i}.jpg": jpeg(i) for i in range(6)} | {f"{i}.cls": text.encode() for i, text in enumerate(labels)}
    put(tmp_path / "train" / "a.tar", tar_of(members))
    message = refused(index_webdataset, tmp_path)
    shown = [label.replace("'", '"') for label in labels[:2]]
    assert f"its cls is '{shown[0]}', '{shown[1]}' and 4 more, not a class number: number the classes" in message
    put(tmp_path / "train" / "a.tar", tar_of(members | {f"{i}.cls": str(i).encode() for i in range(6)}))
    assert len(index_webdataset(tmp_path)["classes"]) == 6


@pytest.mark.parametrize("name", ["{}/{:04d}.jpg", "./{}/{:04d}.jpg", "{}/photo.{}.JPEG"])
def test_tars_of_class_folders_without_numbers_are_unpacked_and_built_as_the_message_says(tmp_path, name):
    for split, start in (("train", 0), ("val", 4)):
        for number in range(2):
            first = start + 2 * number
            found = {name.format(word, first + i): jpeg(first + i) for i, word in enumerate(("cat", "dog"))}
            put(tmp_path / "set" / split / f"{number}.tar", tar_of(found))
    unpack = re.search(r"tar -kxf TAR -C SRC/", refused(index_webdataset, tmp_path / "set"))[0]
    (tmp_path / "src" / "train").mkdir(parents=True)
    (tmp_path / "src" / "val").mkdir()
    for path in (tmp_path / "set").rglob("*.tar"):
        run(unpack.replace("TAR", str(path)).replace("SRC", str(tmp_path / "src")) + path.parent.name, tmp_path)
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert manifest["classes"] == ["cat", "dog"]
    assert [manifest["splits"][split]["samples"] for split in ("train", "val")] == [4, 4]


@pytest.mark.parametrize(
    ("members", "again"),
    [
        ({"1.jpg": jpeg(), "1.json": b'{"label": 1}'}, {"1.jpg": jpeg(), "1.json": b'{"label": 1}', "1.cls": b"1"}),
        ({"1.jpg": jpeg(), "1.txt": b"1"}, {"1.jpg": jpeg(), "1.cls": b"1"}),
        ({"1.left.jpg": jpeg(), "1.right.jpg": jpeg(), "1.cls": b"1"}, {"1.jpg": jpeg(), "1.cls": b"1"}),
        ({"1.rgb.png.jpg": jpeg(), "1.cls": b"1"}, {"1.jpg": jpeg(), "1.cls": b"1"}),
        ({"1.jpg": jpeg(), "1.webp": jpeg(), "1.cls": b"1"}, {"1.jpg": jpeg(), "1.cls": b"1"}),
    ],
)
def test_a_tar_packed_again_as_the_message_about_its_parts_says_is_taken(tmp_path, members, again):
    put(tmp_path / "train" / "a.tar", tar_of(members))
    assert re.search(r"pack the tar again with .* KEY\.(cls|jpg)", refused(index_webdataset, tmp_path))
    put(tmp_path / "train" / "a.tar", tar_of(again))
    index_webdataset(tmp_path)
    assert images_of(tmp_path) == {"1": (jpeg(), 1)}


def test_names_that_are_not_utf_8_are_named_and_can_be_left_out(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2) | {"caf\udce9.jpg": jpeg(), "caf\udce9.cls": b"1"}))
    assert r"caf\xe9: its name is not UTF-8" in refused(index_webdataset, tmp_path)
    index_webdataset(tmp_path, skip_bad=True)
    assert keys(tmp_path) == ["0000", "0001"] and verify(tmp_path) == []


def test_names_packed_again_as_the_message_about_dots_says_are_taken(tmp_path):
    dotted = samples(3, "img.{:03d}.v2")
    put(tmp_path / "train" / "a.tar", tar_of(dotted))
    assert "with _ for those dots" in refused(index_webdataset, tmp_path)
    renamed = {re.sub(r"\.(?=.*\.)", "_", name): content for name, content in dotted.items()}
    put(tmp_path / "train" / "a.tar", tar_of(renamed))
    index_webdataset(tmp_path)
    assert keys(tmp_path) == ["img_000_v2", "img_001_v2", "img_002_v2"]


def test_pngs_unpacked_into_class_folders_are_converted_as_the_message_says(tmp_path):
    members = {f"{i}.png": jpeg(i, "PNG") for i in range(2)} | {f"{i}.cls": str(i).encode() for i in range(2)}
    put(tmp_path / "wds" / "train" / "a.tar", tar_of(members))
    assert "into train/CLASS/ and run 'build'" in refused(index_webdataset, tmp_path / "wds")
    for i in range(2):
        put(tmp_path / "src" / "train" / str(i) / f"{i}.png", members[f"{i}.png"])
    assert build(tmp_path / "src", tmp_path / "out", BuildOptions())["splits"]["train"]["samples"] == 2


@pytest.mark.parametrize("elsewhere", [True, False])
def test_an_absurd_class_number_is_named_with_its_tar_and_no_folder_is_left(tmp_path, elsewhere):
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / "set" / "train" / "b.tar", tar_of({"1.jpg": jpeg(), "1.cls": b"123456"}))
    out = tmp_path / "index" if elsewhere else None
    assert refused(index_webdataset, tmp_path / "set", out=out).startswith("train/b.tar: class numbers up to 123456 ")
    assert not (tmp_path / "index").exists()


def test_one_key_in_two_shards_is_two_samples(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / "train" / "b.tar", tar_of(samples(2)))
    assert index_webdataset(tmp_path)["splits"]["train"]["samples"] == 4
