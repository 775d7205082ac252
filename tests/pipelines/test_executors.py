"""An executor is a pure function of the plan."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from conftest import fake_index
from pipelines import resolve_pipeline
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from support.executors import CPU, EVERYTHING, on_gpu, opened, pixels, plans_of, train_plan


@pytest.mark.parametrize("name", ["torchvision", "dali", "synthetic"])
def test_batches_do_not_depend_on_threads_prefetch_or_batch_size(photos, name):
    plan = train_plan(photos)
    one = pixels(name, photos, plans_of(plan, 4), threads=1, prefetch=1)
    again = pixels(name, photos, plans_of(plan, 4), threads=3, prefetch=4)
    assert np.array_equal(one, again)
    if name != "synthetic":  # noise is drawn for a batch
        assert np.array_equal(one, pixels(name, photos, plans_of(plan, 8, batch=5)))
        assert np.array_equal(one[20:], pixels(name, photos, plans_of(plan, 2, first=20)))


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_a_pipeline_can_be_used_again_and_left_early(photos, name):
    plan = train_plan(photos)
    pipeline = opened(name, photos)
    batches = pipeline.batches(plan.rows(i * 10, (i + 1) * 10) for i in range(10**6))
    first = next(batches).images.clone()
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    assert torch.equal(first, next(pipeline.batches(plans_of(plan, 1))).images)


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_repeated_epochs_have_the_pixels_of_the_first_ones_also_where_sizes_change(photos, name):
    augment = dataclasses.replace(EVERYTHING, cycle_epochs=2)
    plan = dataclasses.replace(train_plan(photos, augment), image_size=((0, 48), (1, 64)))
    steps = 2 * plan.steps_per_epoch
    batches = list(opened(name, photos).batches(plan.batches(0, 3 * steps)))
    assert {batch.images.shape[1] for batch in batches} == {48, 64}
    for number, batch in enumerate(batches):
        assert batch.position == 10 * number
        assert torch.equal(batch.images, batches[number % steps].images)


def test_earlier_batches_are_not_overwritten_by_later_ones(photos):
    plan = train_plan(photos)
    for name in ("torchvision", "dali"):
        kept = list(opened(name, photos).batches(plans_of(plan, 6)))
        fresh = pixels(name, photos, plans_of(plan, 6))
        assert np.array_equal(np.concatenate([batch.images.numpy() for batch in kept]), fresh)


@pytest.mark.gpu
def test_batches_on_the_gpu_do_not_depend_on_threads_prefetch_or_batch_size(photos):
    plan = train_plan(photos, EVERYTHING)
    expected = on_gpu("dali", photos, [plan.rows(0, 40)], threads=1, prefetch=1)
    assert np.array_equal(on_gpu("dali", photos, plans_of(plan, 4), threads=4, prefetch=3), expected)
    assert np.array_equal(on_gpu("dali", photos, plans_of(plan, 8, batch=5)), expected)


def test_auto_is_dali_with_a_gpu_and_torchvision_without():
    assert resolve_pipeline("auto", CPU) == "torchvision"
    assert resolve_pipeline("auto", torch.device("cuda", 0)) == "dali"


def test_synthetic_batches_need_no_data():
    index = fake_index(100)
    plan = TrainPlan(index, AugmentConfig(mix_group=10), 0, 20, 16, (0, 0, 0))
    images = pixels("synthetic", index, plans_of(plan, 3, batch=20))
    assert images.std() > 70  # noise: uniform bytes have 73.9
