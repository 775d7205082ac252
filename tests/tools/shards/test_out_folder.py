"""The folder that a conversion writes to, and the file system that it lies on."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.common import files
from pipelines.common.errors import UserError
from pipelines.shards.index import read_index
from pipelines.shards.manifest import manifest_bytes, read_manifest
from support.small_sources import (
    convert,
    make_folder,
    put_images,
    tree,
    write_ilsvrc,
)
from tools.lib.shards import conversion
from tools.lib.shards.build import merge


@pytest.fixture
def src(tmp_path) -> Path:
    return make_folder(tmp_path / "src")


@pytest.mark.parametrize("content", ["{", "[]", '{"source": 1}', "null"])
def test_an_unfinished_conversion_that_cannot_be_read_is_named(src, tmp_path, content):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text(content)
    for call in (lambda: convert(src, tmp_path / "out"), lambda: merge(tmp_path / "out")):
        with pytest.raises(UserError, match="job.json: damaged, or not of this tool"):
            call()


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
    put_images(tmp_path / "out", name)
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


def test_a_folder_that_another_machine_has_claimed_in_the_meantime_is_free_for_this_one(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train").mkdir()
    with pytest.raises(UserError, match="was not left by this tool"):
        conversion._check_free(partial, tmp_path / "out")
    (partial / conversion.JOB).write_text("{}")
    conversion._check_free(partial, tmp_path / "out")


def test_two_machines_whose_listing_fails_say_why_and_leave_nothing(src, tmp_path):
    put_images(src, "cover.jpg")
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(convert, src, tmp_path / "out", part=(part, 2)) for part in range(2)]
        errors = [str(call.exception()) for call in calls]
    assert all("cover.jpg" in error or "run the same command again" in error.lower() for error in errors), errors
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("content", ["precious", "train"])
def test_a_folder_that_holds_somebodys_files_is_never_taken(src, tmp_path, content):
    put_images(tmp_path / "out", f"{content}/x.jpg")
    with pytest.raises(UserError, match="exists already and is not a dataset"):
        convert(src, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [content]


def test_an_out_that_is_a_file_is_refused(src, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match="out: exists already and is not a dataset"):
        convert(src, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"
