"""Tars of other people are read to the end of the file, and what a message about one advises works."""

import io
import os
import re
import shutil
import tarfile

import pytest

from pipelines.shards.index import read_index
from support.hand_made import keys, listed, put, refused, run, samples, tar_of
from tools.lib.predict.image_files import items_of
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources.tars import FilePart, tar_files
from tools.lib.shards.sources.webdataset import tar_members

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


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
    path = put(tmp_path / "train" / "a.tar", whole + bytes(10240))
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


@pytest.mark.parametrize("rest", [b"", b"x", samples])
def test_terabytes_of_holes_are_skipped_and_what_follows_is_named(tmp_path, rest):
    whole, hole = tar_of(samples(3)), 1 << 40
    path = put(tmp_path / "a.tar", whole)
    with open(path, "r+b") as file:
        file.truncate(len(whole) + hole)
        file.seek(0, io.SEEK_END)
        file.write(tar_of(samples(2)) if callable(rest) else rest)
    message = refused(listed, path)
    assert (
        "more than a tar is filled up with" if not rest else f"more content from byte {len(whole) + hole} on"
    ) in message
    rows = list(items_of(path))
    assert [bool(row.error) for row in rows] == [False, False, False, True]


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


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz", "zstd --rm"])
def test_a_compressed_tar_of_any_name_is_named_and_the_advice_works(tmp_path, tool):
    if not shutil.which(tool.split()[0]):
        pytest.skip(f"needs {tool}")
    path = put(tmp_path / "train" / "a.tar", tar_of(samples(2)))
    run(f"{tool} a.tar", path.parent)
    (packed,) = path.parent.iterdir()
    before = packed.read_bytes()
    run(re.search(r"unpack it with (\w+( --rm)?)", refused(index_webdataset, tmp_path))[1] + " *", path.parent)
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 2
    (tmp_path / "manifest.json").unlink()
    put(path, before)
    run(re.search(r"Run (.*)", refused(listed, path))[1], path.parent)
    assert len(listed(path)) == 4
    index_webdataset(tmp_path)
    assert len(keys(tmp_path)) == 2


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz", "zstd"])
@pytest.mark.parametrize("options", [{}, {"out": True}])
def test_all_compressed_tars_are_named_at_once_and_one_loop_unpacks_them_through_links_too(tmp_path, tool, options):
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    root, store = tmp_path / "set", tmp_path / "store"
    options = {"out": tmp_path / "index"} if options else {}
    put(root / "train" / "sound.tar", tar_of(samples(2)))
    put(root / "val" / "BZh.tar", tar_of(samples(1, "BZh{}")))
    for number in range(12):
        put(store / f"my {number:02d}.tar", tar_of(samples(2, start=10 + 2 * number)))
    run(f'for f in *; do {tool} -c "$f" > x; mv x "$f"; done', store)
    before = {path: path.read_bytes() for path in store.iterdir()}
    for path in before:
        (root / "train" / path.name).symlink_to(path)
    put(root / "val" / "my.tar", next(iter(before.values())))
    message = refused(index_webdataset, root, **options)
    assert message.startswith(f"{root}: 13 tars are compressed") and "and 11 more" in message
    assert not (tmp_path / "index").exists()
    run(re.search(r"In that folder run (.*)", message)[1], root)
    assert {path: path.read_bytes() for path in store.iterdir()} == before
    index_webdataset(root, **options)
    assert len(keys(options.get("out", root))) == 26 and len(keys(options.get("out", root), "val")) == 3


@pytest.mark.parametrize("spoil", ["joined", "no end", "zeros"])
def test_advice_about_a_tar_of_an_index_elsewhere_names_the_tar_itself_and_leaves_no_folder(tmp_path, spoil):
    whole = tar_of(samples(3))
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    content = {"joined": whole + tar_of(samples(3, start=5)), "no end": whole[:end], "zeros": whole + bytes(10240)}
    path = put(tmp_path / "set" / "train" / "a.tar", content[spoil])
    message = refused(index_webdataset, tmp_path / "set", out=tmp_path / "index")
    assert message.startswith(f"{path}: ") and not (tmp_path / "index").exists()
    run(re.search(r"(head .*); and|(head .*|truncate .*)", message)[0].removesuffix("; and"), path.parent)
    if spoil == "joined":
        path.rename(tmp_path / "joined.tar")
    index_webdataset(tmp_path / "set", out=tmp_path / "index")
    assert len(keys(tmp_path / "index")) == (6 if spoil == "joined" else 3)


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
    for content, message in ((zeroed, "zeros at byte"), (inner + inner, "more content"), (inner[:3000], "damaged")):
        path = put(tmp_path / "outer.tar", tar_of({"n01.tar": content, "n02.tar": inner}))
        with open(path, "rb") as file:
            member = next(tar_files(path, file))
            part = FilePart(file, member.offset_data, member.size)
            assert message in refused(list, tar_files(path / member.name, part))
