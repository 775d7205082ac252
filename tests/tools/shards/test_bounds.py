"""Input of any size costs bounded memory, and what a conversion makes has its name no sooner than it is on the disk."""

import errno
import functools
import io
import os
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chaos.attempts import mapped_bytes
from chaos.tars import CLASS, IMAGES, devkit
from pipelines.common.files import locked
from pipelines.shards.damage import CheckedReader, decode_with_pil
from pipelines.shards.index import read_index
from support.hand_made import jpeg, listed, put, refused, samples, tar_of
from support.small_sources import add
from tools.lib.common.photos import write_digits
from tools.lib.predict.image_files import decoded, items_of, pixels_of
from tools.lib.shards import build as build_module
from tools.lib.shards.build import BuildOptions, build, merge
from tools.lib.shards.images import MAX_BYTES, ImageOptions, RejectedImageError, check_image
from tools.lib.shards.reindex import index_webdataset
from tools.lib.shards.sources.tars import BLOCK
from tools.lib.shards.verify import verify
from trainer.evaluation.trained import EvalTransform

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")
VIEW = EvalTransform(32, 1.0, "center", "bicubic")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Allow 400 MB more than there are: less than the inputs below claim to have."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + (400 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def digits_images(tmp_path) -> Path:
    write_digits(tmp_path / "images", num_train=20, num_val=10)
    return tmp_path / "images"


