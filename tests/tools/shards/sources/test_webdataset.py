"""A folder of tars: everything visible in it is used or named, and the advice of each message works."""

import re

import pytest

from support.hand_made import jpeg, keys, put, refused, samples, tar_of
from tools.lib.predict.image_files import items_of
from tools.lib.shards.build import BuildOptions, build
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.verify import verify

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


HIDDEN = (
    ".DS_Store",
    "._0000.jpg",
    "a/._0000.cls",
    "__MACOSX/0000.jpg",
    "a/@eaDir/0000.jpg",
    "Thumbs.db",
    "Desktop.ini",
)


def test_hidden_members_of_tars_are_passed_over_and_counted(tmp_path):
    junk = {name: jpeg() for name in HIDDEN}
    path = put(tmp_path / "train" / "a.tar", tar_of(junk | samples(2, "./{:04d}")))
    manifest = index_webdataset(tmp_path)
    assert manifest["audit"]["counts"]["hidden"] == len(HIDDEN)
    assert manifest["audit"]["hidden"][0] == "train/a.tar: .DS_Store"
    assert keys(tmp_path) == ["./0000", "./0001"]
    assert [item.name for item in items_of(path)] == [f"{path}/./0000", f"{path}/./0001"]


def test_hidden_files_beside_tars_are_passed_over_counted_and_no_fault(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    for name in (".DS_Store", "train/._a.tar", "train/@eaDir/a.tar", "train/.nfs000.tar", "Thumbs.db"):
        put(tmp_path / name, b"x")
    assert index_webdataset(tmp_path)["audit"]["counts"]["hidden"] == 5
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        *("validation/b.tar", "test/b.tar", "b.tar", "dataset.json", "train/part2/b.tar", "train/b.tar.gz"),
        *("train/b.TAR", "train/b.idx", "train/0001.jpg", "val/"),
    ],
)
def test_everything_visible_beside_tars_is_named_or_left_out_by_decision_and_listed(tmp_path, name):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    (tmp_path / name).mkdir() if name.endswith("/") else put(tmp_path / name, tar_of(samples(2)))
    top = name if name.startswith("train/") and name.count("/") == 1 else re.match(r"(train/)?[^/]+", name)[0]
    message = refused(index_webdataset, tmp_path)
    assert f"would be left out: {top}: " in message and "move it away" in message and "--on-bad skip" in message
    manifest = index_webdataset(tmp_path, skip_bad=True)
    assert [item["source"] for item in manifest["audit"]["left_out"]] == [top]
    assert verify(tmp_path) == []


def test_links_that_lead_nowhere_are_named_and_links_to_tars_are_followed(tmp_path):
    put(tmp_path / "elsewhere" / "a.tar", tar_of(samples(2)))
    (tmp_path / "root" / "train").mkdir(parents=True)
    (tmp_path / "root" / "train" / "a.tar").symlink_to(tmp_path / "elsewhere" / "a.tar")
    (tmp_path / "root" / "train" / "b.tar").symlink_to("/not/there.tar")
    assert "train/b.tar: a link to /not/there.tar" in refused(index_webdataset, tmp_path / "root")
    (tmp_path / "root" / "train" / "b.tar").unlink()
    (tmp_path / "root" / "val").symlink_to("/not/mounted")
    assert "val: a link to /not/mounted" in refused(index_webdataset, tmp_path / "root")
    (tmp_path / "root" / "val").unlink()
    index_webdataset(tmp_path / "root")
    assert len(keys(tmp_path / "root")) == 2


def test_documents_beside_tars_are_listed_and_no_error(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    for name in ("README.md", "LICENSE", "SHA256SUMS"):
        put(tmp_path / name, b"text")
    manifest = index_webdataset(tmp_path)
    assert [item["source"] for item in manifest["audit"]["left_out"]] == ["LICENSE", "README.md", "SHA256SUMS"]
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "other"), [("train/in-val-0.tar", "train/in-train-0.tar"), ("val/x.train.3.tar", "val/0.tar")]
)
def test_a_tar_among_others_whose_name_says_another_split_is_named(tmp_path, name, other):
    for path in (name, other, "train/in-train-9.tar"):
        put(tmp_path / path, tar_of(samples(2)))
    assert f"would be left out: {name}: its name says another split" in refused(index_webdataset, tmp_path)


def test_a_folder_in_which_all_names_have_a_split_s_word_is_taken(tmp_path):
    for number in range(2):
        put(tmp_path / "train" / f"road-test-{number}.tar", tar_of(samples(2, start=2 * number)))
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 4


@pytest.mark.parametrize(
    ("names", "missing", "pattern"),
    [
        (["train/a-00000-of-00002.tar"], "train/a-00001-of-00002.tar", "train/a-*-of-00002*: 1 of 2 files"),
        (["train/0-of-3.tar", "train/2-of-3.tar"], "train/1-of-3.tar", "train/*-of-3*: 2 of 3 files"),
        (["train/a.tar", "val/a_2_of_2.tar"], "val/a_1_of_2.tar", "val/a_*_of_2*: 1 of 2 files"),
    ],
)
def test_shards_that_the_names_of_others_count_are_named_and_taken_once_they_are_there(
    tmp_path, names, missing, pattern
):
    for name in names:
        put(tmp_path / name, tar_of(samples(2)))
    assert f"would be left out: {pattern}" in refused(index_webdataset, tmp_path)
    put(tmp_path / missing, tar_of(samples(2)))
    index_webdataset(tmp_path)


def test_an_image_folder_is_answered_with_build(tmp_path):
    put(tmp_path / "train" / "cat" / "1.jpg", jpeg())
    assert "Images in folders are converted with 'build'" in refused(index_webdataset, tmp_path)
    build(tmp_path, tmp_path.parent / f"{tmp_path.name}.out", BuildOptions())


def test_a_file_in_the_place_of_a_split_is_named(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / "val", b"x")
    assert "would be left out: val: " in refused(index_webdataset, tmp_path)


@pytest.mark.parametrize("root", ["file", "missing", "empty"])
def test_a_root_that_is_no_folder_of_tars_is_one_line(tmp_path, root):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "file", b"x")
    assert root in refused(index_webdataset, tmp_path / root)


def test_leftovers_of_a_killed_index_are_no_obstacle_and_go_away(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    for name in (
        "audit.jsonl",
        "train/index.npy",
        ".index.partial/train/a.idx",
        ".index.partial/audit.jsonl.x.partial",
    ):
        put(tmp_path / name, b"half")
    index_webdataset(tmp_path)
    assert not list(tmp_path.rglob("*.partial")) and verify(tmp_path) == []
