"""A folder of tars: everything visible in it is used or named, and the advice of each message works."""

import re
from pathlib import Path

import pytest

from support.hand_made import jpeg, keys, put, refused, run, samples, tar_of
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
    ("name", "helps"),
    [
        ("validation/b.tar", "rename it to val"),
        ("Valid/b.tar", "rename it to val"),
        ("test/b.tar", "rename it to val, or move it away"),
        ("train_more/b.tar", "move it away"),
        ("b.tar", "move it into one of them"),
        ("dataset.json", "move it away"),
        ("train/part2/b.tar", "a folder among the tars"),
        ("train/b.tar.gz", "unpack it with gunzip"),
        ("train/b.tgz", "unpack it with gunzip"),
        ("train/b.tar.zst", "unpack it with unzstd"),
        ("train/b.TAR", "rename it to end in .tar"),
        ("train/b.idx", "describes a tar that is not there"),
        ("train/0001.jpg", "not an uncompressed tar"),
        ("train/index.npy.partial", "not an uncompressed tar"),
    ],
)
def test_everything_visible_beside_tars_is_named_or_left_out_by_decision_and_listed(tmp_path, name, helps):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / name, tar_of(samples(2)))
    top = name if name.startswith("train/") and name.count("/") == 1 else re.match(r"(train/)?[^/]+", name)[0]
    message = refused(index_webdataset, tmp_path)
    assert f"1 entry would be left out. {top}: " in message and helps in message and "--on-bad skip" in message
    manifest = index_webdataset(tmp_path, skip_bad=True)
    assert [item["source"] for item in manifest["audit"]["left_out"]] == [top]
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "move", "split"),
    [
        ("validation/b.tar", "mv validation val", "val"),
        ("b.tar", "mv b.tar train", "train"),
        ("train/part2/b.tar", "mv train/part2/b.tar train; rmdir train/part2", "train"),
        ("train/b.TAR", "mv train/b.TAR train/b.tar", "train"),
    ],
)
def test_tars_moved_or_renamed_as_the_message_says_are_taken(tmp_path, name, move, split):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / name, tar_of(samples(2, start=5)))
    refused(index_webdataset, tmp_path)
    run(move, tmp_path)
    index_webdataset(tmp_path)
    assert {"0005", "0006"} <= {*keys(tmp_path, split)}


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
    ("tar", "root", "move"),
    [
        ("set/a.tar", "set", "mkdir train; mv *.tar train"),
        ("set/training/a.tar", "set", "mv training train"),
        ("set/Train/a.tar", "set", "mv Train train"),
    ],
)
def test_a_root_without_train_gets_the_nearest_cause_and_the_advice_works(tmp_path, tar, root, move):
    put(tmp_path / tar, tar_of(samples(2)))
    message = refused(index_webdataset, tmp_path / root)
    assert re.search(r"Move its tars into \S*/train|Rename \w+ to train", message)
    run(move, tmp_path / root)
    index_webdataset(tmp_path / root)
    assert len(keys(tmp_path / root)) == 2


def test_the_folder_of_a_split_itself_is_answered_with_the_folder_above(tmp_path):
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(2)))
    message = refused(index_webdataset, tmp_path / "set" / "train")
    index_webdataset(Path(re.search(r"Give the folder above it, (\S+)$", message)[1]))
    assert len(keys(tmp_path / "set")) == 2


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("imagenet1k-train-{:04d}.tar", "imagenet1k-validation-{:04d}.tar"),
        ("imagenet-train-{:06d}.tar", "imagenet-val-{:06d}.tar"),
        ("Train_{}.tar", "Valid_{}.tar"),
        ("train.{}.tar", "my valid.{}.tar"),
    ],
)
def test_tars_of_both_splits_in_one_folder_are_sorted_by_the_commands_of_the_message(tmp_path, train, val):
    for number in range(2):
        put(tmp_path / train.format(number), tar_of(samples(2, start=2 * number)))
    put(tmp_path / val.format(0), tar_of(samples(3, start=7)))
    put(tmp_path / "_info.json", b"{}")
    run(re.search(r"In that folder: (mkdir .*)", refused(index_webdataset, tmp_path))[1], tmp_path)
    index_webdataset(tmp_path)
    assert keys(tmp_path) == ["0000", "0001", "0002", "0003"] and keys(tmp_path, "val") == ["0007", "0008", "0009"]


def test_tars_of_a_test_split_among_others_stay_and_are_moved_away_by_the_next_message(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / "set" / f"cars-{split}-0.tar", tar_of(samples(2)))
    run(re.search(r"In that folder: (mkdir .*)", refused(index_webdataset, tmp_path / "set"))[1], tmp_path / "set")
    message = refused(index_webdataset, tmp_path / "set")
    assert "cars-test-0.tar: a tar outside of train and val: move it away" in message
    run("mv cars-test-0.tar ..", tmp_path / "set")
    assert [*index_webdataset(tmp_path / "set")["splits"]] == ["train"]


