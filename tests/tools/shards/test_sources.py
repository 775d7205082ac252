"""The rules about other people's folders: nothing visible is left out in silence, and sound input is taken."""

import errno
import io
import os
import re
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_shard_imagenet import convert, samples_of, tree, write_ilsvrc, write_kaggle

from pipelines.common import files
from pipelines.common.errors import UserError
from pipelines.common.files import is_hidden
from pipelines.shards.index import read_index
from pipelines.shards.manifest import class_order_doubt, manifest_bytes, read_manifest
from tools.lib.shards.build import BuildOptions, describe, merge
from tools.lib.shards.sources import open_source
from tools.lib.shards.sources.source import EXPECTED, HIDDEN, MISPLACED, SourceOptions, Unused
from tools.shard_imagenet import main

CLASSES = ("ant", "bee", "cat")


def jpeg(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (colour % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(folder: Path, *names: str) -> None:
    """Write an image under each name; a name that ends in / is an empty folder."""
    for number, name in enumerate(names):
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))


def make_folder(root: Path, classes=CLASSES, splits=("train", "val")) -> Path:
    put(root, *(f"{split}/{name}/{i}.jpg" for split in splits for name in classes for i in range(2)))
    return root


def listed(root: Path, **options) -> tuple[list, dict[str, list[Unused]]]:
    """Samples of all splits, and what is not used by its kind."""
    source = open_source(root, SourceOptions(**options), root / "none")
    found = [each for split in source.splits.values() for each in split()]
    unused = {kind: [each for each in found if isinstance(each, Unused) and each.kind == kind] for kind in KINDS}
    return [each for each in found if not isinstance(each, Unused)], unused


KINDS = (HIDDEN, EXPECTED, MISPLACED)


@pytest.fixture
def src(tmp_path) -> Path:
    return make_folder(tmp_path / "src")


# --- everything visible is used or named ---

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
}


@pytest.mark.parametrize("name", MISPLACED_ENTRIES.values(), ids=MISPLACED_ENTRIES)
def test_a_visible_entry_that_is_no_sample_ends_the_conversion_by_name(tmp_path, name):
    src = make_folder(tmp_path / "src", splits=("train", "val"))
    put(src, name)
    with pytest.raises(UserError, match="would be left out") as caught:
        convert(src, tmp_path / "out")
    seen = next(part for part in (name.rstrip("/"), *map(str, Path(name).parents)) if part in str(caught.value))
    assert len(seen.split("/")) >= min(2, len(Path(name).parts) - 1) and "--on-bad skip" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_val_and_two_validation_folders_are_named(tmp_path):
    src = make_folder(tmp_path / "src", splits=("train",))
    (src / "val").write_text("no folder")
    with pytest.raises(UserError, match="val: a file, and the validation images belong in a folder"):
        convert(src, tmp_path / "out")
    (src / "val").unlink()
    make_folder(src, splits=("val", "validation"))
    with pytest.raises(UserError, match="validation: .* There are two, so move one away"):
        convert(src, tmp_path / "out")


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
    samples, unused = listed(src)
    assert len(samples) == 13 and not any(unused.values())


def test_a_link_of_train_to_nothing_is_the_reason_that_is_given(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train").symlink_to("/nowhere")
    with pytest.raises(UserError, match="Its train is a link to /nowhere, which is not there"):
        convert(tmp_path / "src", tmp_path / "out")


def test_pipes_and_sockets_are_named_and_never_read(src, tmp_path):
    os.mkfifo(src / "train" / "ant" / "pipe.jpg")
    with pytest.raises(UserError, match="train/ant/pipe.jpg: neither a file nor a folder"):
        convert(src, tmp_path / "out")


def test_a_file_larger_than_any_image_is_rejected_and_not_read(src, tmp_path):
    for name in ("huge.jpg", "ordinary.jpg"):
        (src / "train" / "ant" / name).write_bytes(jpeg())
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
    with pytest.raises(UserError, match=f"LOC_val_solution.csv: {image} has two classes, "):
        convert(tmp_path / "src", tmp_path / "other")


NO_DEVKITS = {
    "not a gzip": lambda tar: None,
    "no meta": lambda tar: add(tar, "x.txt", b"1"),
    "a matlab 7.3 file": lambda tar: add_devkit(tar, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600)),
    "garbage": lambda tar: add_devkit(tar, bytes(range(256))),
}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


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


