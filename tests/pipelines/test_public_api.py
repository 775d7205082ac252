"""What a notebook needs: `import pipelines as P`, a plan to look at, its pixels, and an executor."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

import pipelines as P  # noqa: N812
from conftest import REPOSITORY, fake_index
from pipelines.batch import Batch
from pipelines.common.errors import UserError
from trainer.update.mixing import mix_pixels

SMALL = P.AugmentConfig(mix_group=4)


def plan_of(index, **options) -> P.TrainPlan:
    return P.TrainPlan(index, SMALL, seed=3, global_batch=8, image_size=32, **options)


def assert_equal_rows(ours: P.BatchPlan, theirs: P.BatchPlan) -> None:
    for field in dataclasses.fields(P.BatchPlan):
        if field.name not in ("position", "mix_group", "partners"):
            assert np.array_equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def test_planning_imports_numpy_alone_and_pixels_import_torch(digits):
    script = (
        "import sys; import pipelines as P; data = P.open_dataset(sys.argv[1]);"
        "plan = P.TrainPlan(data.train, P.AugmentConfig(mix_group=4), global_batch=8); plan.explain(5); plan[3:9];"
        "P.PipelineConfig(); P.EvalPlan(data.val)[0:3]; list(plan.batches(0, 2, rank=1, ranks=2));"
        "heavy = {'torch', 'torchvision', 'timm', 'PIL', 'nvidia'} & set(sys.modules); assert not heavy, heavy;"
        "P.render(plan[0:1], data.train); assert 'torch' in sys.modules; print('done')"
    )
    done = subprocess.run([sys.executable, "-c", script, digits], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "done\n", done.stderr


def test_every_public_name_is_there_and_no_other():
    assert {name: getattr(P, name) for name in P.__all__} and set(P.__all__) <= set(dir(P))
    with pytest.raises(AttributeError, match="no attribute 'open_pipelines'"):
        _ = P.open_pipelines


def test_a_dataset_has_its_splits_classes_and_manifest(digits):
    data = P.open_dataset(digits)
    assert len(data.train) == 320 and data.val is not None and len(data.val) == 96
    assert len(data.classes) == 10 and data.train.num_classes == 10
    assert data.manifest["splits"]["train"]["digest"] == data.train.digest


def test_a_plan_has_the_defaults_of_imagenet():
    plan = P.TrainPlan(fake_index(2000))
    assert plan.augment == P.AugmentConfig() and plan.seed == 0 and plan.global_batch == 1024
    assert plan.image_size_at(0) == 224 and plan.fill == (124, 116, 104)
    assert P.EvalPlan(fake_index(10))[0:10].image_size == 224


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (0, 8), (5, 6), (3, 9), (2, 4), (4, 7), (14, 17)])
def test_any_positions_have_the_rows_of_their_groups(start, stop):
    plan = plan_of(fake_index(100))
    whole, part = plan.rows(0, 24), plan[start:stop]
    assert part.position == start and len(part) == stop - start
    assert_equal_rows(part, whole.take(slice(start, stop)))
    if start % 4 or stop % 4:
        assert part.mix_group == 0 and part.partners is not None
        assert_equal_rows(part.partners, whole.take(plan.partner(np.arange(start, stop))))
    else:
        assert part.mix_group == 4 and part.partners is None


def test_a_part_of_a_group_is_split_with_its_partners():
    plan = plan_of(fake_index(100))
    for i, one in enumerate(plan[5:12].split(1)):
        assert one.partners is not None
        assert one.sample == plan[5 + i].sample and one.partners.sample == plan[5 + i].partners.sample


@pytest.mark.parametrize("positions", [slice(5, None), slice(5, 5), slice(-3, 2), slice(0, 8, 2), -1])
def test_positions_that_no_plan_has_are_named(positions):
    with pytest.raises(IndexError, match="give a start of at least 0, a larger stop, and no step"):
        _ = plan_of(fake_index(100))[positions]


def test_a_plan_is_not_gone_through_for_ever():
    with pytest.raises(TypeError, match="not iterable"):
        list(plan_of(fake_index(100)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_ranks_together_have_the_batches_of_one(ranks):
    plan = plan_of(fake_index(100))
    parts = [list(plan.batches(3, 15, rank=rank, ranks=ranks, micro_batch=4)) for rank in range(ranks)]
    rows = sorted((part for each in parts for part in each), key=lambda part: part.position)
    assert [part.position for part in rows] == list(range(24, 120, 4))
    for part in rows:
        assert_equal_rows(part, plan[part.position : part.position + 4])
    assert [len(batch) for batch in plan.batches(0, 3)] == [8, 8, 8]


def test_any_ranks_divide_a_batch_up_to_one_for_each_pair():
    plan = plan_of(fake_index(100))
    for ranks in (3, 4):
        samples = [plan_of(fake_index(100)).batches(0, 1, rank=rank, ranks=ranks) for rank in range(ranks)]
        found = sorted(int(sample) for batches in samples for batch in batches for sample in batch.sample)
        assert found == sorted(plan[0:8].sample.tolist())
    with pytest.raises(UserError, match="ranks is 5; a global batch of 8 rows has 4 pairs"):
        next(plan.batches(0, 1, ranks=5))


def test_an_explanation_says_what_the_rows_hold(photos):
    plan = plan_of(photos)
    for position in range(40):
        row, text = plan[position], plan.explain(position)
        top, left, height, width = row.crop[0].tolist()
        assert f"position {position}: image {photos.samples['key'][row.sample[0]].decode()}, class" in text
        assert f"crop: {height} x {width} px at row {top}, column {left}; resized to 32 x 32 px (bicubic)" in text
        assert f"flip: {'yes' if row.flip[0] else 'no'}" in text
        assert row.ops.any() != ("operations: none" in text) and text.count(", then ") == max(
            0, (row.ops > 0).sum() - 1
        )
        partner = photos.samples["key"][row.partners.sample[0]].decode()
        assert f"position {position // 4 * 4 + 3 - position % 4} (image {partner})" in text
        assert f"{'CutMix' if row.box.any() else 'mixup'}, lam {row.lam[0]:.3f}" in text


def test_an_explanation_of_an_image_that_is_not_mixed_names_no_partner():
    plan = dataclasses.replace(plan_of(fake_index(100)), augment=P.AugmentConfig(mix_group=4, mix_prob=0.0))
    assert plan.explain(5).endswith("mixing: none")
    assert "position 3: image" in P.EvalPlan(fake_index(10)).explain(3)


def test_render_gives_the_pixels_of_the_executor(photos):
    plan = plan_of(photos)
    with P.open_pipeline(photos, P.PipelineConfig(pipeline="torchvision", threads=2), device="cpu") as pipeline:
        (batch,) = pipeline.batches([plan[0:8]])
    assert np.array_equal(P.render(plan[0:8], photos), batch.images.numpy())


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 40), (5, 6), (3, 13)])
def test_render_mixes_as_the_training_step_does(photos, start, stop):
    plan = plan_of(photos)
    whole = plan[0:40]
    images, lam, box = (torch.from_numpy(part) for part in (P.render(whole, photos), whole.lam, whole.box))
    labels = valid = torch.ones(40)
    mixed = mix_pixels(Batch(images, labels, lam, box, valid, 0, 4)).numpy()
    assert {True, False} <= {bool(height) for _, _, height, _ in whole.box.tolist()}
    assert np.array_equal(P.render(plan[start:stop], photos, mixed=True), mixed[start:stop])
    assert not np.array_equal(mixed[start:stop], P.render(plan[start:stop], photos))


def test_render_leaves_evaluation_unmixed(photos):
    rows = P.EvalPlan(photos, 64)[0:3]
    assert np.array_equal(P.render(rows, photos, mixed=True), P.render(rows, photos))
