import functools
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from pipelines.common.errors import UserError
from pipelines.common.files import sha256_of
from pipelines.shards.index import _read_samples, read_index, sample_dtype
from pipelines.shards.manifest import manifest_bytes, read_manifest
from pipelines.shards.reader import ShardReader
from tools.lib.shards.summary import summarize
from tools.lib.shards.verify import verify


@pytest.fixture
def copy(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "copy")


def test_the_index_finds_every_jpeg(digits):
    index = read_index(digits, "train")
    assert len(index) == 320 and index.num_classes == 10 and len(index.paths) == 4
    for jpeg in ShardReader(index).read(np.arange(320)):
        assert bytes(jpeg[:3]) == b"\xff\xd8\xff" and bytes(jpeg[-2:]) == b"\xff\xd9"


def test_samples_are_named_by_shard_key_and_byte(digits):
    index = read_index(digits, "train")
    assert index.name(0).startswith("train-00000.tar: sample ")
    assert index.name(0).endswith(f" at byte {index.samples['offset'][0]}")


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json: not found, so .* is not a finished dataset$"):
        read_index(tmp_path, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"no": "version"}'])
def test_a_damaged_manifest(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json: damaged"):
        read_manifest(copy)


def test_a_manifest_of_the_future(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest.pop("splits"),
        lambda manifest: manifest.update(classes=3),
        lambda manifest: manifest["splits"]["train"].pop("digest"),
        lambda manifest: manifest["splits"].update(val=[]),
        lambda manifest: manifest["splits"]["train"].update(shards=[]),
        lambda manifest: manifest["splits"]["train"]["shards"][0].pop("bytes"),
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(name="../../secret"),
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(name="/etc/passwd"),
        *[
            lambda manifest, name=name: manifest["splits"]["train"]["shards"][0].update(name=name)
            for name in ("", ".", "..", "a\0b", "\ud800")
        ],
        *[
            lambda manifest, name=name: manifest["splits"].update({name: manifest["splits"]["train"]})
            for name in ("../train", "..", "", "\0")
        ],
        lambda manifest: manifest["splits"]["val"]["class_counts"].pop(),
    ],
)
def test_a_manifest_that_somebody_has_written_by_hand_is_refused_unless_it_is_complete(copy, spoil):
    manifest = read_manifest(copy)
    spoil(manifest)
    (copy / "manifest.json").write_bytes(manifest_bytes(manifest))  # its hash is right
    with pytest.raises(UserError, match=r"manifest.json: damaged, or not of this program"):
        read_index(copy, "train")


