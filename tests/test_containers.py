"""Tars and parquet files of other people: everything visible is used or named, and what a message advises works."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conftest import REPOSITORY
from PIL import Image

from pipelines.errors import UserError
from pipelines.index import class_order_doubt, read_index
from pipelines.reader import ShardReader
from tools.image_files import items_of, survey
from tools.sharding import parquet as parquet_source
from tools.sharding.entries import SourceOptions
from tools.sharding.ilsvrc import _Part
from tools.sharding.job import BuildOptions, build
from tools.sharding.reindex import index_webdataset
from tools.sharding.tars import tar_files, tar_members
from tools.sharding.verify import verify

NONE_TAR = bytes(10240)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Jobs run here: tests/test_shard_imagenet.py and test_shard_faults.py have worker processes."""

    def run_jobs(function, jobs, workers, *, start=None, on_wait=lambda: None):
        if start is not None:
            start(0)
        for number, job in enumerate(jobs):
            yield number, function(*job)

    for module in ("reindex", "verify", "job"):
        monkeypatch.setattr(f"tools.sharding.{module}.run_jobs", run_jobs)


def jpeg(number: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def samples(count: int, name: str = "{:04d}", start: int = 0) -> dict[str, bytes]:
    """Members of a shard: images and class numbers 0, 1, 2 in turn."""
    return {
        f"{name.format(i)}.{part}": content
        for i in range(start, start + count)
        for part, content in (("jpg", jpeg(i)), ("cls", str(i % 3).encode()))
    }


def tar_of(members: dict[str, bytes | tarfile.TarInfo], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listed(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return [member.name for member in tar_files(path, file)]


def refused(function, *arguments, **options) -> str:
    """The message of a UserError, which is short and one line."""
    with pytest.raises(UserError) as found:
        function(*arguments, **options)
    message = " ".join(str(found.value).split())
    assert len(re.sub(r"/tmp/\S*/", "", message)) <= 320, message
    return message


def images_of(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    index = read_index(root, split)
    rows = zip(index.samples, ShardReader(index).read(np.arange(len(index))), strict=True)
    return {row["key"].decode(): (content.tobytes(), int(row["label"])) for row, content in rows}


def keys(root: Path, split: str = "train") -> list[str]:
    return sorted(images_of(root, split))


def run(command: str, folder: Path) -> None:
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)


# --- a tar is read to the end of the file ---


def test_a_zeroed_header_anywhere_in_a_tar_is_found(tmp_path):
    whole = tar_of(samples(4) | {"empty.txt": b""})
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    assert len(listed(put(tmp_path / "a.tar", whole))) == 9
    for header in headers[:-1]:
        spoiled = put(tmp_path / "a.tar", whole[:header] + bytes(512) + whole[header + 512 :])
        assert f"zeros at byte {header} where a header" in refused(listed, spoiled)


@pytest.mark.parametrize("junk", [b"x", b"<html>", b"\0" * 700 + b"x", b"\xff" * 5000, bytes(30000) + b"end"])
def test_bytes_behind_the_end_of_a_tar_are_found(tmp_path, junk):
    whole = tar_of(samples(3))
    message = refused(listed, put(tmp_path / "a.tar", whole + junk))
    assert message.startswith(str(tmp_path / "a.tar")) and "more content from byte" in message


def test_a_tar_whose_rest_is_zeros_is_found_and_the_advice_works_where_nothing_is_missing(tmp_path):
    members = samples(60)
    whole = tar_of(members)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = tar.getmembers()[6].offset
    zeroed = put(tmp_path / "zeroed" / "a.tar", whole[:third].ljust(len(whole), b"\0"))
    assert f"zeros from byte {third}" in refused(listed, zeroed)
    shutil.rmtree(zeroed.parent)
    path = put(tmp_path / "train" / "a.tar", whole + NONE_TAR)
    message = refused(index_webdataset, tmp_path)
    run(re.search(r"truncate -s \d+ a.tar", message)[0], path.parent)
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 60


def test_a_tar_without_its_end_is_named_and_the_advice_works_where_nothing_is_missing(tmp_path):
    whole = tar_of(samples(3))
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    path = put(tmp_path / "train" / "a.tar", whole[:end])
    message = refused(index_webdataset, tmp_path)
    run(re.search(r"head -c 1024 /dev/zero >> a.tar", message)[0], path.parent)
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 3


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("names", [("{:04d}", "{:04d}"), ("a/{:04d}", "b/{:04d}"), ("./{:04d}", "x{:04d}")])
def test_joined_tars_are_named_and_taken_apart_by_the_advice_without_a_loss(tmp_path, padded, names):
    parts = [tar_of(samples(4, name, 10 * number)) for number, name in enumerate(names)]
    if not padded:  # as Go, Rust and 7-Zip write them: two blocks of zeros
        ends = [len(part.rstrip(b"\0")) for part in parts]
        parts = [part[: end + -end % 512 + 1024] for part, end in zip(parts, ends, strict=True)]
    path = put(tmp_path / "train" / "my shard.tar", b"".join(parts))
    message = refused(index_webdataset, tmp_path)
    assert "my shard.tar: another archive begins at byte" in message
    run(re.search(r"(head .*); and move", message)[1], path.parent)
    path.rename(tmp_path.parent / f"{tmp_path.name}.joined")
    index_webdataset(tmp_path)
    assert len(read_index(tmp_path, "train")) == 8


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sound_tars_of_any_format_and_ending_are_taken(tmp_path, form):
    long = "folder/" * 20
    whole = tar_of(samples(2) | samples(1, "é{:04d}") | samples(1, long[:150] + "{:04d}"), format=form)
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    for size in (end + 512, end + 1024, end + 1536, len(whole)):
        assert len(listed(put(tmp_path / "a.tar", whole[:size]))) == 8


@pytest.mark.parametrize("options", ["--format=v7", "--format=pax", "--label=mine", "--sort=name", "."])
def test_what_gnu_tar_writes_is_taken(tmp_path, options):
    for name, content in samples(3).items():
        put(tmp_path / "in" / name, content)
    files = "." if options == "." else f"{options} *"
    run(f"tar -cf ../a.tar {files}", tmp_path / "in")
    assert len(tar_members(tmp_path / "a.tar").samples) == 3


@pytest.mark.parametrize("blocks", [1, 2, 20, 64, 128, 256, 512, 1024, 2048])
def test_tars_of_any_usual_record_size_are_taken_and_joined_ones_are_found(tmp_path, blocks):
    for name, content in samples(4).items():
        put(tmp_path / "in" / name, content)
    (tmp_path / "train").mkdir()
    run(f"tar -b {blocks} -cf ../train/a.tar 000[01]*; tar -b {blocks} -cf ../train/b.tar 000[23]*", tmp_path / "in")
    shutil.rmtree(tmp_path / "in")
    whole, other = ((tmp_path / "train" / name).read_bytes() for name in ("a.tar", "b.tar"))
    assert len(whole) % (512 * blocks) == 0
    index_webdataset(tmp_path)
    assert keys(tmp_path) == ["0000", "0001", "0002", "0003"]
    joined = put(tmp_path / "joined.tar", whole + other)
    assert f"another archive begins at byte {len(whole)}," in refused(listed, joined)


@pytest.mark.parametrize("size", [20480, 30720, 71680, 1034240, 2**20 + 10240, 3 * 2**20, 2**22])
def test_zeros_that_fill_no_record_are_found_in_files_of_any_size(tmp_path, size):
    whole = tar_of(samples(3))
    assert len(whole) == 10240
    assert "more than a tar is filled up with" in refused(listed, put(tmp_path / "a.tar", whole.ljust(size, b"\0")))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "Download it again"),
        (b"", "an empty file"),
        (b"PK\3\4" + bytes(600), "not an uncompressed tar"),
    ],
)
def test_a_file_in_place_of_a_tar_is_named_with_what_it_is(tmp_path, head, message):
    assert message in refused(listed, put(tmp_path / "a.tar", head))


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz"])
def test_a_compressed_tar_of_any_name_is_named_and_the_advice_works(tmp_path, tool):
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    path = put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    run(f"{tool} a.tar", path.parent)
    (packed,) = path.parent.iterdir()
    assert f"unpack it with {'un' if tool == 'xz' else ''}" in refused(index_webdataset, tmp_path)
    packed.rename(path)
    message = refused(index_webdataset, tmp_path)
    run(re.search(r"Run (mv .*)", message)[1], path.parent)
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 2


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.LNKTYPE, "a link"),
        (tarfile.SYMTYPE, "a link"),
        (tarfile.FIFOTYPE, "no file"),
        (tarfile.CHRTYPE, "no file"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Z", "no file"),
    ],
)
def test_members_without_content_of_their_own_are_named(tmp_path, kind, reason):
    members = samples(2) | {"9999.jpg": special("9999.jpg", kind, "0000.jpg"), "9999.cls": b"1"}
    path = put(tmp_path / "train" / "a.tar", tar_of(members, format=tarfile.GNU_FORMAT))
    assert "9999.jpg" in (message := refused(listed, path)) and reason in message
    message = refused(index_webdataset, tmp_path)
    assert "1 sample cannot be used: train/a.tar: 9999: " in message and reason in message
    assert index_webdataset(tmp_path, skip_bad=True)["audit"]["counts"]["rejected"] == 1
    assert keys(tmp_path) == ["0000", "0001"]
    *rows, last = items_of(path)
    assert len(rows) == 2 and reason in last.error


