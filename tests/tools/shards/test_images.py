"""Images on their way into a shard: which are repaired, rejected, shrunk or taken unchanged, and the audit."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.shards.index import read_index
from pipelines.shards.manifest import read_manifest
from support.small_sources import convert, jpeg_of, make_mixed_folder, samples_of, write_images
from tools.lib.common.photos import photographs
from tools.lib.shards import manifest_builder

pytestmark = pytest.mark.usefixtures("jobs_in_this_process")


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_mixed_folder(tmp_path / "src")


def misfits() -> dict[str, tuple[bytes, str]]:
    """File name -> content and what it is repaired for: every kind of image that cannot be used unchanged."""
    photo = photographs()[0][1].resize((80, 60))
    deep = (np.asarray(photo.convert("L")).astype(np.uint16) << 8) | 0x34
    palette = photo.quantize(32)
    rgba = photo.convert("RGBA")
    rgba.putalpha(128)
    return {
        "png.JPEG": (jpeg_of(photo, format="PNG"), "PNG image, mode RGB"),
        "cmyk.jpg": (jpeg_of(photo.convert("CMYK")), "JPEG of mode CMYK"),
        "alpha.png": (jpeg_of(rgba, format="PNG"), "PNG image, mode RGBA"),
        "deep.png": (jpeg_of(Image.fromarray(deep), format="PNG"), "PNG image, mode I;16"),
        "palette.png": (jpeg_of(palette, format="PNG"), "PNG image, mode P"),
        "gif.jpg": (jpeg_of(photo, format="GIF"), "GIF image, mode P"),
        "gray-alpha.png": (jpeg_of(photo.convert("LA"), format="PNG"), "PNG image, mode LA"),
    }


def rejects() -> dict[str, tuple[bytes, str]]:
    photo = photographs()[0][1].resize((80, 60))
    whole = jpeg_of(photo)
    bomb = jpeg_of(Image.new("L", (30_000, 5_000)), format="PNG")
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"this is not an image", "not an image"),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "header.jpg": (whole[:200], "cannot be decoded"),
        "bomb.png": (bomb, "absurd dimensions: 30000 x 5000"),
    }


def test_misfits_become_rgb_jpegs_of_the_same_picture_and_are_listed(folder, tmp_path):
    write_images(folder, misfits())
    manifest = convert(folder, tmp_path / "out")
    listed = {item["sample"]: item["reason"] for item in manifest["audit"]["repaired"]}
    assert listed == {
        **{f"train/cat/{Path(name).stem}": reason for name, (_, reason) in misfits().items()},
        "train/dog/d": "PNG image, mode RGB",
    }
    photo = np.asarray(photographs()[0][1].resize((80, 60))).astype(int)
    gray = np.asarray(photographs()[0][1].resize((80, 60)).convert("L")).astype(int)
    samples = samples_of(tmp_path / "out")
    for name in misfits():
        image = Image.open(io.BytesIO(samples[f"cat/{Path(name).stem}"][0]))
        assert image.format == "JPEG" and image.mode == "RGB" and image.size == (80, 60)
        expected = np.repeat(gray[..., None], 3, 2) if name in ("deep.png", "gray-alpha.png") else photo
        assert abs(np.asarray(image).astype(int) - expected).mean() < 12, name  # 32 colours are the coarsest


def test_plain_jpegs_keep_their_bytes(folder, tmp_path):
    photo = photographs()[1][1].resize((70, 90))
    plain = {
        "gray.jpg": (jpeg_of(photo.convert("L")), ""),
        "progressive.jpg": (jpeg_of(photo, progressive=True), ""),
        "exif.jpg": (jpeg_of(photo, exif=_orientation(6)), ""),
    }
    write_images(folder, plain)
    manifest = convert(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    for name, (content, _) in plain.items():
        assert samples[f"cat/{Path(name).stem}"][0] == content
    assert manifest["audit"]["oriented"] == ["train/cat/exif"]
    rows = read_index(tmp_path / "out", "train").samples
    row = rows[rows["key"] == b"cat/exif"][0]
    assert (row["orientation"], row["height"], row["width"]) == (6, 90, 70)


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_images_that_cannot_be_used_are_all_named_and_nothing_is_made(folder, tmp_path):
    write_images(folder, rejects())
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "out")
    assert "5 images cannot be used" in str(error.value) and "--on-bad skip" in str(error.value)
    for name, (_, reason) in rejects().items():
        assert f"train/cat/{name} (" in str(error.value) and reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used_are_left_out_when_asked_and_listed(folder, tmp_path):
    convert(folder, tmp_path / "clean")
    write_images(folder, rejects())
    with pytest.raises(UserError):
        convert(folder, tmp_path / "out")
    manifest = convert(folder, tmp_path / "out", skip_bad=True)
    assert {Path(item["source"]).name for item in manifest["audit"]["rejected"]} == set(rejects())
    assert samples_of(tmp_path / "out") == samples_of(tmp_path / "clean")


def test_images_that_were_repaired_in_place_are_taken_the_second_time(folder, tmp_path):
    bad = folder / "train" / "cat" / "bad.jpg"
    bad.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"1 images cannot be used: train/cat/bad.jpg"):
        convert(folder, tmp_path / "out")
    bad.write_bytes(jpeg_of(photographs()[0][1]))
    convert(folder, tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 7


def test_duplicates_are_found_within_a_split_and_across_splits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_builder, "_HASHES_AT_A_TIME", 3)  # several passes
    for copy in ("train/dog/copy.jpg", "val/cat/leak.jpg"):
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        (folder / copy).write_bytes((folder / "train" / "cat" / "a.JPEG").read_bytes())
    (folder / "val" / "dog").mkdir()
    (folder / "val" / "dog" / "other.jpg").write_bytes(jpeg_of(photographs()[7][1]))
    manifest = convert(folder, tmp_path / "out", samples_per_shard=2)
    assert manifest["audit"]["duplicates"] == [["train/cat/a", "train/dog/copy", "val/cat/leak"]]


def test_tiny_images_are_counted_with_examples(digits):
    audit = read_manifest(digits)["audit"]
    assert audit["counts"]["tiny"] == 416 and len(audit["tiny"]) == 416
    remarks = [json.loads(line) for line in (digits / "audit.jsonl").read_text().splitlines()]
    assert [remark["what"] for remark in remarks if remark["kind"] == "tiny"] == audit["tiny"]


def test_without_the_audit_bytes_are_the_same_and_damage_stays_unnoticed(digits_folder, digits, folder, tmp_path):
    convert(digits_folder, tmp_path / "fast", audit=False)
    assert samples_of(tmp_path / "fast") == samples_of(digits)
    whole = jpeg_of(photographs()[0][1])
    write_images(folder, {"truncated.jpg": (whole[: len(whole) // 2], "")})
    convert(folder, tmp_path / "out", audit=False)
    assert "cat/truncated" in samples_of(tmp_path / "out")


def test_shrinking_only_ever_shrinks_and_the_index_follows(folder, tmp_path):
    manifest = convert(folder, tmp_path / "out", resize_short=60)
    assert manifest["options"]["resize_short"] == 60
    rows = {row["key"].decode(): row for row in read_index(tmp_path / "out", "train").samples}
    originals = {"a": "cat/a.JPEG", "c": "cat/c.jpeg", "d": "dog/d.png", "e_v2": "cat/e.v2.jpg", "f_g": "dog/f g.jpg"}
    resized = 0
    for name, file in originals.items():
        original = Image.open(folder / "train" / file)
        row = rows[f"{Path(file).parent}/{name}"]
        if min(original.size) > 60:
            resized += 1
            assert min(row["height"], row["width"]) == 60
            assert row["height"] / row["width"] == pytest.approx(original.height / original.width, rel=0.02)
        else:
            assert (row["width"], row["height"]) == original.size
        jpeg = Image.open(io.BytesIO(samples_of(tmp_path / "out")[f"{Path(file).parent}/{name}"][0]))
        assert jpeg.size == (row["width"], row["height"])
    assert manifest["audit"]["counts"]["resized"] == resized + 1  # and dog/b