def places(value: object) -> list[tuple]:
    """The paths to all parts of a manifest; of a list its first item."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, part in inner for rest in places(part))]


@pytest.mark.usefixtures("jobs_in_this_process")
@pytest.mark.parametrize("wrong", ["5", -1, [[]], None, 10**40, "missing"])
def test_whatever_stands_in_a_manifest_no_command_that_reads_it_fails_with_a_traceback(copy, wrong):
    good = json.loads((copy / "manifest.json").read_text())
    refused = set()
    for *parents, last in [place for place in places(good) if place and place != ("format_version",)]:
        manifest = json.loads(json.dumps(good))
        part = functools.reduce(lambda part, key: part[key], parents, manifest)
        if wrong == "missing":
            part.pop(last)
        else:
            part[last] = wrong
        (copy / "manifest.json").write_bytes(manifest_bytes(manifest))
        try:
            read_index(copy, "train")
            summarize(copy)
            verify(copy)
        except UserError:
            refused.add((*parents, last))
    assert ("splits", "train", "digest") in refused or isinstance(wrong, str)


@pytest.mark.parametrize(("name", "message"), [("manifest.json", "damaged"), ("train/index.npy", "not an index of")])
def test_files_of_a_dataset_that_are_far_too_large_are_never_read(copy, name, message):
    os.truncate(copy / name, 1 << 40)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        read_index(copy, "train")


@pytest.mark.parametrize("size", [0, 10, 200, 1000])
def test_a_truncated_index(copy, size):
    path = copy / "train" / "index.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"index.npy: truncated, damaged or stale"):
        read_index(copy, "train")


def test_an_index_that_shrinks_or_vanishes_in_mid_run_changes_nothing_and_a_shard_is_named(copy, digits):
    index, path = read_index(copy, "train"), copy / "train" / "index.npy"
    os.truncate(path, 100)  # a memory map would end the process here
    assert np.array_equal(index.samples, read_index(digits, "train").samples)
    path.unlink()
    reader = ShardReader(index)
    before = reader.read(np.array([0]))[0].tobytes()
    for shard in index.paths:
        shard.unlink()
    assert reader.read(np.array([0]))[0].tobytes() == before  # that shard is open
    with pytest.raises(UserError, match=r"train-00003.tar: cannot be read \(No such file"):
        reader.read(np.array([319]))
    assert index.name(319) == read_index(digits, "train").name(319)


def with_index(root, samples):
    """Put an index into a dataset, as somebody would who edits it, its hash in the manifest included."""
    path = root / "train" / "index.npy"
    np.save(path, samples)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["train"]["index_sha256"] = sha256_of(path)
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))
    return read_index(root, "train")


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        *[("shard", value, "place in its shard") for value in (-1, 4)],
        *[("offset", value, "place in its shard") for value in (-1, 1 << 40, (1 << 63) - 1)],
        *[("nbytes", value, "place in its shard") for value in (-1, 0, 1 << 30)],
        *[("label", value, "label") for value in (-1, 10)],
        *[("height", value, "size") for value in (-1, 0, (1 << 31) - 1)],
    ],
)
def test_a_row_that_makes_no_sense_is_named(copy, field, value, what):
    samples = read_index(copy, "train").samples.copy()
    assert np.array_equal(with_index(copy, samples).samples, samples)
    samples[field][5] = value
    key = samples["key"][5].decode()
    with pytest.raises(UserError, match=rf"index.npy: sample {key} \(row 5\) has an impossible {what}. Build the"):
        with_index(copy, samples)


@pytest.mark.parametrize("rows", [np.arange(5), np.zeros(3, dtype=[("key", "S3")]), np.zeros((2, 2)), np.array("a")])
def test_an_array_that_is_no_index_is_refused(copy, rows):
    with pytest.raises(UserError, match=r"index.npy: not an index"):
        with_index(copy, rows)


def test_a_pipe_in_place_of_the_index_is_named(copy):
    path = copy / "train" / "index.npy"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"index.npy: not an index of 320"):
        read_index(copy, "train")


def test_an_index_is_once_in_memory(tmp_path):
    rows = np.ones(50_000, sample_dtype(20))
    np.save(tmp_path / "index.npy", rows)
    sha256 = sha256_of(tmp_path / "index.npy")
    tracemalloc.start()
    try:
        samples = _read_samples(tmp_path / "index.npy", sha256, len(rows))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(samples, rows) and not samples.flags.writeable
    assert peak < 1.5 * rows.nbytes


def test_a_stale_index(copy):
    shutil.copy(copy / "val" / "index.npy", copy / "train" / "index.npy")
    with pytest.raises(UserError, match=r"index.npy: truncated, damaged or stale"):
        read_index(copy, "train")


def test_a_missing_index(copy):
    (copy / "train" / "index.npy").unlink()
    with pytest.raises(UserError, match=r"index.npy: cannot be read \(No such file"):
        read_index(copy, "train")


def test_a_truncated_shard(copy):
    path = copy / "train" / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-00001.tar: \d+ bytes, the manifest says \d+"):
        read_index(copy, "train")


def test_a_missing_shard(copy):
    (copy / "train" / "train-00001.tar").unlink()
    with pytest.raises(UserError, match="train-00001.tar: no bytes, the manifest says"):
        read_index(copy, "train")


def test_a_missing_split(copy):
    with pytest.raises(UserError, match="has no split 'test', only train, val"):
        read_index(copy, "test")


def test_a_shard_that_shrinks_after_it_was_checked(copy):
    index = read_index(copy, "train")
    path = index.paths[0]
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(UserError, match=r"train-00000.tar: the index names bytes .* the shard has 2048"):
        ShardReader(index).read(np.arange(100))
