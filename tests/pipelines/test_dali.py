"""DALI carries out the plan of the reference, and recovers from images that it cannot decode."""

import dataclasses
import gc
import io
import resource
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from chaos.attempts import mapped_bytes
from pipelines.common.errors import UserError
from pipelines.config import PipelineConfig
from pipelines.dali import DaliPipeline
from pipelines.executors import open_pipeline
from pipelines.ops.pil_ops import augmented, decode
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import BatchPlan, EvalPlan, TrainPlan
from pipelines.shards.damage import decode_with_pil
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.reader import ShardReader
from support.executors import (
    BAD,
    EVERYTHING,
    difference,
    on_gpu,
    opened,
    overwritten,
    pixels,
    plans_of,
    recording,
    train_plan,
    works_on_gpu,
)
from tools.lib.shards.build import BuildOptions, build
from trainer.update.mixing import mix_pixels

# DALI against PIL, for each photograph, after decoding and resizing, in levels of 255 (docs/design.md). PIL
# rounds between the two passes of a resize; where 9 x 7 pixels are blown up that shows more.
MEAN_TOLERANCE, TINY_MEAN_TOLERANCE, MAX_TOLERANCE = 0.25, 1.0, 16


def assert_within_tolerance(index: ShardIndex, plans: list[BatchPlan], **options) -> None:
    valid = np.concatenate([plan.valid for plan in plans])
    samples = np.concatenate([plan.sample for plan in plans])[valid]
    off = difference(pixels("dali", index, plans, **options), pixels("torchvision", index, plans))[valid]
    for sample in np.unique(samples):
        mean, largest = off[samples == sample].mean(), off[samples == sample].max()
        tolerance = TINY_MEAN_TOLERANCE if b"tiny" in index.samples["key"][sample] else MEAN_TOLERANCE
        assert mean <= tolerance and largest <= MAX_TOLERANCE, (index.name(sample), mean, largest)


