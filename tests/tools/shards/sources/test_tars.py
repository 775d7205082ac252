"""Tars of other people are read to the end of the file, and what a message about one advises works."""

import gzip
import io
import lzma
import os
import re
import shutil
import tarfile

import pytest

from support.hand_made import keys, listed, put, refused, run, samples, tar_of
from tools.lib.predict.image_files import items_of
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources.tars import tar_files
from tools.lib.shards.sources.webdataset import tar_members

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


def test_a_zeroed_header_anywhere_in_a_tar_is_found(tmp_path):
    whole = tar_of(samples(4) | {"empty.txt": b""})
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    assert len(listed(put(tmp_path / "a.tar", whole))) == 9
    for header in headers[:-1]:
        spoiled = put(tmp_path / "a.tar", whole[:header] + bytes(512) + whole[header + 512 :])
        assert f"zeros at byte {header}, and " in refused(listed, spoiled)


@pytest.mark.parametrize("junk", [b"x", b"<html>", b"\0" * 700 + b"x", b"\xff" * 5000, bytes(30000) + b"end"])
def test_bytes_behind_the_end_of_a_tar_are_found(tmp_path, junk):
    whole = tar_of(samples(3))
    message = refused(listed, put(tmp_path / "a.tar", whole + junk))
    assert message.startswith(str(tmp_path / "a.tar")) and "several tars joined: zeros at byte" in message


def end_of(tar: bytes) -> int:
    """Where the last member of a tar ends."""
    return len(tar.rstrip(b"\0")) + -len(tar.rstrip(b"\0")) % 512


def test_a_tar_whose_rest_is_lost_or_zeros_is_named(tmp_path):
    whole = tar_of(samples(3))
    end = end_of(whole)
    assert f"cut off at byte {end}" in refused(listed, put(tmp_path / "a.tar", whole[:end]))
    for hole in (2 << 20, 1 << 40):  # Terabytes of holes are not read.
        path = put(tmp_path / "a.tar", whole)
        os.truncate(path, end + hole)
        assert f"zeros at byte {end}, and {hole:,} bytes from there to its end" in refused(listed, path)
        assert [bool(item.error) for item in items_of(path)] == [False, False, False, True]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sound_tars_of_any_format_and_ending_are_taken(tmp_path, form):
    long = "folder/" * 20
    whole = tar_of(samples(2) | samples(1, "é{:04d}") | samples(1, long[:150] + "{:04d}"), format=form)
    end = end_of(whole)
    for size in (end + 512, end + 1024, end + 1536, len(whole)):
        assert len(listed(put(tmp_path / "a.tar", whole[:size]))) == 8


@pytest.mark.parametrize("options", ["--format=v7", "--format=pax", "--label=mine", "--sort=name", "."])
def test_what_gnu_tar_writes_is_taken(tmp_path, options):
    for name, content in samples(3).items():
        put(tmp_path / "in" / name, content)
    files = "." if options == "." else f"{options} *"
    run(f"tar -cf ../a.tar {files}", tmp_path / "in")
    assert len(tar_members(tmp_path / "a.tar")[0]) == 3


@pytest.mark.parametrize("blocks", [1, 20, 2048])
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
    assert f"several tars joined: zeros at byte {end_of(whole)}, and " in refused(listed, joined)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "Download it again"),
        (b"", "an empty file"),
        (b"PK\3\4" + bytes(600), "not an uncompressed tar"),
        (gzip.compress(b"content", mtime=0), "compressed, so nothing in it can be read alone. Unpack it"),
        (lzma.compress(b"content"), "compressed, so nothing in it can be read alone. Unpack it"),
    ],
)
def test_a_file_in_place_of_a_tar_is_named_with_what_it_is(tmp_path, head, message):
    assert message in refused(listed, put(tmp_path / "a.tar", head))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
)
def test_members_without_content_of_their_own_are_named(tmp_path, kind):
    members = samples(2) | {"9999.jpg": special("9999.jpg", kind, "0000.jpg"), "9999.cls": b"1"}
    path = put(tmp_path / "train" / "a.tar", tar_of(members, format=tarfile.GNU_FORMAT))
    reason = "links, sparse or special files: 9999.jpg. Pack the tar again"
    assert reason in refused(listed, path) and reason in refused(index_webdataset, tmp_path)
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
    options = re.search(r"tar (-h --hard-dereference)", refused(index_webdataset, tmp_path))[1]
    run(f"tar {options} -cf {tmp_path}/train/a.tar *", tmp_path.parent / f"{tmp_path.name}.in")
    index_webdataset(tmp_path)
    assert keys(tmp_path) == ["0000", "0001"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_an_idx_that_is_no_file_is_named_and_never_waited_for(tmp_path, make):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    make(tmp_path / "train" / "a.idx")
    for skip_bad in (False, True):
        assert "a.idx: " in refused(index_webdataset, tmp_path, skip_bad=skip_bad)
    (tmp_path / "train" / "a.idx").rename(tmp_path.with_name(f"{tmp_path.name}.away"))
    index_webdataset(tmp_path)


def test_an_idx_that_is_far_too_long_is_named_and_never_read(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    os.truncate(put(tmp_path / "train" / "a.idx"), 1 << 40)
    assert "a.idx: describes another tar. Move it away" in refused(index_webdataset, tmp_path)


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
    for content, message in (
        (zeroed, "zeros at byte"),
        (inner + inner, "several tars joined"),
        (inner[:3000], "damaged"),
    ):
        path = put(tmp_path / "outer.tar", tar_of({"n01.tar": content, "n02.tar": inner}))
        with open(path, "rb") as file:
            member = next(tar_files(path, file))
            inside = tar_files(path / member.name, file, member.offset_data, member.size)
            assert message in refused(list, inside)


@pytest.mark.parametrize("kept", [0, 6])
def test_a_small_tar_whose_rest_is_zeros_is_named(tmp_path, kept):
    """More zeros than a writer fills a record with, though less than a megabyte."""
    content = tar_of({f"{number}.jpg": bytes([number]) * 4000 for number in range(12)})
    cut = kept * 9 * 512  # A member has a header and eight blocks.
    path = put(tmp_path / "a.tar", content[:cut] + bytes(len(content) - cut))
    assert f"zeros at byte {cut}, and {len(content) - cut:,} bytes" in refused(listed, path)
