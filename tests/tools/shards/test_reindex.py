"""Existing tars, indexed where they lie or elsewhere, and their .idx files."""

import errno
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.common.files import replacing
from pipelines.shards.index import read_index
from support.hand_made import jpeg, keys, put, refused, samples, tar_of
from support.small_sources import add, jpeg_of, samples_of, tree
from tools.lib.common.photos import photographs
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.verify import verify
from tools.shard_imagenet import main

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


def test_existing_webdataset_tars_are_indexed_and_not_touched(digits, tmp_path):
    root = tmp_path / "wds"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for path in sorted((digits / split).glob("*.tar")):
            (root / split / path.name).write_bytes(path.read_bytes())
    (root / "train" / "train-00000.idx").write_text("v1.2 1\njpg 1 2 other.jpg\n")
    with pytest.raises(UserError, match="train-00000.idx: describes another tar"):
        index_webdataset(root)
    (root / "train" / "train-00000.idx").unlink()
    before = tree(root)
    index_webdataset(root, workers=2)
    after = tree(root)
    assert {name: after[name] for name in before} == before
    for split in ("train", "val"):
        assert samples_of(root, split) == samples_of(digits, split)
        ours, theirs = read_index(digits, split).samples, read_index(root, split).samples
        assert np.array_equal(ours, theirs)
        assert (root / split / f"{split}-00000.idx").read_bytes() == (
            digits / split / f"{split}-00000.idx"
        ).read_bytes()


