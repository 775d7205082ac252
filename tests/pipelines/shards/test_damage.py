"""A damaged image becomes gray and is reported once, and no other image changes."""

import dataclasses
import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipelines.plan.plan import EvalPlan, TrainPlan
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader
from support.executors import BAD, NO_OPS, jpeg_of, on_gpu, overwritten, pixels, plans_of, recording


@pytest.mark.gpu
def test_a_damaged_image_on_the_gpu_becomes_gray(digits, tmp_path):
    nbytes = int(read_index(digits, "train").samples[BAD]["nbytes"])
    index = overwritten(digits, tmp_path / "zeros", BAD, bytes(nbytes), crc32=zlib.crc32(bytes(nbytes)))
    reported = []
    images = on_gpu("dali", index, [EvalPlan(index, 8, 1.0, "bicubic").rows(0, 10)] * 4, on_damage=recording(reported))
    assert (images[BAD::10] == 128).all() and [sample for sample, _ in reported] == [BAD]


BOTH = pytest.mark.parametrize("name", ["torchvision", "dali"])


def assert_gray_and_the_rest_unchanged(name: str, index: ShardIndex, digits: Path, message: str, **options) -> None:
    """The sample BAD is mid-gray in every batch and reported once; everything else is as if nothing had happened."""
    reported = []
    augment = dataclasses.replace(NO_OPS, repeats=1)
    plan = TrainPlan(index, augment, 0, global_batch=10, image_size=24, fill=(0, 0, 0))
    plans = plans_of(plan, 2 * plan.steps_per_epoch)
    ours = pixels(name, index, plans, on_damage=recording(reported), **options)
    whole = dataclasses.replace(plan, index=read_index(digits, "train"))
    expected = pixels(name, whole.index, plans_of(whole, len(plans)), **options)
    bad = np.concatenate([plan.sample for plan in plans]) == BAD
    assert bad.sum() > 1 and (ours[bad] == 128).all()
    assert np.array_equal(ours[~bad], expected[~bad])
    assert [sample for sample, _ in reported] == [BAD] and message in reported[0][1]


@BOTH
def test_an_image_whose_bytes_changed_becomes_gray_and_is_reported_once(digits, tmp_path, name):
    intact = read_index(digits, "train")
    row = intact.samples[BAD]
    jpeg = bytearray(ShardReader(intact).read(np.array([BAD]))[0].tobytes())
    jpeg[-30] ^= 1  # still a JPEG that can be decoded
    index = overwritten(digits, tmp_path / "flipped", BAD, bytes(jpeg))
    assert_gray_and_the_rest_unchanged(
        name, index, digits, f"(crc32 {zlib.crc32(jpeg):08x}, the index has {row['crc32']:08x})"
    )


@BOTH
@pytest.mark.parametrize("audited", [True, False])
def test_an_image_of_another_size_than_the_index_says_becomes_gray_and_is_reported_once(
    digits, tmp_path, name, audited
):
    """Its bytes are those of the index: somebody has edited the size."""
    index = overwritten(digits, tmp_path / "edited", BAD, None, height=9)
    index = dataclasses.replace(index, audited=audited)
    assert_gray_and_the_rest_unchanged(name, index, digits, "is 8 x 8, the index says 9 x 8")


@BOTH
def test_an_image_that_cannot_be_decoded_becomes_gray_and_is_reported_once(digits, tmp_path, name):
    """Its checksum is right: it was no image when the dataset was made without an audit."""
    nbytes = int(read_index(digits, "train").samples[BAD]["nbytes"])
    index = overwritten(digits, tmp_path / "zeros", BAD, bytes(nbytes), crc32=zlib.crc32(bytes(nbytes)))
    assert_gray_and_the_rest_unchanged(name, index, digits, "cannot be decoded (cannot identify image file")


@pytest.mark.parametrize("decode_path", ["roi", "full"])
def test_a_truncated_image_is_gray_in_any_crop_and_beside_any_others(photos, tmp_path, decode_path):
    """Its upper part could be decoded, and was shown where a crop needed no more."""
    content = jpeg_of(photos).tobytes()
    cut = content[: len(content) // 2]
    index = overwritten(photos.paths[0].parents[1], tmp_path / "cut", 0, cut.ljust(len(content), b"\0"))
    samples = index.samples.copy()
    samples["nbytes"][0], samples["crc32"][0] = len(cut), zlib.crc32(cut)
    index = dataclasses.replace(index, samples=samples)
    whole = EvalPlan(index, 64, 1.0, "bicubic").rows(0, 2)
    crop = whole.crop.copy()
    crop[0] = 0, 0, 20, 20
    square = {"resize": np.full((2, 2), 64, np.int32), "window": np.zeros((2, 2), np.int32)}
    top = dataclasses.replace(whole, crop=crop, **square)
    for name in ("dali", "torchvision"):
        reported = []
        images = pixels(name, index, [top, whole, top], decode=decode_path, on_damage=recording(reported))
        assert (images[::2] == 128).all() and not (images[1::2] == 128).all()
        assert [sample for sample, _ in reported] == [0]


@BOTH
def test_an_image_that_the_storage_cannot_give_becomes_gray(digits, monkeypatch, name):
    index = read_index(digits, "train")
    place, preadv = int(index.samples[BAD]["offset"]), os.preadv

    def failing(file, buffers, offset):
        if offset == place and os.path.samestat(os.fstat(file), os.stat(index.paths[0])):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(file, buffers, offset)

    reported = []
    monkeypatch.setattr(os, "preadv", failing)
    monkeypatch.setattr("pipelines.shards.damage._PAUSES_S", (0.0, 0.0))
    images = pixels(name, index, [EvalPlan(index, 8, 1.0, "bicubic").rows(0, 10)], on_damage=recording(reported))
    assert (images[BAD] == 128).all()
    assert reported == [(BAD, "cannot be read (Input/output error)")]
