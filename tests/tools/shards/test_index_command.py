"""`index` on tars of other people: everything visible is used or named, and what a message advises works."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import UserError
from support.hand_made import images_of, jpeg, keys, put, refused, run, samples, tar_of
from tools.lib.predict.image_files import items_of
from tools.lib.shards.build import BuildOptions, build
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources.webdataset import tar_members
from tools.lib.shards.verify import verify
from tools.shard_imagenet import main

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")

# --- hidden files ---

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


# --- the folder of the tars ---


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


# --- splits by name ---


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


# --- a folder that is read-only ---


def lock(folder: Path, monkeypatch) -> None:
    """Let the system refuse new files in a folder: permissions of files do not bind the administrator."""
    system_open = os.open

    def refusing(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(os.fsdecode(path)).is_relative_to(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return system_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("locked", ["set", "set/train", "set/val"])
def test_a_read_only_folder_is_indexed_elsewhere_as_the_message_says(tmp_path, monkeypatch, capsys, locked):
    root = tmp_path / "set"
    put(root / "train" / "a.tar", tar_of(samples(4)))
    put(root / "val" / "a.tar", tar_of(samples(2)))
    lock(tmp_path / locked, monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(["index", str(root), "--workers", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and f"error: {tmp_path / locked}: cannot be written to" in said
    main([*re.search(r"(index \S+ --out) DIR", said)[1].split(), str(tmp_path / "index"), "--workers", "1"])
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == ["a.tar", "a.tar"]
    assert len(keys(tmp_path / "index")) == 4 and len(keys(tmp_path / "index", "val")) == 2
    assert verify(tmp_path / "index", decode=True) == []


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        *((errno.ENOSPC, "Make room there"), (errno.EIO, "Look at the disk"), (errno.EROFS, "name another place")),
        (errno.EFBIG, "raise the limit ('ulimit -f')"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_an_error_of_the_disk_is_one_line_with_a_file_or_the_folder(tmp_path, monkeypatch, number, helps, named):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))

    def failing(path, content):
        raise OSError(number, os.strerror(number), *([str(path)] if named else []))

    monkeypatch.setattr("tools.lib.shards.reindex.write_synced", failing)
    message = refused(index_webdataset, tmp_path)
    assert message.startswith(str(tmp_path)) and os.strerror(number) in message and helps in message


def test_an_index_elsewhere_is_the_index_beside_the_tars(tmp_path, monkeypatch):
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(4)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index" / "train").mkdir(parents=True)
    (tmp_path / "index" / "train" / "a.tar").symlink_to(
        tmp_path / "set" / "train" / "a.tar"
    )  # an earlier one was killed
    there = index_webdataset(Path("set"), out=Path("index"))
    here = index_webdataset(Path("set"))
    assert there["splits"] == here["splits"]
    assert os.readlink("index/train/a.tar") == str(tmp_path / "set" / "train" / "a.tar")


@pytest.mark.parametrize(
    ("out", "message"),
    [("set", "in .* itself"), ("set/index", "in .* itself"), ("photos", "else .mine.jpg"), ("other", "else")],
)
def test_a_folder_for_the_index_is_never_mixed_with_anything(tmp_path, out, message):
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(4)))
    put(tmp_path / "photos" / "mine.jpg", b"x")
    put(tmp_path / "other" / "train" / "a.tar", tar_of(samples(4)))
    assert re.search(message, refused(index_webdataset, tmp_path / "set", out=tmp_path / out))
    assert not list((tmp_path / "set").rglob("*.npy"))


# --- samples ---


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


# --- .idx files of DALI ---


def older(idx: bytes) -> bytes:
    """The same in the version before, which has no names."""
    first, *lines = idx.decode().splitlines()
    parts = [re.sub(r"(\S+ \d+ \d+) \S+", r"\1", line) for line in lines]
    return "\n".join([first.replace("v1.2", "v1.1"), *parts]).encode() + b"\n"


def listed_twice(idx: bytes) -> bytes:
    first, *lines = idx.decode().splitlines()
    return "\n".join([f"v1.2 {len(lines) + 1}", *lines, lines[0]]).encode() + b"\n"


def read_by_dali(root: Path) -> list[tuple[bytes, bytes]]:
    dali = pytest.importorskip("nvidia.dali")

    @dali.pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            dali.fn.readers.webdataset(
                paths=[str(root / "train" / "a.tar")], index_paths=[str(root / "train" / "a.idx")], ext=["jpg", "cls"]
            )
        )

    built = pipeline()
    built.build()
    return [tuple(bytes(np.array(part.at(i))) for part in parts) for parts in [built.run()] for i in range(3)]


@pytest.mark.parametrize("written", [lambda idx: idx, older, lambda idx: idx.replace(b"jpg ", b"JPG "), bytes.rstrip])
def test_an_idx_file_that_describes_the_tar_is_kept_whatever_its_version(tmp_path, written):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    index_webdataset(tmp_path)
    idx = written((tmp_path / "train" / "a.idx").read_bytes())
    put(tmp_path / "train" / "a.idx", idx)
    (tmp_path / "manifest.json").unlink()
    index_webdataset(tmp_path)
    assert (tmp_path / "train" / "a.idx").read_bytes() == idx
    assert verify(tmp_path) == []


def test_an_older_idx_file_still_locates_a_damaged_label(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    index_webdataset(tmp_path)
    put(tmp_path / "train" / "a.idx", older((tmp_path / "train" / "a.idx").read_bytes()))
    (tmp_path / "manifest.json").unlink()
    index_webdataset(tmp_path)
    offset, _ = tar_members(tmp_path / "train" / "a.tar").samples["0001"]["cls"]
    content = bytearray((tmp_path / "train" / "a.tar").read_bytes())
    content[offset] ^= 1
    put(tmp_path / "train" / "a.tar", bytes(content))
    (fault,) = verify(tmp_path)
    assert fault.what == "its label is damaged" and fault.where.startswith("sample 0001")


def test_a_damaged_older_idx_file_is_a_fault(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    index_webdataset(tmp_path)
    idx = older((tmp_path / "train" / "a.idx").read_bytes())
    put(tmp_path / "train" / "a.idx", idx)
    (tmp_path / "manifest.json").unlink()
    index_webdataset(tmp_path)
    put(tmp_path / "train" / "a.idx", idx.replace(b" 512 ", b" 1024 ", 1))
    (fault,) = verify(tmp_path)
    assert fault.file == "train/a.idx" and "not those of the manifest" in fault.what


def test_what_dalis_own_tool_writes_is_kept_for_names_with_folders(tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    put(tmp_path / "train" / "a.tar", tar_of(samples(3, "./x/é{:04d}") | {"._0.jpg": b"x"}))
    with wds2idx.IndexCreator(str(tmp_path / "train" / "a.tar"), str(tmp_path / "train" / "a.idx"), False) as creator:
        creator._get_data_tar = creator._get_data_tarfile  # tar's own listing escapes other letters
        creator.create_index()
    idx = (tmp_path / "train" / "a.idx").read_bytes()
    index_webdataset(tmp_path)
    assert (tmp_path / "train" / "a.idx").read_bytes() == idx and verify(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [
        lambda idx: idx.replace(b" 512 ", b" 1024 ", 1),
        lambda idx: idx.replace(b"v1.2", b"v0.9"),
        lambda idx: idx[:60],
        lambda idx: b"",
        lambda idx: b"\xff\xfe" * 50,
        listed_twice,
    ],
)
def test_an_idx_file_of_another_tar_is_refused_and_the_advice_works(tmp_path, other):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    index_webdataset(tmp_path)
    idx = (tmp_path / "train" / "a.idx").read_bytes()
    put(tmp_path / "train" / "a.idx", other(idx))
    (tmp_path / "manifest.json").unlink()
    assert "a.idx: describes another tar. Move it away" in refused(index_webdataset, tmp_path)
    (tmp_path / "train" / "a.idx").rename(tmp_path.parent / f"{tmp_path.name}.idx")
    index_webdataset(tmp_path)
    assert (tmp_path / "train" / "a.idx").read_bytes() == idx


def test_dali_reads_names_with_spaces_through_the_idx_file(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3, "my photo {:d}")))
    index_webdataset(tmp_path)
    assert read_by_dali(tmp_path) == [(jpeg(i), str(i).encode()) for i in range(3)]
    assert verify(tmp_path) == []