@pytest.mark.parametrize("content", ["{", "[]", '{"source": 1}', "null"])
def test_an_unfinished_conversion_that_cannot_be_read_is_named(src, tmp_path, content):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text(content)
    for call in (lambda: convert(src, tmp_path / "out"), lambda: merge(tmp_path / "out")):
        with pytest.raises(UserError, match="job.json: damaged, or not of this tool"):
            call()


def test_what_a_person_leaves_out_is_listed_in_the_manifest_and_shown(src, tmp_path, capsys):
    put(src, "README.txt", "train/dog.tar", "val/dog/x.jpg")
    main(["build", str(src), str(tmp_path / "out"), "--on-bad", "skip", "--workers", "1"])
    assert "3 left out" in capsys.readouterr().out
    audit = read_manifest(tmp_path / "out")["audit"]
    assert audit["counts"]["left_out"] == 3
    assert {item["source"] for item in audit["left_out"]} == {"README.txt", "train/dog.tar", "val/dog"}
    main(["info", str(tmp_path / "out")])
    assert "left out" in capsys.readouterr().out
    # The decision holds for what was seen; a further entry is a change.
    put(src, "train/new.tar")
    with pytest.raises(UserError, match="the source's train images are others by now"):
        convert(src, tmp_path / "out", samples_per_shard=5000, skip_bad=True)


def test_all_entries_are_named_at_once_ten_at_the_most(src, tmp_path):
    put(src, *(f"train/ant/nested{i}/" for i in range(30)))
    with pytest.raises(UserError, match=r"30 entries would be left out. .*nested0, .* and 20 more") as caught:
        convert(src, tmp_path / "out")
    assert str(caught.value).count("nested") == 10


def test_after_the_person_has_moved_things_the_same_command_converts(src, tmp_path):
    """Advice is tried: a nested folder's images moved up, a stray file moved away."""
    put(src, "train/ant/more/x.jpg", "notes.txt")
    with pytest.raises(UserError, match="2 entries would be left out"):
        convert(src, tmp_path / "out")
    (src / "train/ant/more/x.jpg").rename(src / "train/ant/x.jpg")
    (src / "train/ant/more").rmdir()
    (src / "notes.txt").rename(tmp_path / "notes.txt")
    assert convert(src, tmp_path / "out")["splits"]["train"]["samples"] == 7


@pytest.mark.parametrize("name", ["validation", "valid", "Val", "VALIDATION"])
def test_a_validation_folder_of_a_usual_name_is_named_and_renaming_it_helps(tmp_path, name):
    src = make_folder(tmp_path / "src", splits=("train", name))
    with pytest.raises(UserError, match=f"{name}: the validation images belong in .*val. Rename it"):
        convert(src, tmp_path / "out")
    (src / name).rename(src / "val")
    assert convert(src, tmp_path / "out")["splits"]["val"]["samples"] == 6


def test_of_a_test_folder_without_validation_renaming_is_advised_and_helps(tmp_path):
    src = make_folder(tmp_path / "src", splits=("train", "test"))
    with pytest.raises(UserError, match="test: rename it to val, or move it away"):
        convert(src, tmp_path / "out")
    (src / "test").rename(src / "val")
    assert convert(src, tmp_path / "out")["splits"]["val"]["samples"] == 6


def test_images_in_folders_inside_a_class_are_never_replaced_by_the_advised_move(tmp_path):
    src = make_folder(tmp_path / "src", splits=("train",))
    put(src, *(f"train/ant/{day}/{i}.jpg" for day in ("monday", "tuesday") for i in range(3)))
    with pytest.raises(UserError, match="train/ant/monday, train/ant/tuesday: a folder inside a class. .* mv -n,"):
        convert(src, tmp_path / "out")
    before = len(list(src.rglob("*.jpg")))
    for day in ("monday", "tuesday"):
        subprocess.run(f"mv -n {src}/train/ant/{day}/* {src}/train/ant/", shell=True, check=False)
    assert len(list(src.rglob("*.jpg"))) == before
    with pytest.raises(UserError, match="train/ant/monday, train/ant/tuesday: a folder inside a class"):
        convert(src, tmp_path / "out")  # what had the same names is still there, and still named


