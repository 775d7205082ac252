"""Image folders: nothing visible is left out in silence, and sound input is taken."""

import os
import subprocess
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden
from pipelines.shards.manifest import read_manifest
from support.small_sources import convert, make_folder, plain_jpeg, put_images, samples_and_unused, samples_of
from tools.lib.shards.sources.source import HIDDEN, MISPLACED
from tools.shard_imagenet import main

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


@pytest.fixture
def src(tmp_path) -> Path:
    return make_folder(tmp_path / "src")


MISPLACED_ENTRIES = {
    "a loose image beside train": "cover.jpg",
    "notes beside train": "README.txt",
    "test images": "test/x.jpg",
    "an archive beside the classes": "train/dog.tar",
    "a list beside the classes": "val/labels.csv",
    "a loose image among the classes": "train/x.jpg",
    "a class that training lacks": "val/dog/x.jpg",
    "a folder inside a class": "train/ant/more/x.jpg",
    "an empty class": "train/dog/",
    "a validation folder of another name": "validation/x.jpg",
}


@pytest.mark.parametrize("name", MISPLACED_ENTRIES.values(), ids=MISPLACED_ENTRIES)
def test_a_visible_entry_that_is_no_sample_ends_the_conversion_by_name(tmp_path, name):
    src = make_folder(tmp_path / "src", splits=("train", "val"))
    put_images(src, name)
    with pytest.raises(UserError, match="would be left out") as caught:
        convert(src, tmp_path / "out")
    seen = next(part for part in (name.rstrip("/"), *map(str, Path(name).parents)) if part in str(caught.value))
    assert len(seen.split("/")) >= min(2, len(Path(name).parts) - 1) and "--on-bad skip" in str(caught.value)
    assert not (tmp_path / "out").exists()


LINKS = ("train/bee", "val", "train/ant/5.jpg", "val/cat", "more")


@pytest.mark.parametrize("name", LINKS)
def test_a_link_to_nothing_is_named_wherever_it_stands(tmp_path, name):
    src = make_folder(tmp_path / "src", splits=("train",) if name == "val" else ("train", "val"))
    path = src / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.symlink_to("/nowhere/at/all")
    with pytest.raises(UserError, match=rf"{name}: a link to /nowhere/at/all, which is not there"):
        convert(src, tmp_path / "out")


def test_a_link_to_images_is_followed_as_a_folder_and_as_a_file(src, tmp_path):
    (src / "train" / "bee").rename(tmp_path / "elsewhere")
    (src / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    (src / "train" / "ant" / "more.jpg").symlink_to(tmp_path / "elsewhere" / "0.jpg")
    samples, unused = samples_and_unused(src)
    assert len(samples) == 13 and not any(unused.values())


def test_pipes_and_sockets_are_named_and_never_read(src, tmp_path):
    os.mkfifo(src / "train" / "ant" / "pipe.jpg")
    with pytest.raises(UserError, match="train/ant/pipe.jpg: neither a file nor a folder"):
        convert(src, tmp_path / "out")


def test_a_file_larger_than_any_image_is_rejected_and_not_read(src, tmp_path):
    for name in ("huge.jpg", "ordinary.jpg"):
        (src / "train" / "ant" / name).write_bytes(plain_jpeg())
    os.truncate(src / "train" / "ant" / "huge.jpg", 8 << 30)
    with pytest.raises(UserError, match=r"train/ant/huge.jpg \(8,589,934,592 bytes; no image has more than"):
        convert(src, tmp_path / "out")
    assert len(samples_of(convert_skipping(src, tmp_path / "out"))) == 7


def convert_skipping(src: Path, out: Path) -> Path:
    convert(src, out, skip_bad=True)
    return out


def test_a_link_to_a_device_is_named_and_never_read(src, tmp_path):
    (src / "train" / "ant" / "zero.jpg").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="train/ant/zero.jpg: neither a file nor a folder"):
        convert(src, tmp_path / "out")