def test_dali_decodes_the_same_pixels_as_pil(photos):
    reader = ShardReader(photos)
    for sample in range(len(photos)):
        height, width = (int(photos.samples[name][sample]) for name in ("height", "width"))
        side = min(height, width)
        base = EvalPlan(photos, side, 1.0, "bicubic").rows(sample, sample + 1)
        crop = np.array([[(height - side) // 2, (width - side) // 2, side, side]], dtype=np.int32)
        plan = dataclasses.replace(
            base,
            crop=crop,
            resize=np.full((1, 2), side, dtype=np.int32),
            window=np.zeros((1, 2), dtype=np.int32),
        )
        top, left = crop[0, :2].tolist()
        expected = np.asarray(decode_with_pil(reader.read(np.array([sample]))[0]))[top : top + side, left : left + side]
        assert np.array_equal(pixels("dali", photos, [plan])[0], expected), photos.name(sample)


@pytest.mark.parametrize("decode_path", ["roi", "full"])
def test_dali_crops_resizes_and_flips_as_the_reference(photos, decode_path):
    plans = plans_of(train_plan(photos), 16)
    assert any(plan.flip.any() for plan in plans)
    assert_within_tolerance(photos, plans, decode=decode_path)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_dali_evaluates_as_the_reference(photos, interpolation):
    plans = [EvalPlan(photos, 224, 0.95, interpolation).rows(start, start + 4) for start in (0, 4, 8)]
    assert_within_tolerance(photos, plans)


def test_dali_follows_a_change_of_the_image_size(photos):
    plans = [*plans_of(train_plan(photos, size=96), 2), *plans_of(train_plan(photos, size=64), 2, first=20)]
    batches = list(opened("dali", photos).batches(plans))
    assert [batch.images.shape[1] for batch in batches] == [96, 96, 64, 64]
    for batch, plan in zip(batches, plans, strict=True):
        assert np.array_equal(batch.images.numpy(), pixels("dali", photos, [plan]))


def test_dalis_graphs_are_built_ahead_and_used_again(photos, monkeypatch):
    """For a new size while the batches of the old one are made, and once for all evaluations."""
    from pipelines import dali

    built = []

    def recorded(self, shape):
        built.append((shape.image_size, threading.current_thread().name))
        return build(self, shape)

    build = dali.DaliPipeline._build
    monkeypatch.setattr(dali.DaliPipeline, "_build", recorded)
    plans = [train_plan(photos, size=size).rows(0, 10) for size in (64, 64, 96, 96)]
    pipeline = opened("dali", photos, prefetch=1)
    batches = pipeline.batches(plans)
    next(batches)
    assert [size for size, _ in built] == [64, 96]
    assert all(thread.startswith("build-dali") for _, thread in built)
    list(batches)
    for _ in range(3):
        assert len(list(pipeline.batches(plans[2:]))) == 2
    assert len(built) == 2


@pytest.fixture
def dali_graphs(monkeypatch) -> Iterator[tuple[weakref.WeakSet, list[int]]]:
    """DALI's graphs that are alive, and the batch sizes of all that were made; Python looks for no cycles meanwhile."""
    from pipelines import dali

    alive, made = weakref.WeakSet(), []

    def recorded(self, shape, *arguments, **options):
        graph = build(self, shape, *arguments, **options)
        alive.add(graph)
        made.append(shape.batch_size)
        return graph

    build = dali.DaliPipeline._build
    monkeypatch.setattr(dali.DaliPipeline, "_build", recorded)
    gc.collect()
    gc.disable()
    yield alive, made
    gc.enable()


def test_a_graph_of_dali_that_is_dropped_is_gone_at_once(photos, dali_graphs):
    """With the memory that it holds on a GPU."""
    pipeline, (alive, _) = opened("dali", photos), dali_graphs
    assert len(list(pipeline.batches([EvalPlan(photos, 64, 1.0, "bicubic").rows(0, 2)]))) == len(alive) == 1
    pipeline.forget()
    assert not alive


@pytest.mark.parametrize(("fails_on", "graphs"), [(1, [2, 1, 1]), (2, [2, 1])])
def test_no_graph_of_dali_stays_when_it_fails(photos, dali_graphs, monkeypatch, fails_on, graphs):
    """On everything, or on several images at once. The batch's is gone before those of single images are made, and
    these with the error."""
    from pipelines import dali

    alive, made = dali_graphs
    inputs, build = dali.DaliPipeline._inputs, dali.DaliPipeline._build

    def spoilt(plan, encoded):
        return inputs(plan, [np.zeros(100, np.uint8)] * len(plan) if len(plan) >= fails_on else encoded)

    def alone_in_memory(self, *arguments, **options):
        assert not alive
        return build(self, *arguments, **options)

    monkeypatch.setattr(dali.DaliPipeline, "_inputs", staticmethod(spoilt))
    monkeypatch.setattr(dali.DaliPipeline, "_build", alone_in_memory)
    pipeline = opened("dali", photos)
    with pytest.raises(UserError, match="not because of an image"):
        list(pipeline.batches([EvalPlan(photos, 64, 1.0, "bicubic").rows(0, 2)]))
    assert made == graphs and not alive


def test_a_graph_of_dali_that_could_not_be_built_is_built_again(photos, monkeypatch):
    from pipelines import dali

    pipeline, plan = opened("dali", photos), EvalPlan(photos, 64, 1.0, "bicubic").rows(0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(dali, "_dali_graph", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            list(pipeline.batches([plan]))
    assert len(list(pipeline.batches([plan]))) == 1


def test_dali_agrees_with_the_reference_with_randaugment_on(photos):
    """Where equalize or posterize follow, a level's difference after the resize becomes a larger one."""
    plans = plans_of(train_plan(photos, AugmentConfig(mix_group=5), size=96), 12)
    diff = difference(pixels("dali", photos, plans), pixels("torchvision", photos, plans))
    assert diff.mean() <= MEAN_TOLERANCE and diff.mean(axis=(1, 2, 3)).max() <= 4


def assert_operations_are_the_references(carry_out: Callable[..., np.ndarray], photos: ShardIndex) -> None:
    plans = plans_of(train_plan(photos, EVERYTHING, size=96), 12)
    bare = [dataclasses.replace(p, ops=np.zeros_like(p.ops), erase=np.zeros_like(p.erase)) for p in plans]
    expected = iter(carry_out("dali", photos, bare))
    for plan, ours in zip(plans, np.split(carry_out("dali", photos, plans), len(plans)), strict=True):
        for row, image in enumerate(ours):
            assert np.array_equal(image, augmented(next(expected), plan, row))


def test_operations_on_dalis_pixels_are_the_references(photos):
    assert_operations_are_the_references(pixels, photos)


@pytest.mark.gpu
@pytest.mark.parametrize("decode_path", ["roi", "full"])
def test_dali_on_the_gpu_is_close_to_the_reference(photos, decode_path):
    if decode_path == "roi" and works_on_gpu() != "roi":
        pytest.skip("decoding regions does not work here: the probe says so")
    plans = plans_of(train_plan(photos), 8)
    ours = on_gpu("dali", photos, plans, decode=decode_path)
    assert difference(ours, pixels("torchvision", photos, plans)).mean() <= 1.0


@pytest.mark.gpu
def test_operations_on_the_gpu_are_the_references(photos):
    assert_operations_are_the_references(on_gpu, photos)


def test_a_very_long_image_is_evaluated_in_bounded_memory_and_alike_by_both_pipelines(tmp_path):
    strip = np.repeat(np.arange(65_500) % 251, 3).reshape(1, -1, 3).astype(np.uint8)
    for split in ("train", "val"):
        (tmp_path / "source" / split / "a").mkdir(parents=True)
        Image.fromarray(strip).save(tmp_path / "source" / split / "a" / "strip.jpg")
    build(tmp_path / "source", tmp_path / "out", BuildOptions())
    index = read_index(tmp_path / "out", "val")
    plans = [EvalPlan(index, 224, 0.95, "bicubic").rows(0, 1)]
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + (2 << 30), before[1]))  # the whole would take 11 GB
    try:
        ours, dalis = pixels("torchvision", index, plans), pixels("dali", index, plans)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    middle = decode(ShardReader(index).read(np.array([0]))[0])[:, 32_749:32_751].mean()
    assert abs(ours[0, :, 112].mean() - middle) < 2
    assert np.abs(ours.astype(int) - dalis).mean() < TINY_MEAN_TOLERANCE


@pytest.mark.parametrize("carry_out", [pixels, pytest.param(on_gpu, marks=pytest.mark.gpu)])
def test_an_image_that_dali_alone_cannot_decode_has_the_pixels_of_pil(digits, tmp_path, dali_graphs, carry_out):
    """And no other image of its batch changes."""
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    gif = io.BytesIO()
    picture.save(gif, "GIF")
    content = gif.getvalue()
    fields = {"nbytes": len(content), "crc32": zlib.crc32(content)}
    roomy = max(range(320), key=lambda i: read_index(digits, "train").samples["nbytes"][i])
    index = overwritten(digits, tmp_path / "gif", roomy, content, **fields)
    reported = []
    plans = [EvalPlan(index, 8, 1.0, "bicubic").rows(i, i + 10) for i in range(0, 320, 10)]
    ours = carry_out("dali", index, plans, on_damage=recording(reported))
    assert np.array_equal(ours[roomy], np.asarray(picture.convert("RGB")))
    made = list(dali_graphs[1])
    whole = carry_out("dali", read_index(digits, "train"), plans)
    assert np.array_equal(np.delete(ours, roomy, 0), np.delete(whole, roomy, 0))
    assert 2 <= made.count(1) <= 3, "for the images up to it, for its pixels by PIL, for the images after it"
    assert [sample for sample, _ in reported] == [roomy]
    assert "DALI cannot decode it, PIL can, whose pixels are used" in reported[0][1]


@pytest.mark.parametrize("carry_out", [pixels, pytest.param(on_gpu, marks=pytest.mark.gpu)])
def test_an_image_that_gets_to_dali_and_that_nothing_can_decode_becomes_gray(digits, tmp_path, monkeypatch, carry_out):
    """As if the check in front of DALI had missed it: its batch fails in the decoder, and is made once more."""
    nbytes = int(read_index(digits, "train").samples[BAD]["nbytes"])
    index = overwritten(digits, tmp_path / "zeros", BAD, bytes(nbytes))
    monkeypatch.setattr("pipelines.shards.damage.CheckedReader._damage", lambda *_: "")
    reported = []
    plans = [EvalPlan(index, 8, 1.0, "bicubic").rows(i, i + 10) for i in range(0, 320, 10)]
    ours = carry_out("dali", index, plans, on_damage=recording(reported))
    whole = carry_out("dali", read_index(digits, "train"), plans)
    assert (ours[BAD] == 128).all() and np.array_equal(np.delete(ours, BAD, 0), np.delete(whole, BAD, 0))
    assert [sample for sample, _ in reported] == [BAD] and reported[0][1].startswith("cannot be decoded (")


def test_what_dali_fails_on_without_an_image_being_at_fault_ends_the_run(photos, monkeypatch):
    from pipelines import dali

    def run(self, plans, stream):
        raise dali._FailedBatchError([next(plans)], RuntimeError("out of memory"))
        yield

    monkeypatch.setattr(dali._Graph, "run", run)
    with pytest.raises(UserError, match="batch of 10 images at position 0, not because of an image: out of memory"):
        pixels("dali", photos, plans_of(train_plan(photos), 3))


def test_batches_of_two_sizes_take_one_graph_and_have_the_pixels_of_whole_groups(photos, monkeypatch):
    plan = TrainPlan(photos, AugmentConfig(mix_group=5, repeats=1), global_batch=10, image_size=32)
    built, build = [], DaliPipeline._build
    monkeypatch.setattr(
        DaliPipeline, "_build", lambda self, shape, *more: built.append(shape) or build(self, shape, *more)
    )
    with open_pipeline(photos, PipelineConfig(pipeline="dali", threads=1), device="cpu") as pipeline:
        (whole,) = pipeline.batches(plan.batches(0, 1))
        expected = sorted(image.numpy().tobytes() for image in mix_pixels(whole))
        built.clear()
        found = []
        for rank in range(2):
            for batch in pipeline.batches(plan.batches(0, 1, rank=rank, ranks=2, micro_batch=4)):
                found += [image.numpy().tobytes() for image in mix_pixels(batch)]
    assert [shape.batch_size for shape in built] == [4, 2]  # One graph for each rank, of its larger batch.
    assert sorted(found) == expected
