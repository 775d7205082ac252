"""Files take the place of others whole or not at all; what is no file stays what it is."""

import errno
import fcntl
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from pipelines.common.files import (
    append_synced,
    locked,
    move_entries,
    open_regular,
    read_json,
    replacing,
    write_once,
    write_synced,
)


def test_a_block_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="disk"), replacing(path) as file:
        file.write(b"half")
        raise OSError("disk")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_synced(path, b"after")
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_synced(pipe, b"content")
    reader.join(timeout=300)
    assert found == [b"content"] and pipe.is_fifo()


def make_link(path):
    (path.parent / "precious").write_text("precious")
    path.symlink_to("precious")


@pytest.mark.parametrize("make", [make_link, os.mkfifo, os.mkdir], ids=["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_of_ours_is_named_and_left_alone(tmp_path, make):
    path = tmp_path / ".lock"
    make(path)
    before = {each.name: each.lstat().st_ino for each in tmp_path.iterdir()}
    with pytest.raises(UserError, match=".lock: not a file that this program made. Move it away"), locked(path, "busy"):
        pass
    assert {each.name: each.lstat().st_ino for each in tmp_path.iterdir()} == before
    assert all(each.read_text() == "precious" for each in tmp_path.iterdir() if each.is_file())
    (path.rmdir if path.is_dir() else path.unlink)()  # the advice works
    with locked(path, "busy"):
        pass


def test_a_lock_keeps_the_content_of_its_file_and_others_out(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with locked(tmp_path / ".lock", "busy"), pytest.raises(UserError, match="busy. Wait for it, or stop it"):
        locked(tmp_path / ".lock", "busy").__enter__()
    assert (tmp_path / ".lock").read_text() == "mine"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"1"])
def test_a_json_file_that_holds_no_object_counts_as_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "none") == read_json(tmp_path) == {}


def test_a_lock_that_was_removed_by_the_process_that_held_it_keeps_nobody_out_and_says_so(tmp_path):
    path, errors = tmp_path / ".lock", []

    def wait() -> None:
        try:
            with locked(path, "", wait=True):
                errors.append("held")
        except UserError as error:
            errors.append(str(error))

    with locked(path, "busy"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not (tmp_path / ".lock").exists() or waiting.is_alive() and not _is_waited_for(path):
            pass
        path.unlink()
    waiting.join(timeout=300)
    assert len(errors) == 1 and "was removed while this process waited for it" in errors[0]


def _is_waited_for(path: Path) -> bool:
    """Whether somebody waits for the lock on this file; the other processes of xdist wait for locks, too."""
    locks = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f":{path.stat().st_ino} " in line for line in locks)


def test_entries_move_into_a_folder_all_or_none_and_the_named_ones_last(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    for name in ("a", "manifest", "z", "job"):
        (tmp_path / "from" / name).write_text(name)
    (tmp_path / "to" / "z").write_text("mine")
    with pytest.raises(FileExistsError):
        move_entries(tmp_path / "from", tmp_path / "to", ("manifest", "job"))
    assert len(list((tmp_path / "from").iterdir())) == 4 and (tmp_path / "to" / "z").read_text() == "mine"
    (tmp_path / "to" / "z").unlink()
    order, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: order.append(path.name) or rename(path, target))
    move_entries(tmp_path / "from", tmp_path / "to", ("manifest", "job"))
    assert order == ["a", "z", "manifest", "job"] and not (tmp_path / "from").exists()


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    path = tmp_path / "x"
    assert write_once(path, [b"on", b"ce"]) and not write_once(path, [b"again"])
    assert path.read_bytes() == b"once" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_another_process_makes_in_the_meantime_stays(tmp_path, monkeypatch, has_links):
    """The other process is the quicker one by as little as it can be."""
    path, link = tmp_path / "x", os.link

    def link_after_another_process(source, target):
        path.write_bytes(b"the other's")
        if not has_links:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_another_process)
    assert not write_once(path, [b"ours"])
    assert path.read_bytes() == b"the other's" and os.listdir(tmp_path) == ["x"]


def test_a_file_system_without_links_takes_a_file_too(tmp_path, monkeypatch):
    def refused(*_args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refused)
    assert write_once(tmp_path / "x", [b"once"]) and (tmp_path / "x").read_bytes() == b"once"
    assert os.listdir(tmp_path) == ["x"]


def test_a_disk_that_is_full_is_one_line_and_leaves_no_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^.*/x: cannot be written \(File too large\)\. No file may become"):
            write_once(tmp_path / "x", [bytes(101)])
        assert not os.listdir(tmp_path)
        (tmp_path / "x").touch()
        assert not write_once(tmp_path / "x", [bytes(101)])  # It writes nothing where the file is there.
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_only_regular_files_are_opened_and_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "folder", tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(OSError) as error:
            open_regular(path)
        assert error.value.filename == str(path)
    assert len(os.listdir("/proc/self/fd")) == before
    with open(open_regular(tmp_path / "file"), "rb") as file:
        assert file.read() == b"content"


def is_waited_for(path: Path) -> bool:
    """Whether somebody waits for a lock of a file."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "-> FLOCK" in line]
    return any(f":{path.stat().st_ino} " in line for line in waiting)


def test_processes_that_add_lines_at_once_wait_for_each_other(tmp_path):
    path = tmp_path / "lines"
    append_synced(path, [b"1"])
    thread = threading.Thread(target=append_synced, args=(path, [b"3"]))
    with open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"half of a ")
        thread.start()
        while thread.is_alive() and not is_waited_for(path):
            time.sleep(0.001)
        file.write(b"line\n")
    thread.join()
    append_synced(path, [b"4", b"5"])
    assert path.read_bytes() == b"1\nhalf of a line\n3\n4\n5\n"


def test_a_line_that_was_cut_off_is_completed_before_others_are_added(tmp_path):
    (tmp_path / "lines").write_bytes(b"1\nhalf")
    append_synced(tmp_path / "lines", [b"2"])
    assert (tmp_path / "lines").read_bytes() == b"1\nhalf\n2\n"