def test_a_file_that_a_killed_process_was_writing_is_no_stranger(digits, tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    for path in (digits / "train").glob("*.tar"):
        (tmp_path / "train" / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "unlink", lambda path, missing_ok: None)
        with replacing(tmp_path / "train" / "train-00000.idx"):
            raise KeyboardInterrupt
    (leftover,) = (tmp_path / "train").glob("*.partial")
    index_webdataset(tmp_path)
    assert samples_of(tmp_path, "train") == samples_of(digits, "train") and leftover.exists()


def test_tars_of_another_writer_are_indexed_too(tmp_path):
    """Other members, other order, another extension, a sample without a label and one with a PNG."""
    root = tmp_path / "wds"
    (root / "train").mkdir(parents=True)
    photo = photographs()[0][1].resize((40, 30))
    with tarfile.open(root / "train" / "a.tar", "w") as tar:
        add(tar, "x/1.json", b"{}")
        add(tar, "x/1.jpeg", jpeg_of(photo))
        add(tar, "x/1.cls", b"2\n")
        add(tar, "x/2.jpg", jpeg_of(photo))
        add(tar, "x/3.jpg", jpeg_of(photo, format="PNG"))
        add(tar, "x/3.cls", b"0")
    with pytest.raises(UserError, match=r"samples cannot be used: train/a.tar: x/2: has jpg; .*x/3: PNG image"):
        index_webdataset(root)
    assert not (root / "manifest.json").exists()
    (root / "train" / "b.tar.gz").touch()
    with pytest.raises(UserError, match=r"b.tar.gz: only uncompressed train/\*.tar"):
        index_webdataset(root)
    (root / "train" / "b.tar.gz").unlink()
    manifest = index_webdataset(root, skip_bad=True)
    assert samples_of(root) == {"x/1": (jpeg_of(photo), 2)}
    assert manifest["audit"]["counts"]["rejected"] == 2 and len(manifest["classes"]) == 3
    with pytest.raises(UserError, match="exists already"):
        index_webdataset(root)


@pytest.mark.parametrize("position", [0, 512 * 4 + 3, -1])
def test_damaged_headers_of_tars_are_named_and_not_taken_for_the_end(digits, tmp_path, position):
    root = tmp_path / "wds"
    (root / "train").mkdir(parents=True)
    content = bytearray((digits / "train" / "train-00000.tar").read_bytes())
    if position < 0:
        content = content[: 512 * 9 + 100]  # cut off within a header
    else:
        content[position] ^= 1
    (root / "train" / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a.tar: (damaged or cut off at byte|not an uncompressed tar, or damaged)"):
        index_webdataset(root)


def test_names_that_occur_twice_in_a_tar_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        for name in ("1.cls", "1.jpg", "2.cls", "2.jpg", "1.cls"):
            add(tar, name, b"0")
    with pytest.raises(UserError, match="1.cls occurs twice"):
        index_webdataset(tmp_path)


def lock(folder: Path, monkeypatch) -> None:
    """Let the system refuse new files in a folder: permissions of files do not bind the administrator."""
    system_open = os.open

    def refusing(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(os.fsdecode(path)).is_relative_to(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return system_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


def test_a_read_only_folder_is_indexed_elsewhere_as_the_message_says(tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    put(root / "train" / "a.tar", tar_of(samples(4)))
    put(root / "val" / "a.tar", tar_of(samples(2)))
    lock(root, monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(["index", str(root), "--workers", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and f"error: {root}/" in said and "index elsewhere: --out DIR" in said
    main(["index", str(root), "--out", str(tmp_path / "index"), "--workers", "1"])
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == ["a.tar", "a.tar"]
    assert len(keys(tmp_path / "index")) == 4 and len(keys(tmp_path / "index", "val")) == 2
    assert verify(tmp_path / "index", decode=True) == []


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        *((errno.ENOSPC, "Make room there"), (errno.EIO, "Look at the disk"), (errno.EROFS, "Name another place")),
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
    (tmp_path / "index").mkdir()
    there = index_webdataset(Path("set"), out=Path("index"))
    here = index_webdataset(Path("set"))
    assert there["splits"] == here["splits"]
    assert os.readlink("index/train/a.tar") == str(tmp_path / "set" / "train" / "a.tar")


def interrupted(monkeypatch, *arguments, **options) -> None:
    """Index, but for the last step: the complete index stays in its hidden folder."""
    with monkeypatch.context() as here, pytest.raises(KeyboardInterrupt):
        here.setattr("tools.lib.shards.reindex._move_up", lambda partial, home: signal.raise_signal(signal.SIGINT))
        index_webdataset(*arguments, **options)


def test_an_interrupted_index_is_resumed(tmp_path, monkeypatch):
    put(tmp_path / "train" / "a.tar", tar_of(samples(4)))
    interrupted(monkeypatch, tmp_path)
    monkeypatch.setattr("tools.lib.shards.reindex._read_shard", None)
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 4 and verify(tmp_path) == []
    assert not (tmp_path / ".index.partial" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("out", [None, "index"])
def test_an_interrupted_index_of_tars_that_have_changed_is_made_again(tmp_path, monkeypatch, name, out):
    home = tmp_path / (out or "set")
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(4)))
    interrupted(monkeypatch, tmp_path / "set", out=out and home)
    put(tmp_path / "set" / "train" / f"{name}.tar", tar_of(samples(40, start=4)))
    index_webdataset(tmp_path / "set", out=out and home)
    assert len(keys(home)) == (40 if name == "a" else 44) and verify(home) == []


def test_an_interrupted_index_with_other_options_is_made_again(tmp_path, monkeypatch):
    put(tmp_path / "train" / "a.tar", tar_of(samples(4) | {"x.jpg": b"none", "x.cls": b"0"}))
    interrupted(monkeypatch, tmp_path, skip_bad=True)
    assert "samples cannot be used: train/a.tar: x" in refused(index_webdataset, tmp_path)
    interrupted(monkeypatch, tmp_path, skip_bad=True)
    assert index_webdataset(tmp_path, skip_bad=True, audit=False)["options"] == {"audit": False}


def test_files_that_move_to_another_file_system_are_on_the_disk(tmp_path, monkeypatch):
    put(tmp_path / "train" / "a.tar", tar_of(samples(4)))
    rename, fsync, synced = os.rename, os.fsync, set()

    def rename_within(source, target, **options):
        if ".index.partial" in str(source) and ".index.partial" not in str(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        return rename(source, target, **options)

    def record(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", rename_within)
    monkeypatch.setattr(os, "fsync", record)
    index_webdataset(tmp_path)
    made = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".tar"]
    assert sorted(path.name for path in made) == ["a.idx", "audit.jsonl", "index.npy", "manifest.json"]
    assert {path.stat().st_ino for path in made} <= synced and verify(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "message"),
    [("set", "in .* itself"), ("set/index", "in .* itself"), ("photos", "else"), ("other", "else")],
)
def test_a_folder_for_the_index_is_never_mixed_with_anything(tmp_path, out, message):
    put(tmp_path / "set" / "train" / "a.tar", tar_of(samples(4)))
    put(tmp_path / "photos" / "mine.jpg", b"x")
    put(tmp_path / "other" / "train" / "a.tar", tar_of(samples(4)))
    assert re.search(message, refused(index_webdataset, tmp_path / "set", out=tmp_path / out))
    assert not list((tmp_path / "set").rglob("*.npy"))


def older(idx: bytes) -> bytes:
    """The same in the version before, which has no names."""
    first, *lines = idx.decode().splitlines()
    parts = [re.sub(r"(\S+ \d+ \d+) \S+", r"\1", line) for line in lines]
    return "\n".join([first.replace("v1.2", "v1.1"), *parts]).encode() + b"\n"


def listed_twice(idx: bytes) -> bytes:
    first, *lines = idx.decode().splitlines()
    return "\n".join([f"v1.2 {len(lines) + 1}", *lines, lines[0]]).encode() + b"\n"


@pytest.mark.parametrize("written", [lambda idx: idx, older, bytes.rstrip])
def test_an_idx_file_that_describes_the_tar_is_kept_whatever_its_version(tmp_path, written):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    index_webdataset(tmp_path)
    idx = written((tmp_path / "train" / "a.idx").read_bytes())
    put(tmp_path / "train" / "a.idx", idx)
    (tmp_path / "manifest.json").unlink()
    index_webdataset(tmp_path)
    assert (tmp_path / "train" / "a.idx").read_bytes() == idx
    assert verify(tmp_path) == []


def test_a_damaged_older_idx_file_is_a_fault(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    index_webdataset(tmp_path)
    idx = older((tmp_path / "train" / "a.idx").read_bytes())
    put(tmp_path / "train" / "a.idx", idx)
    (tmp_path / "manifest.json").unlink()
    index_webdataset(tmp_path)
    put(tmp_path / "train" / "a.idx", idx.replace(b" 512 ", b" 1024 ", 1))
    (fault,) = verify(tmp_path)
    assert fault.startswith("train/a.idx: ") and "not those of the manifest" in fault


@pytest.mark.parametrize("upper_case", [False, True])
def test_what_dalis_own_tool_writes_is_kept_for_names_with_folders(tmp_path, upper_case):
    wds2idx = pytest.importorskip("wds2idx")
    members = samples(3, "./x/é{:04d}")
    if upper_case:
        members = {name.replace(".jpg", ".JPEG"): content for name, content in members.items()}
    put(tmp_path / "train" / "a.tar", tar_of(members | {"._0.jpg": b"x"}))
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
    dali = pytest.importorskip("nvidia.dali")
    path = put(tmp_path / "train" / "a.tar", tar_of(samples(3, "my photo {:d}")))
    index_webdataset(tmp_path)

    @dali.pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def pipeline():
        idx = [str(path.with_suffix(".idx"))]
        return tuple(dali.fn.readers.webdataset(paths=[str(path)], index_paths=idx, ext=["jpg", "cls"]))

    built = pipeline()
    built.build()
    images, labels = built.run()
    read = [(bytes(np.array(images.at(i))), bytes(np.array(labels.at(i)))) for i in range(3)]
    assert read == [(jpeg(i), str(i).encode()) for i in range(3)]
    assert verify(tmp_path) == []