def test_tiny_imagenets_validation_images_are_sorted_by_the_advised_command(tmp_path):
    src = make_folder(tmp_path / "tiny images", splits=("train",))
    put(src, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    (src / "val" / "val_annotations.txt").write_text("val_0.JPEG\tbee\t0\t0\t9\t9\nval_1.JPEG\tant\t0\t0\t9\t9\n")
    with pytest.raises(UserError, match="val_annotations.txt has its labels; sort by it: ") as caught:
        convert(src, tmp_path / "out")
    command = re.search(r"sort by it: (.*); then move", str(caught.value))[1]
    subprocess.run(["bash", "-c", command], check=True)
    (src / "val" / "val_annotations.txt").rename(tmp_path / "labels")
    (src / "val" / "images").rmdir()
    assert convert(src, tmp_path / "out")["splits"]["val"]["class_counts"] == [1, 1, 0]


def test_a_split_of_which_all_was_left_out_is_no_empty_split(tmp_path):
    src = make_folder(tmp_path / "src", splits=("train",))
    put(src, "val/zebra/x.jpg")
    with pytest.raises(UserError, match=r"no images in split val. All that it holds was left out \(val/zebra\)"):
        convert(src, tmp_path / "out", skip_bad=True)


def test_a_single_class_is_spoken_of(tmp_path, capsys):
    src = make_folder(tmp_path / "src", ["images"], splits=("train",))
    main(["build", str(src), str(tmp_path / "out"), "--workers", "1"])
    assert "there is a single class, 'images'" in capsys.readouterr().err


NEAR = {
    "a folder around the source": (["mine/train/ant/0.jpg"], "", "Give the folder inside it: .*mine"),
    "classes inside images (CUB)": (
        ["images/ant/0.jpg", "images/bee/0.jpg", "x.txt"],
        "",
        "rename it, if they are train",
    ),
    "images without classes (Pets)": (["images/ant_1.jpg", "annotations/x.png"], "", "by class: .*train/CLASS"),
    "flat training images": (["train/0.jpg", "labels.csv"], "", "1 images lie directly in it, as 0.jpg: sort them"),
    "the folder train itself": (["train/ant/0.jpg", "val/ant/0.jpg"], "train", "Give the folder above it"),
    "classes without a split": (["ant/0.jpg", "bee/0.jpg"], "", "belong one level deeper: move them into"),
    "train under another name": (["Training/ant/0.jpg"], "", "rename .*Training"),
    "validation alone": (["val/ant/0.jpg"], "", "validation images alone"),
    "an image": (["x.jpg"], "x.jpg", "a file, not a folder"),
}


@pytest.mark.parametrize(("names", "given", "message"), NEAR.values(), ids=NEAR)
def test_the_folder_that_is_meant_is_named(tmp_path, names, given, message):
    put(tmp_path / "src", *names)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src" / given, tmp_path / "out")


@pytest.mark.parametrize("inside", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/train"])
def test_a_part_of_kaggles_download_leads_to_the_whole(tmp_path, inside):
    write_kaggle(tmp_path / "src")
    with pytest.raises(UserError, match=f"[Gg]ive {tmp_path}/src"):
        convert(tmp_path / "src" / inside, tmp_path / "out")
    assert "val" in convert(tmp_path / "src", tmp_path / "out")["splits"]


def test_the_usual_company_of_imagenets_files_is_listed_and_strangers_are_named(tmp_path):
    write_kaggle(tmp_path / "kaggle")
    put(tmp_path / "kaggle", "ILSVRC/Annotations/x.xml", "ILSVRC/ImageSets/", "ILSVRC/Data/CLS-LOC/test/x.JPEG")
    put(tmp_path / "kaggle", "LOC_train_solution.csv", "LOC_sample_submission.csv")
    _, unused = listed(tmp_path / "kaggle")
    assert len(unused[EXPECTED]) == 5 and not unused[MISPLACED]
    put(tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/extra/x.JPEG", "ILSVRC/Data/CLS-LOC/val/more/x.JPEG", "my.zip")
    put(tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/train/n01440764.tar")
    _, unused = listed(tmp_path / "kaggle")
    assert [each.source.rpartition("/")[2] for each in unused[MISPLACED]] == [
        "my.zip",
        "extra",
        "n01440764.tar",
        "more",
    ]

    write_ilsvrc(tmp_path / "ilsvrc")
    put(tmp_path / "ilsvrc", "ILSVRC2012_img_test_v10102019.tar", "meta.bin", "ILSVRC2012_bbox_train_v2.tar.gz")
    _, unused = listed(tmp_path / "ilsvrc")
    assert len(unused[EXPECTED]) == 3 and not unused[MISPLACED]


def test_two_kinds_of_sources_in_one_folder_are_told_apart_by_the_option(tmp_path):
    write_ilsvrc(tmp_path / "src")
    make_folder(tmp_path / "src")
    with pytest.raises(UserError, match="train, val: part of another source: say with --source"):
        convert(tmp_path / "src", tmp_path / "out")
    samples, unused = listed(tmp_path / "src", kind="folder")
    assert len(samples) == 12 and len(unused[EXPECTED]) == 3 and not unused[MISPLACED]
    _, unused = listed(tmp_path / "src", kind="ilsvrc")
    assert len(unused[EXPECTED]) == 2 and not unused[MISPLACED]


def test_files_in_imagenets_tars_that_are_no_images_are_named(tmp_path):
    write_ilsvrc(tmp_path / "src")
    with tarfile.open(tmp_path / "src" / "ILSVRC2012_img_val.tar", "a") as tar:
        for name in ("labels.txt", "._ILSVRC2012_val_00000001.JPEG"):
            tar.addfile(tarfile.TarInfo(name))
    _, unused = listed(tmp_path / "src")
    assert [each.source for each in unused[MISPLACED]] == ["ILSVRC2012_img_val.tar: labels.txt"]
    assert len(unused[HIDDEN]) == 1


# --- hidden and system files ---

HIDDEN_NAMES = ("._0.jpg", ".DS_Store", ".cache", "Thumbs.db", "thumbs.db", "desktop.ini", "@eaDir", "__MACOSX")


def test_the_rule_about_hidden_names_holds_for_each_part_of_a_path():
    assert all(map(is_hidden, HIDDEN_NAMES)) and is_hidden("a/__MACOSX/b.jpg") and is_hidden("./a/._b")
    assert not any(map(is_hidden, ("a.jpg", "./a/b.jpg", "../a", "a.b/c", "eaDir", "Thumbs.dbx", "a/")))


@pytest.mark.parametrize("folder", ["", "train", "val", "train/ant", "val/bee"])
def test_hidden_files_are_passed_over_and_counted_in_image_folders(src, folder):
    before, _ = listed(src)
    for name in HIDDEN_NAMES:
        path = src / folder / name
        path.mkdir() if name in ("@eaDir", "__MACOSX", ".cache") else path.write_bytes(b"x")
    after, unused = listed(src)
    assert after == before and len(unused[HIDDEN]) == len(HIDDEN_NAMES) and not unused[MISPLACED]


def test_hidden_files_are_passed_over_and_counted_in_kaggles_layout(tmp_path):
    write_kaggle(tmp_path / "src")
    before, _ = listed(tmp_path / "src")
    folders = ("", "ILSVRC", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val")
    for folder in folders:
        (tmp_path / "src" / folder / "._x.JPEG").write_bytes(b"x")
    after, unused = listed(tmp_path / "src")
    assert after == before and len(unused[HIDDEN]) == len(folders)


def test_a_hidden_file_that_appears_later_changes_nothing(src, tmp_path):
    manifest = convert(src, tmp_path / "out")
    assert manifest["audit"]["counts"]["hidden"] == 0
    (src / "train" / "ant" / ".DS_Store").touch()
    assert convert(src, tmp_path / "out") == manifest


# --- the order of classes ---


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


# --- names ---


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
    put(src, *(f"train/\u732b/{name}.jpg" for name in strange))
    convert(src, tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 4 + len(strange)
    with tarfile.open(read_index(tmp_path / "out", "train").paths[0]) as tar:
        assert len([name for name in tar.getnames() if name.endswith(".jpg")]) == 4 + len(strange)


def test_all_names_that_are_not_utf_8_are_named_at_once(src, tmp_path):
    for name in (b"\xff.jpg", b"\xe9t\xe9.jpg"):
        with open(os.fsencode(src / "train" / "ant") + b"/" + name, "wb") as file:
            file.write(jpeg())
    with pytest.raises(UserError, match=r"2 entries .*train/ant/\\xe9t\\xe9.jpg, train/ant/\\xff.jpg: a name that is"):
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
    put(src, "val/cafe\u0301/9.jpg", "train/tea/a.b.jpg", "train/tea/a_b.jpg")
    samples, unused = listed(src)
    assert len(samples) == 8  # the decomposed form sorts first, with one image
    assert [each.source for each in unused[MISPLACED]] == ["train/tea/a_b.jpg", "val/caf\u00e9"]

    write_kaggle(tmp_path / "kaggle")
    put(tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.jpg")
    _, unused = listed(tmp_path / "kaggle")
    assert [Path(each.source).name for each in unused[MISPLACED]] == ["ILSVRC2012_val_00000001.jpg"]

    write_ilsvrc(tmp_path / "ilsvrc")
    train = tmp_path / "ilsvrc" / "ILSVRC2012_img_train.tar"
    with tarfile.open(train) as tar:
        first = tar.getnames()[0]
        content = tar.extractfile(first).read()
    with tarfile.open(train, "a") as tar:
        add(tar, f"again/{first}", content)
    with tarfile.open(tmp_path / "ilsvrc" / "ILSVRC2012_img_val.tar", "a") as tar:
        add(tar, "more/ILSVRC2012_val_00000001.JPEG", jpeg())
    _, unused = listed(tmp_path / "ilsvrc")
    ends = [each.source.rpartition(": ")[2] for each in unused[MISPLACED]]
    assert ends == [f"again/{first}", "more/ILSVRC2012_val_00000001.JPEG"]


# --- file systems and the place to write to ---


def no_links(*_, **__):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def no_folder_sync(code: int):
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    return fsync


def test_a_file_system_without_hard_links_is_taken(src, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    assert convert(src, tmp_path / "out")["splits"]["train"]["samples"] == 6


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders_is_taken(src, tmp_path, monkeypatch, code):
    monkeypatch.setattr(files.os, "fsync", no_folder_sync(code))
    assert convert(src, tmp_path / "out")["splits"]["train"]["samples"] == 6


def test_a_folder_that_fails_to_sync_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", no_folder_sync(errno.EIO))
    with pytest.raises(OSError):
        files.sync_folder(tmp_path)


@pytest.mark.parametrize("out", [".", "empty", "link", "with/system/files"])
def test_an_empty_folder_that_is_there_becomes_the_dataset(src, tmp_path, monkeypatch, out):
    convert(src, tmp_path / "expected")
    here = tmp_path / "here"
    (here / "with/system/files/lost+found").mkdir(parents=True)
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    if out == ".":
        here = here / "empty"
    monkeypatch.chdir(here)
    identity = os.stat(out).st_ino
    convert(src, Path(out))
    assert os.stat(out).st_ino == identity  # the folder itself stays, as a mount point must
    assert tree(Path(out)) == tree(tmp_path / "expected")
    assert not list(here.parent.rglob("*.partial"))


def test_an_empty_folder_is_filled_by_several_machines_and_after_a_kill(src, tmp_path):
    convert(src, tmp_path / "expected", samples_per_shard=2)
    (tmp_path / "out").mkdir()
    for part in (1, 0):
        assert convert(src, tmp_path / "out", samples_per_shard=2, part=(part, 2)) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    merge(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


@pytest.mark.parametrize("moves", range(4))
def test_a_process_that_is_killed_while_it_moves_files_up_is_completed(src, tmp_path, monkeypatch, moves):
    convert(src, tmp_path / "expected")
    (tmp_path / "out").mkdir()
    rename, done, dead = Path.rename, [], []

    def killed(path: Path, target: Path) -> Path:
        if dead or (Path(target).parent == tmp_path / "out" and len(done) == moves):
            dead.append(path)  # nothing is done any more, not even undone
            raise KeyboardInterrupt
        if Path(target).parent == tmp_path / "out":
            done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    convert(src, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


@pytest.mark.parametrize("name", ["audit.jsonl", "train/x.jpg", "manifest.json.bak"])
def test_a_file_that_a_person_puts_into_out_meanwhile_is_never_replaced(src, tmp_path, name):
    (tmp_path / "out").mkdir()
    assert convert(src, tmp_path / "out", samples_per_shard=2, part=(0, 2)) is None
    assert convert(src, tmp_path / "out", samples_per_shard=2, part=(1, 2)) is None
    put(tmp_path / "out", name)
    content = (tmp_path / "out" / name).read_bytes()
    if name.endswith(".bak"):
        merge(tmp_path / "out")
    else:
        with pytest.raises(UserError, match=f"{name.partition('/')[0]}: was put there meanwhile. Move it away"):
            merge(tmp_path / "out")
        (tmp_path / "out" / name.partition("/")[0]).rename(tmp_path / "moved")
        merge(tmp_path / "out")
        (tmp_path / "moved").rename(tmp_path / "out" / "mine")
        name = "mine/x.jpg" if "/" in name else "mine"
    assert (tmp_path / "out" / name).read_bytes() == content
    assert read_index(tmp_path / "out", "train").num_classes == 3


def test_a_dataset_of_an_older_version_is_left_alone_by_the_same_command(src, tmp_path):
    write_ilsvrc(tmp_path / "ilsvrc")
    for name, folder in (("folder", src), ("ilsvrc", tmp_path / "ilsvrc")):
        manifest = convert(folder, tmp_path / "made" / name)
        older = {key: value for key, value in manifest.items() if key != "class_order"}
        (tmp_path / "made" / name / "manifest.json").write_bytes(manifest_bytes(older))
        assert convert(folder, tmp_path / "made" / name) == read_manifest(tmp_path / "made" / name)


def test_two_machines_whose_listing_fails_say_why_and_leave_nothing(src, tmp_path):
    put(src, "cover.jpg")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(convert, src, tmp_path / "out", part=(part, 2)) for part in range(2)]
        errors = [str(call.exception()) for call in calls]
    assert all("cover.jpg" in error or "run the same command again" in error.lower() for error in errors), errors
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_of_another_file_system_that_out_became_is_named_with_what_helps(src, tmp_path, monkeypatch):
    assert convert(src, tmp_path / "out", part=(0, 2)) is None
    (tmp_path / "out").mkdir()  # where something is mounted now
    stat = Path.stat

    def elsewhere(path: Path, **options):
        found = stat(path, **options)
        return SimpleNamespace(st_dev=-1, st_mode=found.st_mode) if path == tmp_path / "out" else found

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", elsewhere)
        with pytest.raises(UserError, match=r"folder of another file system now. Move it to .*out/.partial"):
            convert(src, tmp_path / "out", part=(1, 2))
    (tmp_path / "out.partial").rename(tmp_path / "out" / ".partial")
    assert convert(src, tmp_path / "out", part=(1, 2)) is None
    assert merge(tmp_path / "out")["splits"]["train"]["samples"] == 6


@pytest.mark.parametrize("content", ["precious", "train"])
def test_a_folder_that_holds_somebodys_files_is_never_taken(src, tmp_path, content):
    put(tmp_path / "out", f"{content}/x.jpg")
    with pytest.raises(UserError, match="exists already and is not a dataset"):
        convert(src, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [content]


def test_an_out_that_is_a_file_is_refused(src, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match="out: exists already and is not a dataset"):
        convert(src, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("name", ["job.json", ".partial/job.json"])
@pytest.mark.parametrize("content", ['{"mine": 1}', "no JSON"])
def test_a_file_of_somebody_else_that_is_named_like_ours_is_never_removed(src, tmp_path, name, content):
    convert(src, tmp_path / "out")
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    merge(tmp_path / "out")
    convert(src, tmp_path / "out")
    assert path.read_text() == content