def with_hole(path: Path, whole: bytes, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    """A tar, one member of which is 600 MB longer than it was, all of it a hole of the disk."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        member = tar.getmember(name)
    hole = MAX_BYTES + (88 << 20)
    member.size, member.type, old = member.size + hole, kind, member.size
    start = member.offset_data
    put(path, whole[: member.offset] + member.tobuf(tarfile.GNU_FORMAT) + whole[start : start + old])
    with open(path, "r+b") as file:
        file.seek(hole, io.SEEK_END)
        file.write(whole[start + old :])
    return path


@pytest.mark.parametrize(
    ("name", "reason"), [("0001.jpg", "no image has more than"), ("0001.cls", "not a class number")]
)
def test_members_larger_than_any_image_or_label_are_named_and_never_read(tmp_path, little_memory, name, reason):
    path = with_hole(tmp_path / "train" / "a.tar", tar_of(samples(3)), name)
    message = refused(index_webdataset, tmp_path)
    assert "samples cannot be used: train/a.tar: 0001" in message and reason in message
    rows = [decoded(item, VIEW) for item in items_of(path)]
    assert [bool(error) for _, _, error in rows] == [False, name == "0001.jpg", False]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_of_any_size_are_named_and_never_read(tmp_path, little_memory, kind):
    path = with_hole(tmp_path / "a.tar", tar_of(samples(3)), "0001.jpg", kind)
    assert "the headers before one member have more than" in refused(listed, path)
    assert [bool(item.error) for item in items_of(path)] == [False, True]


def test_an_image_in_imagenets_own_tar_that_is_larger_than_any_is_named_and_never_read(tmp_path, little_memory):
    inner = with_hole(tmp_path / "inner", IMAGES, f"{CLASS}_2.JPEG")
    info = tarfile.TarInfo(f"{CLASS}.tar")
    info.size, head = inner.stat().st_size, 8192  # the hole begins before byte 8192 and ends as far before the end
    path = put(tmp_path / "src" / "ILSVRC2012_img_train.tar", info.tobuf())
    with open(inner, "rb") as part, open(path, "r+b") as file:
        file.seek(BLOCK)
        file.write(part.read(head))
        part.seek(-len(IMAGES), io.SEEK_END)
        file.seek(BLOCK + info.size - len(IMAGES))
        file.write(part.read() + bytes(2 * BLOCK))
    put(tmp_path / "src" / "ILSVRC2012_devkit_t12.tar.gz", devkit())
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert f"{CLASS}_2.JPEG" in message and "no image has more than" in message


def test_compressed_zeros_in_the_devkit_are_named_and_never_unpacked_into_memory(tmp_path, little_memory):
    with tarfile.open(tmp_path / "src.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("data/meta.mat")
        info.size = 80 << 20
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(info, zeros)
        add(tar, "data/ILSVRC2012_validation_ground_truth.txt", b"1\n")
    put(tmp_path / "src" / "ILSVRC2012_img_train.tar", tar_of({}))
    shutil.move(tmp_path / "src.tar.gz", tmp_path / "src" / "ILSVRC2012_devkit_t12.tar.gz")
    message = refused(build, tmp_path / "src", tmp_path / "out", BuildOptions())
    assert "not the ILSVRC2012 devkit" in message and "83,886,080 bytes" in message


def test_a_shard_that_grew_by_more_than_memory_is_verified(tmp_path, digits_images, little_memory):
    build(digits_images, tmp_path / "out", BuildOptions())
    path = tmp_path / "out" / "val" / "val-00000.tar"
    os.truncate(path, path.stat().st_size + MAX_BYTES + (88 << 20))
    (fault,) = verify(tmp_path / "out")
    assert fault.startswith(f"val/val-00000.tar: {path.stat().st_size} bytes that are not those of the manifest")
    with open(path, "r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"x")
    assert verify(tmp_path / "out")[1].endswith(f"byte {path.stat().st_size - 1}: the end of the tar is damaged")


def test_images_without_pixels_are_refused_with_and_without_an_audit():
    content = bytearray(jpeg())
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 2] = b"\0\0"  # a height of 0: to be defined later, which no decoder supports
    for audit in (True, False):
        with pytest.raises(RejectedImageError, match="absurd dimensions|cannot be decoded|not an image"):
            check_image(bytes(content), ImageOptions(audit=audit))


def test_programs_are_never_run_as_images():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) show\nshowpage\n"
    for open_image in (decode_with_pil, lambda content: check_image(content, ImageOptions())):
        with pytest.raises(ValueError, match="EPS is a program, not an image"):
            open_image(program)


SCAN = b"\xff\xda"


@pytest.fixture
def many_scans() -> Callable[[int], bytes]:
    """A progressive JPEG to whose scans the last one is added again and again, so often."""
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 30, 200)).save(whole, "JPEG", progressive=True)
    content = whole.getvalue()
    return lambda count: content[:-2] + count * content[content.rindex(SCAN) : -2] + content[-2:]


def test_images_of_absurdly_many_scans_are_refused(many_scans):
    """Each scan costs a pass over all pixels and needs no more than a few bytes."""
    converted = [functools.partial(check_image, options=ImageOptions(audit=audit)) for audit in (True, False)]
    for look in (decode_with_pil, pixels_of, *converted):
        look(many_scans(100))
        with pytest.raises(ValueError, match="more than 200 scans, which no encoder writes"):
            look(many_scans(200))


@pytest.mark.parametrize("audit", [True, False])
def test_a_sample_of_absurdly_many_scans_in_an_older_dataset_becomes_gray(many_scans, tmp_path, monkeypatch, audit):
    for split in ("train", "val"):
        put(tmp_path / split / "a.tar", tar_of({"0.jpg": many_scans(200), "0.cls": b"0"}))
    with monkeypatch.context() as older:
        older.setattr("pipelines.shards.jpeg.MAX_SCANS", 1000)
        index_webdataset(tmp_path, audit=audit)
    reasons = []
    CheckedReader(read_index(tmp_path, "train"), lambda _, why: reasons.append(why)).read(np.arange(1))
    assert reasons == ["cannot be decoded (more than 200 scans, which no encoder writes)"]


def test_scans_are_those_that_a_decoder_finds(many_scans):
    """Markers in the content of a segment and behind the end of the image, as in photographs with films, are none."""
    image = many_scans(0)
    segment = b"\xff\xe2" + (2 + 600).to_bytes(2, "big") + 300 * SCAN
    for content in (image + 300 * SCAN, image[:2] + segment + image[2:]):
        assert decode_with_pil(content).size == (64, 64) and pixels_of(content).shape == (64, 64, 3)
    garbage = many_scans(200).replace(SCAN, b"garbage" + SCAN)  # decoders pass over it
    with pytest.raises(ValueError, match="more than 200 scans"):
        pixels_of(garbage)


# --- what is left, and when ---


def make_link(path: Path) -> None:
    put(path.parent.parent / "precious", b"precious")
    path.symlink_to(path.parent.parent / "precious")


@pytest.mark.parametrize("make", [make_link, os.mkfifo, os.mkdir], ids=["link", "pipe", "folder"])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("out.partial/.lock-claim", "build"),
        ("out.partial/.lock-0-1", "build"),
        ("out.partial/.lock-listing", "build"),
        ("out.partial/.lock-merge", "merge"),
        ("tars/.index.lock", "index"),
    ],
)
def test_a_lock_of_a_conversion_that_is_no_file_is_named_and_moving_it_helps(
    tmp_path, digits_images, make, name, command
):
    put(tmp_path / "tars" / "train" / "a.tar", tar_of(samples(3)))
    out, options = tmp_path / "out", BuildOptions()
    calls = {
        "build": lambda: build(digits_images, out, options),
        "merge": lambda: merge(out),
        "index": lambda: index_webdataset(tmp_path / "tars"),
    }
    if command == "merge":
        for part in range(2):
            build(digits_images, out, options, part=(part, 2))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    assert refused(calls[command]).endswith(f"{path}: not a file that this program made. Move it away")
    path.rename(tmp_path / "away")
    calls[command]()
    assert not (tmp_path / "precious").exists() or (tmp_path / "precious").read_bytes() == b"precious"


def test_two_indexings_at_once_keep_each_other_out_and_leave_no_lock(tmp_path):
    put(tmp_path / "train" / "a.tar", tar_of(samples(3)))
    with locked(tmp_path / ".index.lock", ""):
        message = refused(index_webdataset, tmp_path)
    assert message == f"another process is already indexing {tmp_path}. Wait for it, or stop it"
    manifest = index_webdataset(tmp_path)
    assert not (tmp_path / ".index.lock").exists() and manifest["audit"]["counts"]["hidden"] == 0
    assert verify(tmp_path) == []


def test_a_description_is_on_the_disk_before_it_has_its_name(tmp_path, digits_images, monkeypatch):
    """Otherwise a power failure leaves an empty job.json, with which no command resumes."""
    done, fsync, rename = [], os.fsync, Path.rename

    def synced(file) -> None:
        fsync(file)
        done.append(("sync", os.readlink(f"/proc/self/fd/{file}").partition(".json")[0]))

    def renamed(path, target):
        done.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    build(digits_images, tmp_path / "out", BuildOptions())
    partial = tmp_path / "out.partial"
    for name in ("job", "manifest", "listing/train", "records/train/train-00000"):
        place = done.index(("rename", f"{partial / name}.json"))
        assert ("sync", str(partial / name)) in done[:place], name
        assert ("sync", str((partial / name).parent)) in done[place:], name
    assert done.index(("rename", str(tmp_path / "out"))) > done.index(("rename", f"{partial}/manifest.json"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["listing", "records"])
def test_what_cannot_be_removed_at_the_end_is_one_line_and_the_same_command_removes_it(
    tmp_path, digits_images, monkeypatch, number, name
):
    rmtree = shutil.rmtree

    def failing(path, *arguments, **options):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        rmtree(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(build_module.shutil, "rmtree", failing)
        message = refused(build, digits_images, tmp_path / "out", BuildOptions())
    assert f"out.partial/{name}: {os.strerror(number)}" in message and not (tmp_path / "out").exists()
    build(digits_images, tmp_path / "out", BuildOptions())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "audit.jsonl",
        "manifest.json",
        "train",
        "val",
    ]
    assert verify(tmp_path / "out") == [] and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("suffix", [".starts", ".jsonl"])
def test_a_listing_that_is_cut_off_in_mid_run_ends_the_conversion_and_no_sample_takes_the_place_of_another(
    tmp_path, digits_images, monkeypatch, suffix
):
    out, write_shard = tmp_path / "out", build_module.write_shard
    partial = tmp_path / "out.partial"

    def cut_off_then_written(*arguments):
        os.truncate(partial / "listing" / f"train{suffix}", 4)
        write_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_shard", cut_off_then_written)
        message = refused(build, digits_images, out, BuildOptions())
    assert f"listing/train.json: its listing is cut off. Remove {partial} to begin the conversion again" in message
    assert "is cut off" in refused(build, digits_images, out, BuildOptions())  # an order of fewer samples is another
    shutil.rmtree(partial)
    build(digits_images, out, BuildOptions())
    assert verify(out) == []
