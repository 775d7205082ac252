"""The samples of tars of another writer: their parts, labels and names."""

import pytest

from pipelines.common.errors import UserError
from support.hand_made import images_of, jpeg, keys, put, refused, samples, tar_of
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
        ({"1.png": jpeg(0, "PNG"), "1.jpg": jpeg(), "1.cls": b"0"}, "has png, jpg, cls; expected an image"),
        ({"1.jpg": jpeg(), "1.json": b'{"label": 3}'}, "has jpg, json; expected an image, KEY.jpg, and its class"),
        ({"1.left.jpg": jpeg(), "1.right.jpg": jpeg(1), "1.cls": b"0"}, "has left.jpg, right.jpg, cls; expected"),
        ({"./cat/1.v2.jpg": jpeg()}, "a KEY ends at its first dot"),
        ({"1.cls": b"0"}, "has cls; expected an image"),
        ({"README": b"text"}, "has no extension; expected an image"),
        ({"1.jpg": jpeg(), "1.cls": b"dog"}, "its label is 'dog', not a class number: number the classes"),
        ({"1.jpg": jpeg(), "1.cls": b"3.0"}, "'3.0', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"1_0"}, "'1_0', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b""}, "'', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"9" * 5000}, "not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"\xff\xfe3\0"}, "not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"-1"}, "its label is '-1', not a class number"),
        ({"1.png": jpeg(0, "PNG"), "1.cls": b"0"}, "PNG image, mode RGB: unpack the tars into train/CLASS"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named_with_what_helps(tmp_path, members, reason):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2) | members))
    message = refused(index_webdataset, tmp_path)
    assert message.startswith("samples cannot be used: train/a.tar: ") and reason in message
    assert index_webdataset(tmp_path, skip_bad=True)["audit"]["counts"]["rejected"] == 1
    assert keys(tmp_path) == ["0000", "0001"]


def test_many_samples_that_cannot_be_used_are_a_few_names_and_a_count(tmp_path):
    members = {f"{'long' * 40}{i}.jpg": jpeg(i) for i in range(30)} | {f"x{i}.cls": b"cat%d" % i for i in range(30)}
    put(tmp_path / "train" / "a.tar", tar_of(members | {f"x{i}.jpg": jpeg(i) for i in range(30)}))
    with pytest.raises(UserError) as found:
        index_webdataset(tmp_path)
    message = str(found.value)
    assert "and 28 more: has jpg; expected" in message and "; and more for other reasons" in message
    assert message.endswith("Or leave out what cannot: --on-bad skip") and len(message) < 600


def test_names_that_are_not_utf_8_are_named_and_can_be_left_out(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2) | {"caf\udce9.jpg": jpeg(), "caf\udce9.cls": b"1"}))
    assert r"caf\xe9: its name is not UTF-8" in refused(index_webdataset, tmp_path)
    index_webdataset(tmp_path, skip_bad=True)
    assert keys(tmp_path) == ["0000", "0001"] and verify(tmp_path) == []


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