def test_a_git_lfs_pointer_in_place_of_an_image_is_called_one(src, tmp_path):
    (src / "train" / "ant" / "0.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"train/ant/0.jpg \(a git-lfs pointer.* Run 'git lfs pull'"):
        convert(src, tmp_path / "out")


def test_links_in_a_circle_are_named(src, tmp_path):
    (src / "train" / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="train/loop: Too many levels of symbolic links"):
        convert(src, tmp_path / "out")


def test_what_a_person_leaves_out_is_listed_in_the_manifest_and_shown(src, tmp_path, capsys):
    put_images(src, "README.txt", "train/dog.tar", "val/dog/x.jpg")
    main(["build", str(src), str(tmp_path / "out"), "--on-bad", "skip", "--workers", "1"])
    assert "3 left out" in capsys.readouterr().out
    audit = read_manifest(tmp_path / "out")["audit"]
    assert audit["counts"]["left_out"] == 3
    assert {item["source"] for item in audit["left_out"]} == {"README.txt", "train/dog.tar", "val/dog"}
    main(["info", str(tmp_path / "out")])
    assert "left out" in capsys.readouterr().out
    # The decision holds for what was seen; a further entry is a change.
    put_images(src, "train/new.tar")
    with pytest.raises(UserError, match="the source's train images are others by now"):
        convert(src, tmp_path / "out", samples_per_shard=5000, skip_bad=True)


def test_all_entries_are_named_at_once_ten_at_the_most(src, tmp_path):
    put_images(src, *(f"train/ant/nested{i}/" for i in range(30)))
    with pytest.raises(UserError, match=r"would be left out: .*nested0, .* and 20 more") as caught:
        convert(src, tmp_path / "out")
    assert str(caught.value).count("nested") == 10


def test_after_the_person_has_moved_things_the_same_command_converts(src, tmp_path):
    """Advice is tried: a nested folder's images moved up, a stray file moved away."""
    put_images(src, "train/ant/more/x.jpg", "notes.txt")
    with pytest.raises(UserError, match="would be left out: notes.txt: .*; train/ant/more: "):
        convert(src, tmp_path / "out")
    (src / "train/ant/more/x.jpg").rename(src / "train/ant/x.jpg")
    (src / "train/ant/more").rmdir()
    (src / "notes.txt").rename(tmp_path / "notes.txt")
    assert convert(src, tmp_path / "out")["splits"]["train"]["samples"] == 7


def test_images_in_folders_inside_a_class_are_never_replaced_by_the_advised_move(tmp_path):
    src = make_folder(tmp_path / "src", splits=("train",))
    put_images(src, *(f"train/ant/{day}/{i}.jpg" for day in ("monday", "tuesday") for i in range(3)))
    with pytest.raises(UserError, match="train/ant/monday, train/ant/tuesday: a folder inside a class, .* mv -n,"):
        convert(src, tmp_path / "out")
    before = len(list(src.rglob("*.jpg")))
    for day in ("monday", "tuesday"):
        subprocess.run(f"mv -n {src}/train/ant/{day}/* {src}/train/ant/", shell=True, check=False)
    assert len(list(src.rglob("*.jpg"))) == before
    with pytest.raises(UserError, match="train/ant/monday, train/ant/tuesday: a folder inside a class"):
        convert(src, tmp_path / "out")  # Files that had the same names are still there, and still named.


def test_a_split_of_which_all_was_left_out_is_no_empty_split(tmp_path):
    src = make_folder(tmp_path / "src", splits=("train",))
    put_images(src, "val/zebra/x.jpg")
    with pytest.raises(UserError, match="src/val: no images of this split"):
        convert(src, tmp_path / "out", skip_bad=True)


def test_a_single_class_is_spoken_of(tmp_path, capsys):
    src = make_folder(tmp_path / "src", ["images"], splits=("train",))
    main(["build", str(src), str(tmp_path / "out"), "--workers", "1"])
    assert "there is a single class, 'images'" in capsys.readouterr().err


NEAR = {
    "a folder around the source": (["mine/train/ant/0.jpg"], "", "not recognised as a source. Give .*mine, if that"),
    "flat training images": (["train/0.jpg", "labels.csv"], "", "train: has no class folders. Expected .*/CLASS/"),
    "the folder train itself": (["train/ant/0.jpg", "val/ant/0.jpg"], "train", "Give .*src, if that is meant"),
    "classes without a split": (["ant/0.jpg", "bee/0.jpg"], "", "not recognised .* Expected images in .*/train/CLASS"),
    "validation alone": (["val/ant/0.jpg"], "", "not recognised .* Expected images in .*/train/CLASS"),
    "an image": (["x.jpg"], "x.jpg", "a file, not a folder"),
}


@pytest.mark.parametrize(("names", "given", "message"), NEAR.values(), ids=NEAR)
def test_the_folder_that_is_meant_is_named(tmp_path, names, given, message):
    put_images(tmp_path / "src", *names)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src" / given, tmp_path / "out")


HIDDEN_NAMES = ("._0.jpg", ".DS_Store", ".cache", "Thumbs.db", "thumbs.db", "desktop.ini", "@eaDir", "__MACOSX")


def test_the_rule_about_hidden_names_holds_for_each_part_of_a_path():
    assert all(map(is_hidden, HIDDEN_NAMES)) and is_hidden("a/__MACOSX/b.jpg") and is_hidden("./a/._b")
    assert not any(map(is_hidden, ("a.jpg", "./a/b.jpg", "../a", "a.b/c", "eaDir", "Thumbs.dbx", "a/")))


@pytest.mark.parametrize("folder", ["", "train", "val", "train/ant", "val/bee"])
def test_hidden_files_are_passed_over_and_counted_in_image_folders(src, folder):
    before, _ = samples_and_unused(src)
    for name in HIDDEN_NAMES:
        path = src / folder / name
        path.mkdir() if name in ("@eaDir", "__MACOSX", ".cache") else path.write_bytes(b"x")
    after, unused = samples_and_unused(src)
    assert after == before and len(unused[HIDDEN]) == len(HIDDEN_NAMES) and not unused[MISPLACED]


def test_a_hidden_file_that_appears_later_changes_nothing(src, tmp_path):
    manifest = convert(src, tmp_path / "out")
    assert manifest["audit"]["counts"]["hidden"] == 0
    (src / "train" / "ant" / ".DS_Store").touch()
    assert convert(src, tmp_path / "out") == manifest