def test_tars_whose_names_no_pattern_sorts_are_not_sorted_by_a_command(tmp_path):
    for name in ("trainset-train-0.tar", "trainset-val-0.tar"):
        put(tmp_path / name, tar_of(samples(2)))
    message = refused(index_webdataset, tmp_path)
    assert "mv *train*" not in message and message.endswith("Sort its tars into train and val by their names")


@pytest.mark.parametrize("word", ["val", "validation", "test"])
def test_tars_named_for_another_split_alone_are_no_training_images_without_a_decision(tmp_path, word):
    put(tmp_path / f"birds-{word}-0.tar", tar_of(samples(2)))
    assert "only if they are for training" in refused(index_webdataset, tmp_path)
    run("mkdir train; mv *.tar train/", tmp_path)
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "others", "move", "split"),
    [
        ("train/in-val-0.tar", "train/in-train-0.tar", "mkdir val; mv train/in-val-0.tar val", "val"),
        ("train/validation_0.tar", "train/0.tar", "mkdir val; mv train/validation_0.tar val", "val"),
        ("val/x.train.3.tar", "val/x.val.0.tar", "mkdir -p train; mv val/x.train.3.tar train", "train"),
        ("train/in-test-0.tar", "train/in-0.tar", "mv train/in-test-0.tar ..", ""),
    ],
)
def test_a_tar_among_others_whose_name_says_another_split_is_named_and_the_advice_works(
    tmp_path, name, others, move, split
):
    root = tmp_path / "set"
    put(root / others, tar_of(samples(2)))
    put(root / "train" / "in-train-9.tar", tar_of(samples(2, start=2)))
    put(root / name, tar_of(samples(2, start=5)))
    message = refused(index_webdataset, root)
    assert f"1 entry would be left out. {name}: its name says" in message
    assert ("move it into " + split if split else "move it away") in message
    run(move, root)
    index_webdataset(root)
    assert not split or {"0005", "0006"} <= {*keys(root, split)}


def test_a_folder_in_which_all_names_have_a_split_s_word_is_taken(tmp_path):
    for number in range(2):
        put(tmp_path / "train" / f"road-test-{number}.tar", tar_of(samples(2, start=2 * number)))
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 4


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train/a-00000-of-00002.tar"], "train/a-00001-of-00002.tar"),
        (["train/0-of-3.tar", "train/2-of-3.tar"], "train/1-of-3.tar"),
        (["train/a.tar", "val/a_0001_of_0003.tar", "val/a_0003_of_0003.tar"], "val/a_0002_of_0003.tar"),
    ],
)
def test_shards_that_the_names_of_others_count_are_named_and_taken_once_they_are_there(tmp_path, names, missing):
    for name in names:
        put(tmp_path / name, tar_of(samples(2)))
    assert f"1 entry would be left out. {missing}: not there" in refused(index_webdataset, tmp_path)
    manifest = index_webdataset(tmp_path, skip_bad=True)
    assert [item["source"] for item in manifest["audit"]["left_out"]] == [missing]
    (tmp_path / "manifest.json").unlink()
    put(tmp_path / missing, tar_of(samples(2)))
    index_webdataset(tmp_path)


@pytest.mark.parametrize("validation", ["test", "validation", "Valid"])
def test_a_split_beside_val_is_moved_away_and_never_into_it(tmp_path, validation):
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / "set" / "val" / "a.tar", tar_of(samples(2)))
    put(tmp_path / "set" / validation / "b.tar", tar_of(samples(2)))
    message = refused(index_webdataset, tmp_path / "set")
    assert "only train and val are indexed: move it away" in message and "rename" not in message
    run(f"mv {validation} ..", tmp_path / "set")
    index_webdataset(tmp_path / "set")


def test_an_image_folder_is_answered_with_build(tmp_path):
    put(tmp_path / "train" / "cat" / "1.jpg", jpeg())
    assert "images in folders are converted with 'build'" in refused(index_webdataset, tmp_path)
    build(tmp_path, tmp_path.parent / f"{tmp_path.name}.out", BuildOptions())


def test_a_file_in_the_place_of_a_split_is_named(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    put(tmp_path / "val", b"x")
    assert "would be left out. val: " in refused(index_webdataset, tmp_path)


@pytest.mark.parametrize("root", ["file", "missing", "empty"])
def test_a_root_that_is_no_folder_of_tars_is_one_line(tmp_path, root):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "file", b"x")
    assert root in refused(index_webdataset, tmp_path / root)


def test_leftovers_of_a_killed_index_are_no_obstacle_and_go_away(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    names = ("train/index.npy.0123abcd.partial", "train/a.idx.89abcdef.partial", "audit.jsonl.00000000.partial")
    for name in (*names, "audit.jsonl", "train/index.npy", ".index.partial/train/a.json"):
        put(tmp_path / name, b"half")
    index_webdataset(tmp_path)
    assert not list(tmp_path.rglob("*.partial")) and verify(tmp_path) == []