def test_a_tar_packed_as_the_message_about_links_says_is_taken(tmp_path):
    for name, content in samples(1).items():
        put(tmp_path / "in" / name, content)
    os.link(tmp_path / "in" / "0000.jpg", tmp_path / "in" / "0001.jpg")
    (tmp_path / "in" / "0001.cls").symlink_to("0000.cls")
    (tmp_path / "train").mkdir()
    run("tar -cf ../train/a.tar *", tmp_path / "in")
    shutil.move(tmp_path / "in", tmp_path.parent / f"{tmp_path.name}.in")
    options = re.search(r"tar (-h --hard-dereference -cf)", refused(index_webdataset, tmp_path))[1]
    run(f"tar {options} {tmp_path}/train/a.tar *", tmp_path.parent / f"{tmp_path.name}.in")
    index_webdataset(tmp_path)
    assert keys(tmp_path) == ["0000", "0001"]


def forged(name: str, size: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = {"size": size}
    return info


@pytest.mark.parametrize("size", ["-512", "-1024", "-99999", str(2**40), str(2**63), str(10**30)])
def test_forged_sizes_end_with_one_line_and_never_read_for_ever(tmp_path, size):
    members = samples(3) | {"forged.jpg": forged("forged.jpg", size)} | samples(2, "z{:04d}")
    path = put(tmp_path / "a.tar", tar_of(members))
    assert "a.tar" in refused(listed, path)
    rows = list(items_of(path))
    assert [row.error for row in rows[:3]] == ["", "", ""] and rows[-1].error


@pytest.mark.parametrize("field", [b"\xff" * 12, b"\xff" * 10 + b"\xfc\0", b"\x80" + b"\x7f" * 11, b"77777777777\0"])
def test_forged_sizes_in_headers_end_with_one_line(tmp_path, field):
    whole = bytearray(tar_of(samples(3)))
    whole[124:136] = field
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    assert "a.tar" in refused(listed, put(tmp_path / "a.tar", bytes(whole)))


def test_a_tar_inside_a_tar_is_read_to_its_end_too(tmp_path):
    inner = tar_of(samples(4))
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        header = tar.getmembers()[3].offset
    zeroed = inner[:header] + bytes(512) + inner[header + 512 :]
    for content, message in ((zeroed, "zeros at byte"), (inner + inner, "more content"), (inner[:3000], "damaged")):
        path = put(tmp_path / "outer.tar", tar_of({"n01.tar": content, "n02.tar": inner}))
        with open(path, "rb") as file:
            member = next(tar_files(path, file))
            part = _Part(file, member.offset_data, member.size)
            assert message in refused(list, tar_files(path / member.name, part))


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


def command(*arguments, as_other: bool) -> subprocess.CompletedProcess:
    """The tool as a user runs it whom the permissions of files bind."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "shard_imagenet.py"), *map(str, arguments)]
    if as_other and os.geteuid() == 0:
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        tool = [*drop, *tool]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(tool, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
def test_a_read_only_folder_is_indexed_elsewhere_as_the_message_says(tmp_path):
    root, locked = tmp_path / "set", "set/train"
    put(root / "train" / "a.tar", tar_of(samples(4)))
    put(root / "val" / "a.tar", tar_of(samples(2)))
    (tmp_path / locked).chmod(0o555)
    try:
        ended = command("index", root, "--workers", 1, as_other=True)
        assert ended.returncode == 1 and f"error: {tmp_path / locked}: cannot be written to" in ended.stderr
        advice = re.search(r"(index \S+ --out) DIR", ended.stderr)[1]
        ended = command(*advice.split(), tmp_path / "index", "--workers", 1, as_other=True)
        assert ended.returncode == 0, ended.stderr
    finally:
        (tmp_path / locked).chmod(0o755)
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == ["a.tar", "a.tar"]
    assert len(keys(tmp_path / "index")) == 4 and len(keys(tmp_path / "index", "val")) == 2
    assert verify(tmp_path / "index", decode=True) == []


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
            "two images, png, jpg: pack the tar again",
        ),
        ({"1.jpg": jpeg(), "1.json": b'{"label": 3}'}, "has jpg, json; expected jpg and, with the class number"),
        ({"1.jpg": jpeg(), "1.txt": b"3"}, "has jpg, txt; expected"),
        ({"1.jpg": jpeg(), "1.cls": b"dog"}, "its cls is 'dog', not a class number: number the classes"),
        ({"1.jpg": jpeg(), "1.cls": b"3.0"}, "'3.0', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"1_0"}, "'1_0', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b""}, "'', not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"9" * 5000}, "not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"\xff\xfe3\0"}, "not a class number"),
        ({"1.jpg": jpeg(), "1.cls": b"-1"}, "its cls is -1, which is negative"),
        ({"1.png": jpeg(0, "PNG"), "1.cls": b"0"}, "PNG image, mode RGB: unpack the tars into train/CLASS/"),
        ({"1.webp": jpeg(0, "WEBP"), "1.cls": b"0"}, "WEBP image"),
        ({"README": b"text"}, "has no extension; expected jpg"),
        ({"README.txt": b"text"}, "has txt; expected jpg"),
        ({"a.b.jpg": jpeg(), "a.b.cls": b"0"}, "first dot"),
        (
            {"a.jpg": jpeg(), "a.cls": b"0", "a.1.jpg": jpeg(), "a.1.cls": b"0"},
            "it has .1.cls: names end at their first",
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
    assert "and 28 more for other reasons. Or leave out" in message
    assert len(message) < 500


def test_names_that_are_not_utf_8_are_named_and_can_be_left_out(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2) | {"caf\udce9.jpg": jpeg(), "caf\udce9.cls": b"1"}))
    assert r"caf\xe9: its name is not UTF-8" in refused(index_webdataset, tmp_path)
    index_webdataset(tmp_path, skip_bad=True)
    assert keys(tmp_path) == ["0000", "0001"] and verify(tmp_path) == []


def test_names_packed_again_as_the_message_about_dots_says_are_taken(tmp_path):
    dotted = samples(3, "img.{:03d}.v2")
    put(tmp_path / "train" / "a.tar", tar_of(dotted))
    assert "with '_' for those dots" in refused(index_webdataset, tmp_path)
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


# --- parquet ---


def table(images, labels, names: list[str] | None = None, columns=("image", "label")) -> pa.Table:
    made = pa.table([images, labels], names=columns)
    features = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(features)}) if names else made


def put_rows(path: Path, count: int = 4, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table([jpeg(i) for i in range(count)], [i % 3 for i in range(count)], **options), path)
    return path


def structs(paths: bool = True) -> pa.Array:
    return pa.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} if paths else {"bytes": jpeg(i)} for i in range(4)])


CONTENTS = [jpeg(i) for i in range(4)]


@pytest.mark.parametrize(
    "images",
    [
        structs(),
        structs(paths=False),
        pa.array(CONTENTS, pa.binary()),
        pa.array(CONTENTS, pa.large_binary()),
        pa.array(CONTENTS, pa.binary_view()),
        pa.array(CONTENTS, pa.binary()).dictionary_encode(),
    ],
    ids=lambda array: str(array.type)[:30],
)
def test_images_are_taken_from_bytes_of_every_type(tmp_path, images):
    (tmp_path / "src").mkdir()
    parquet.write_table(table(images, [0, 1, 2, 0]), tmp_path / "src" / "train-0.parquet", row_group_size=3)
    build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert sorted(images_of(tmp_path / "out").values()) == sorted(zip(CONTENTS, [0, 1, 2, 0], strict=True))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_of_text_are_sorted_into_classes_and_their_order_is_stated_or_doubted(tmp_path, kind):
    words = ["10", "9", "cat", "9"]
    (tmp_path / "src").mkdir()
    parquet.write_table(table(CONTENTS, pa.array(words, kind)), tmp_path / "src" / "train-0.parquet")
    for order, classes in (("", ["10", "9", "cat"]), ("text", ["10", "9", "cat"]), ("numeric", ["9", "10", "cat"])):
        options = SourceOptions(class_order=order)
        manifest = build(tmp_path / "src", tmp_path / f"out{order}", BuildOptions(), source_options=options)
        assert (manifest["classes"], manifest["class_order"]) == (classes, order or "unstated")
        assert bool(class_order_doubt(manifest)) == (order == "")
        labels = [classes.index(word) for word in words]
        assert sorted(images_of(tmp_path / f"out{order}").values()) == sorted(zip(CONTENTS, labels, strict=True))


@pytest.mark.parametrize("names", [None, ["b", "a", "c"], ["crane", "dog", "crane"]])
def test_numbers_and_class_label_names_keep_their_order_and_equal_names_stay_two_classes(tmp_path, names):
    put_rows(tmp_path / "src" / "train-0.parquet", names=names)
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert (manifest["classes"], manifest["class_order"]) == (names or ["0", "1", "2"], "given")
    assert sorted(label for _, label in images_of(tmp_path / "out").values()) == [0, 0, 1, 2]
    with pytest.raises(UserError, match="numbers its classes itself"):
        build(tmp_path / "src", tmp_path / "b", BuildOptions(), source_options=SourceOptions(class_order="numeric"))


@pytest.mark.parametrize(
    ("columns", "guessed"),
    [
        (("img", "fine_label"), "--image-column img --label-column fine_label"),
        (("jpg", "cls"), "--image-column jpg --label-column cls"),
        (("image", "target"), "--label-column target"),
        (("image_bytes", "label"), "--image-column image_bytes"),
    ],
)
def test_columns_of_other_names_are_guessed_and_taken_by_the_options_of_the_message(tmp_path, columns, guessed):
    put_rows(tmp_path / "src" / "train-0.parquet", columns=columns)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"among its columns, {', '.join(columns)}." in message and message.endswith(guessed)
    chosen = {f"{kind}_column": name for kind, name in re.findall(r"--(\w+)-column (\S+)", message)}
    options = SourceOptions(**chosen)
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), source_options=options)
    assert len(images_of(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/valid-0.parquet", "data/test-0.parquet"),
        ("train/0000.parquet", "val/0000.parquet", "test/0000.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet", "default/test/0000.parquet"),
        ("cifar10/train-0.parquet", "cifar10/val-0.parquet", "cifar10/test-0.parquet"),
        ("data/train/part-0.parquet", "data/valid/part-0.parquet", "data/test/part-0.parquet"),
    ],
)
def test_splits_are_found_by_names_of_files_and_folders_and_a_test_split_is_listed(tmp_path, names):
    for number, name in enumerate(names):
        put_rows(tmp_path / "src" / name, count=6 - number)
    for name in ("README.md", "dataset_infos.json", "LICENSE.txt", "imagenet.py", ".gitattributes"):
        put(tmp_path / "src" / name, b"text")
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions())
    assert {split: entry["samples"] for split, entry in manifest["splits"].items()} == {"train": 6, "val": 5}
    left_out = {item["source"] for item in manifest["audit"]["left_out"]}
    assert left_out == {"README.md", "dataset_infos.json", "LICENSE.txt", "imagenet.py", names[2]}
    assert manifest["audit"]["hidden"] == [".gitattributes"]


@pytest.mark.parametrize(
    ("name", "helps"),
    [
        ("more-0.parquet", "rename it to train-"),
        ("training_data.arrow", "not a parquet file"),
        ("partial-train/0000.parquet", "rename it to train-"),
        ("extra.csv", "not a parquet file"),
        ("data.parquet.tmp", "not a parquet file"),
    ],
)
def test_everything_visible_beside_parquet_files_is_named_or_left_out_by_decision(tmp_path, name, helps):
    put_rows(tmp_path / "src" / "train-0.parquet")
    put_rows(tmp_path / "src" / name)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"{name}: " in message and helps in message
    manifest = build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)
    assert [item["source"] for item in manifest["audit"]["left_out"]] == [name]


def test_two_datasets_below_one_folder_are_never_mixed(tmp_path):
    put_rows(tmp_path / "src" / "32px" / "train" / "0.parquet")
    put_rows(tmp_path / "src" / "64px" / "train" / "0.parquet")
    assert "several datasets, in 32px, 64px. Give the folder" in refused(
        build, tmp_path / "src", tmp_path / "out", BuildOptions()
    )
    build(tmp_path / "src" / "32px", tmp_path / "out", BuildOptions())
    assert len(images_of(tmp_path / "out")) == 4


def test_links_in_a_circle_are_named(tmp_path):
    put_rows(tmp_path / "src" / "data" / "train-0.parquet")
    (tmp_path / "src" / "data" / "up").symlink_to(tmp_path / "src")
    assert "data/up: a link to a folder above it" in refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)


@pytest.mark.parametrize("links", [{"a/l": "b", "b/l": "a"}, {"a/l": "b", "b/l": "c", "c/l": "a"}, {"a/l": "a"}])
def test_links_that_lead_to_each_other_are_followed_once_and_removed_by_the_advice(tmp_path, links):
    put_rows(tmp_path / "src" / "data" / "train-0.parquet")
    for link, target in links.items():
        (tmp_path / "src" / "data" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "src" / "data" / target).mkdir(exist_ok=True)
        (tmp_path / "src" / "data" / link).symlink_to(tmp_path / "src" / "data" / target)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"{len(links)} entr" in message and "a link to a folder above it: remove the link" in message
    while "remove the link" in message:
        (tmp_path / "src" / re.search(r"left out\. ([^ ,:]+)", message)[1]).unlink()
        try:
            message = str(build(tmp_path / "src", tmp_path / "out", BuildOptions())["splits"]["train"]["samples"])
        except UserError as error:
            message = str(error)
    assert message == "4"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite(images=None, labels=(0, 1, 2, 0), **options):
    """Spoils a file by other columns."""
    made = table(CONTENTS if images is None else images, pa.array(labels, options.pop("kind", None)), **options)
    return lambda path: parquet.write_table(made, path)


def spoil_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the first page's header
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: cut(path, 900), "damaged, cut off or no parquet file"),
        (lambda path: cut(path, 0), "damaged, cut off"),
        (spoil_page, "damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda path: path.write_bytes(b"<!doctype html><p>404"), "a web page"),
        (rewrite([], []), "expected encoded images"),
        (rewrite(pa.array([], pa.binary()), (), kind=pa.int64()), "has no rows"),
        (rewrite(labels=(0, 1, None, 0)), "row 2 has no label"),
        (rewrite(labels=(0, 1, 2, -1)), "row 3 has label -1"),
        (rewrite(labels=(0.0, 1.0, 2.0, 0.5)), "row 0 has label 0.0 (double)"),
        (rewrite(labels=(True, False, True, True)), "row 0 has label True (bool)"),
        (rewrite(labels=([0], [1], [2], [0])), "row 0 has label [0]"),
        (rewrite(labels=(0, 2**62, 2, 0)), "row 1 has label 4611686018427387904, too large"),
        (rewrite(labels=(0, 1, 2**64 - 1, 0), kind=pa.uint64()), "row 2 has label 18446744073709551615, too large"),
        (rewrite(labels=("a", "b", "c", "a")), "the kind or list of its classes is not that of"),
        (rewrite(names=["a", "b", "c"]), "the kind or list of its classes is not that of"),
        (rewrite(columns=("image", "class")), "--label-column class"),
        (rewrite(["a", "b", "c", "d"]), "column image is string"),
        (rewrite([[1], [2], [3], [4]]), "column image is list"),
        (rewrite(pa.array([{"path": "a.jpg"}] * 4)), "column image is struct"),
        (rewrite(pa.array([{"bytes": {"bytes": CONTENTS[0]}}] * 4)), "column image is struct"),
        (rewrite(pa.array([{"bytes": [CONTENTS[0]]}] * 4)), "column image is struct"),
        (rewrite(pa.array([{"bytes": "text"}] * 4)), "column image is struct"),
        (
            rewrite(pa.array([{"bytes": None, "path": "img/a.jpg"}] * 4, structs().type)),
            "row 0 names the file img/a.jpg",
        ),
    ],
)
def test_a_parquet_file_that_cannot_be_used_is_one_line_with_the_file_and_the_row(tmp_path, spoil, reason):
    put_rows(tmp_path / "src" / "train-0.parquet")
    spoil(put_rows(tmp_path / "src" / "train-1.parquet"))
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert message.startswith(f"{tmp_path}/src/train-1.parquet") and reason in message


@pytest.mark.parametrize("labels", [[0, 3], ["a", "z"]])
def test_a_label_of_val_that_train_lacks_is_named_with_its_row(tmp_path, labels):
    known = [0, 1, 2, 0] if labels[0] == 0 else ["a", "b", "c", "a"]
    (tmp_path / "src").mkdir()
    parquet.write_table(table(CONTENTS, known), tmp_path / "src" / "train-0.parquet")
    parquet.write_table(table(CONTENTS[:2], labels), tmp_path / "src" / "val-0.parquet")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"val-0.parquet: row 1 has label {labels[1]}, which is none of the 3 classes" in message


def test_an_empty_image_is_rejected_by_name_and_can_be_left_out(tmp_path):
    (tmp_path / "src").mkdir()
    images = pa.array([jpeg(0), None, b"", jpeg(3)])
    parquet.write_table(table(images, [0, 1, 1, 1]), tmp_path / "src" / "train-0.parquet")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert "train-0.parquet: row 1 (empty file)" in message and "row 2 (empty file)" in message
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)
    assert len(images_of(tmp_path / "out")) == 2


def test_labels_are_read_once_and_not_again_by_each_worker(tmp_path, monkeypatch):
    put_rows(tmp_path / "src" / "train-0.parquet")
    calls = []
    read = parquet_source._read_labels
    monkeypatch.setattr(parquet_source, "_read_labels", lambda *arguments: calls.append(arguments) or read(*arguments))
    build(tmp_path / "src", tmp_path / "out", BuildOptions(samples_per_shard=2))  # opens it here and in the worker
    assert len(calls) == 1


def test_an_unfinished_conversion_is_not_resumed_with_other_columns(tmp_path):
    (tmp_path / "src").mkdir()
    made = table(CONTENTS[:3] + [b"broken"], [0, 1, 2, 0]).append_column("coarse", pa.array([2, 1, 0, 2]))
    parquet.write_table(made, tmp_path / "src" / "train-0.parquet")
    assert "cannot be used" in refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    other = SourceOptions(label_column="coarse")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions(), source_options=other)
    assert "unfinished conversion of the columns image and label" in message
    build(tmp_path / "src", tmp_path / "out", BuildOptions(), skip_bad=True)
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions(), source_options=other)
    assert "made differently: columns was None, now it is ['image', 'coarse']" in message


# --- paths for predict ---


def test_folders_for_predict_are_used_or_named(tmp_path):
    for name in ("a.jpg", "b/c.PNG", "b/.d.jpg", "__MACOSX/e.jpg", "b/@eaDir/f.jpg", "Thumbs.db"):
        put(tmp_path / name, jpeg())
    for name in ("README", "b/labels.txt", "b/shard.tar.gz"):
        put(tmp_path / name, b"text")
    (tmp_path / "gone").symlink_to("/not/there")
    (tmp_path / "gone.tar").symlink_to("/not/there.tar")
    os.mkfifo(tmp_path / "pipe")
    found = survey([tmp_path])
    assert [str(Path(name).relative_to(tmp_path)) for name in found.no_images] == [
        "README",
        "b/labels.txt",
        "b/shard.tar.gz",
    ]
    names = [str(Path(item.name).relative_to(tmp_path)) for item in items_of(tmp_path)]
    assert names == ["a.jpg", "b/c.PNG", "gone", "gone.tar", "pipe"]


@pytest.mark.parametrize(
    "links", [{"up": "."}, {"a/l": "b", "b/l": "a"}, {"loop.jpg": "loop.jpg"}, {"x": "y", "y": "x"}]
)
def test_links_in_a_circle_get_a_row_for_predict(tmp_path, links):
    for name in ("a/1.jpg", "b/2.jpg"):
        put(tmp_path / name, jpeg())
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    items = list(items_of(tmp_path))
    assert {str(tmp_path / "a/1.jpg"), str(tmp_path / "b/2.jpg")} <= {item.name for item in items if not item.error}
    errors = [item.error for item in items if item.error]
    assert len(errors) == len(links) and all("link" in error for error in errors)
    assert survey([tmp_path]).num_images == len(items)
