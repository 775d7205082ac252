import dataclasses

import numpy as np
import pytest

from conftest import fake_index
from pipelines.common.errors import UserError
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import LONGEST, PLAN_VERSION, BatchPlan, EvalPlan, TrainPlan
from trainer.cluster.world import World
from trainer.feed import rank_plans

SMALL = AugmentConfig(mix_group=16)


def make_plan(num_samples=1000, global_batch=128, seed=0, augment=SMALL) -> TrainPlan:
    return TrainPlan(fake_index(num_samples), augment, seed, global_batch, image_size=64, fill=(1, 2, 3))


def rows_of(plan: BatchPlan) -> dict[str, np.ndarray]:
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}


def assert_same_rows(whole: BatchPlan, parts: list[BatchPlan]) -> None:
    for name, value in rows_of(whole).items():
        assert np.array_equal(value, np.concatenate([getattr(part, name) for part in parts])), name


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_plan_is_the_same_on_1_and_more_ranks(ranks):
    plan = make_plan()
    one = list(rank_plans(plan, 3, 9, World(0, 1, 1, None), micro_batch=128))
    many = [list(rank_plans(plan, 3, 9, World(rank, ranks, ranks, None), micro_batch=16)) for rank in range(ranks)]
    per_step = 128 // ranks // 16
    for step, whole in enumerate(one):
        parts = [part for rank in many for part in rank[step * per_step : (step + 1) * per_step]]
        assert_same_rows(whole, parts)


def test_any_split_of_a_range_equals_the_whole():
    plan = make_plan()
    # over the end of the first epoch, which has 7 steps
    whole = plan.rows(5 * 128, 10 * 128)
    generator = np.random.default_rng(0)
    for _ in range(5):
        cuts = [5 * 128, *sorted(generator.choice(np.arange(5 * 128 + 16, 10 * 128, 16), 6, replace=False)), 10 * 128]
        assert_same_rows(whole, [plan.rows(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)])


def test_splitting_a_plan_equals_planning_the_parts():
    plan = make_plan()
    for part in plan.rows(256, 384).split(32):
        alone = plan.rows(part.position, part.position + 32)
        assert_same_rows(part, [alone])
        assert (part.mix_group, part.image_size, part.fill) == (alone.mix_group, alone.image_size, alone.fill)


def test_an_epoch_shows_a_third_of_the_images_three_times():
    plan = make_plan(num_samples=1536, global_batch=128)
    epoch = plan.rows(0, plan.steps_per_epoch * 128)
    images, counts = np.unique(epoch.sample, return_counts=True)
    assert len(images) == 512
    assert (counts == 3).all()


def test_what_does_not_fill_a_global_batch_is_dropped():
    plan = make_plan(num_samples=1000, global_batch=128)
    assert plan.steps_per_epoch == 7


def test_over_three_epochs_worth_of_repeats_no_image_is_preferred():
    plan = make_plan(num_samples=1280, global_batch=128)
    shown = plan.rows(0, 60 * plan.steps_per_epoch * 128).sample
    counts = np.bincount(shown, minlength=1280)
    # Each image is in an epoch with probability 1/3, then three times: mean 60, standard deviation about 11.
    assert counts.mean() == 60
    assert counts.min() > 10 and counts.max() < 110


def test_repeated_augmentation_deals_as_the_authors_sampler():
    """timm's RepeatAugSampler on 8 ranks, given our order instead of its own."""
    plan = TrainPlan(fake_index(5000), AugmentConfig(), seed=1, global_batch=1024, image_size=224, fill=(0, 0, 0))
    from pipelines.plan import rng

    order = rng.permute(1, rng.Stream.ORDER, 0, 5000, np.arange(5000))
    repeated = np.repeat(order, 3)
    for step in range(plan.steps_per_epoch):
        batch = plan.rows(step * 1024, (step + 1) * 1024).sample.reshape(8, 128)
        for rank in range(8):
            dealt = repeated[rank::8]
            assert np.array_equal(batch[rank], dealt[step * 128 : (step + 1) * 128])


GOLDEN = {
    "sample": [3593, 693, 3011, 2701, 3406],
    "crop": [[53, 62, 381, 404], [6, 104, 224, 220]],
    "ops": [[0, 0], [11, 0], [10, 5], [3, 0], [0, 0], [2, 14], [0, 14], [7, 1]],
    "args": [0.3318135440349579, 0.44431284070014954, 2.0, 0.0],
    "lam": [0.6409040093421936, 0.4109756052494049, 0.7560296654701233, 0.02240109071135521],
    "box": [100, 141, 495, 609],
    "sums": [2455551, 675451, 495, 8299],
}


def test_the_plan_never_changes():
    """Golden: a run that one version of the code began must see the same data when the next version resumes it. If
    this has to change, raise PLAN_VERSION."""
    rows = TrainPlan(fake_index(5000), AugmentConfig(), seed=3, global_batch=1024, image_size=224, fill=(0, 0, 0)).rows(
        7 * 1024, 8 * 1024
    )
    assert PLAN_VERSION == 1
    assert rows.sample[:5].tolist() == GOLDEN["sample"]
    assert rows.crop[:2].tolist() == GOLDEN["crop"]
    assert rows.ops[:8].tolist() == GOLDEN["ops"]
    assert np.allclose(rows.args[rows.ops > 0][:4], GOLDEN["args"], rtol=1e-6)
    assert np.allclose(rows.lam[::128][:4], GOLDEN["lam"], rtol=1e-6)
    assert rows.box[::128].sum(0).tolist() == GOLDEN["box"]
    sums = [int(rows.sample.sum()), int(rows.crop.sum()), int(rows.flip.sum()), int(rows.ops.sum())]
    assert sums == GOLDEN["sums"]


def test_a_group_has_one_mixing_draw_and_groups_differ():
    plan = make_plan().rows(0, 1280)
    lam, box = plan.lam.reshape(-1, 16), plan.box.reshape(-1, 16, 4)
    assert (lam == lam[:, :1]).all() and (box == box[:, :1]).all()
    assert len(np.unique(lam[:, 0])) > 70


def test_copies_are_augmented_differently():
    plan = make_plan(num_samples=1280).rows(0, 1280)
    augmented = np.column_stack([plan.sample, plan.crop, plan.flip, plan.ops, plan.args])
    # images so long that only the fallback crop is left may be shown twice alike
    assert len(np.unique(augmented, axis=0)) > 0.99 * len(augmented)


def test_seeds_and_epochs_differ():
    a, b = make_plan(seed=0), make_plan(seed=1)
    epoch = a.steps_per_epoch * 128
    shown = [a.rows(0, epoch), a.rows(epoch, 2 * epoch), b.rows(0, epoch), b.rows(epoch, 2 * epoch)]
    assert len({plan.sample.tobytes() for plan in shown}) == 4
    assert len({plan.crop.tobytes() for plan in shown}) == 4


def test_describe_changes_with_everything_the_plan_depends_on():
    base = make_plan()
    others = [
        make_plan(num_samples=1001),
        make_plan(global_batch=256),
        make_plan(seed=1),
        make_plan(augment=dataclasses.replace(SMALL, flip=0.4)),
        make_plan(augment=dataclasses.replace(SMALL, three_augment=True)),
        make_plan(augment=dataclasses.replace(SMALL, color_jitter=0.3)),
        make_plan(augment=dataclasses.replace(SMALL, erase_prob=0.25)),
        dataclasses.replace(base, window_shards=16),
        dataclasses.replace(base, image_size=32),
        dataclasses.replace(base, image_size=((0, 64), (1, 32))),
        dataclasses.replace(base, fill=(0, 0, 0)),
    ]
    assert all(other.describe() != base.describe() for other in others)
    assert make_plan().describe() == base.describe()


def test_what_is_switched_on_leaves_all_the_rest_as_it_was():
    on = dataclasses.replace(SMALL, three_augment=True, color_jitter=0.4, erase_prob=0.5)
    bare, more = make_plan().rows(256, 640), make_plan(augment=on).rows(256, 640)
    assert more.ops.shape == more.args.shape == (384, 6)
    cut = dataclasses.replace(more, ops=more.ops[:, :2], args=more.args[:, :2], erase=bare.erase)
    assert_same_rows(bare, [cut])
    assert 120 < more.erase.any(1).sum() < 264 and not bare.erase.any()
    assert_same_rows(more, list(more.split(32)))
    assert_same_rows(more, [make_plan(augment=on).rows(start, start + 48) for start in range(256, 640, 48)])


GOLDEN_MORE = {
    "ops": [[16, 9, 8, 10], [8, 8, 10, 9], [16, 9, 8, 10]],
    "args": [[0.2598581, 1.3473735, 0.805068, 0.6386502], [0.0, 0.6655276, 0.7571012, 1.3128132]],
    "erase": [[92, 15, 81, 144], [77, 150, 111, 36], [43, 126, 96, 51], [48, 56, 44, 103]],
    "sums": [37862, 163276],
}


def test_what_came_later_never_changes_either():
    config = AugmentConfig(randaugment_ops=0, three_augment=True, color_jitter=0.4, erase_prob=0.5)
    rows = TrainPlan(fake_index(5000), config, seed=3, global_batch=1024, image_size=224, fill=(0, 0, 0)).rows(
        7 * 1024, 8 * 1024
    )
    assert rows.ops[:3].tolist() == GOLDEN_MORE["ops"]
    assert np.allclose(rows.args[:2], GOLDEN_MORE["args"], rtol=1e-6)
    assert rows.erase[:4].tolist() == GOLDEN_MORE["erase"]
    assert [int(rows.ops.sum()), int(rows.erase.sum())] == GOLDEN_MORE["sums"]


def test_erased_boxes_follow_the_image_size():
    plan = make_plan(augment=dataclasses.replace(SMALL, erase_prob=1.0))
    for size in (32, 256):
        box = dataclasses.replace(plan, image_size=size).rows(0, 640).erase
        assert size / 2 < (box[:, :2] + box[:, 2:]).max() <= size


SIZES = ((0, 32), (2, 48), (3, 64))


def test_the_image_size_follows_its_schedule():
    plan = dataclasses.replace(make_plan(), image_size=SIZES)
    epoch = plan.steps_per_epoch * 128
    for number, size in enumerate((32, 32, 48, 64, 64, 64)):
        rows = plan.rows(number * epoch, (number + 1) * epoch)
        constant = dataclasses.replace(plan, image_size=size)
        assert rows.image_size == size
        # crops, operations and mixing boxes are those of a plan of that size alone
        assert_same_rows(rows, [constant.rows(number * epoch, (number + 1) * epoch)])
        assert (rows.box[:, :2] + rows.box[:, 2:]).max() == size and (rows.resize == size).all()


def test_a_range_of_one_size_may_span_epochs_and_of_two_sizes_may_not():
    plan = dataclasses.replace(make_plan(), image_size=SIZES)
    epoch = plan.steps_per_epoch * 128
    assert plan.rows(epoch - 16, epoch + 16).image_size == 32
    assert plan.rows(3 * epoch, 9 * epoch).image_size == 64
    for start, stop in ((2 * epoch - 16, 2 * epoch + 16), (0, 4 * epoch), (3 * epoch - 16, 8 * epoch)):
        with pytest.raises(ValueError, match=r"are of two image sizes; ask for each epoch alone"):
            plan.rows(start, stop)


@pytest.mark.parametrize("micro_batch", [16, 64])
def test_no_plan_of_a_rank_spans_two_sizes(micro_batch):
    plan = dataclasses.replace(make_plan(), image_size=SIZES)
    steps = plan.steps_per_epoch
    for rank in (0, 1):
        plans = list(rank_plans(plan, 0, 5 * steps, World(rank, 2, 2, None), micro_batch))
        expected = [plan.image_size_at(part.position // 128 // steps) for part in plans]
        assert [part.image_size for part in plans] == expected
        assert sorted(set(expected)) == [32, 48, 64]


def test_a_schedule_of_one_size_is_described_as_that_size():
    plan = make_plan()
    assert dataclasses.replace(plan, image_size=((0, 64),)).describe() == plan.describe()
    assert dataclasses.replace(plan, image_size=SIZES).describe()["image_size"] == [[0, 32], [2, 48], [3, 64]]


@pytest.mark.parametrize(
    "sizes", [(), ((5, 96), (0, 64)), ((1, 64),), ((0, 64), (5, 96), (5, 128)), ((0, 64), (5, 0)), 0, 4097]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match=r"^image_size is [\d\[].*; it must be a size from 1 to 4096, or \[epoch, size"):
        dataclasses.replace(make_plan(), image_size=sizes)


def test_a_dataset_smaller_than_one_global_batch_is_refused():
    with pytest.raises(UserError, match="has 100 images, fewer than one global batch of 128: lower it"):
        make_plan(num_samples=100)


def test_a_global_batch_of_broken_groups_is_refused():
    with pytest.raises(UserError, match="^global_batch is 100; it must be a multiple of augment.mix_group, 16"):
        make_plan(global_batch=100)


def test_positions_are_whole_groups():
    with pytest.raises(ValueError, match="not whole groups of 16"):
        make_plan().rows(8, 24)


def test_evaluation_shows_each_image_once_in_order():
    index = fake_index(103)
    plan = EvalPlan(index, 64, 0.95, "bicubic")
    for ranks in (1, 2, 3):
        shown = []
        for start in range(0, -(-103 // (8 * ranks)) * 8 * ranks, 8):
            rows = plan.rows(start, start + 8)
            assert len(rows) == 8
            shown += rows.sample[rows.valid].tolist()
        assert shown == list(range(103))


def test_evaluation_geometry_is_timms():
    """Against the sizes that torchvision's Resize and CenterCrop compute."""
    from torchvision.transforms.functional import _compute_resized_output_size

    index = fake_index(500)
    rows = EvalPlan(index, 224, 0.95, "bicubic").rows(0, 500)
    for i, (height, width) in enumerate(zip(index.samples["height"], index.samples["width"], strict=True)):
        expected = _compute_resized_output_size((int(height), int(width)), [235])
        assert rows.resize[i].tolist() == list(expected)
        top, left = (int(round((side - 224) / 2.0)) for side in expected)
        assert rows.window[i].tolist() == [top, left]


def test_evaluation_resizes_the_middle_alone_of_an_image_that_is_very_long():
    index = fake_index(4)
    index.samples["height"], index.samples["width"] = [1, 65_500, LONGEST, 7], [65_500, 2, 1, 7 * LONGEST + 1]
    rows = EvalPlan(index, 224, 0.95, "bicubic").rows(0, 4)
    assert rows.crop.tolist() == [[0, 32_700, 1, 100], [32_650, 0, 200, 2], [0, 0, 100, 1], [0, 0, 7, 700]]
    assert (rows.resize.max(axis=1) == 235 * LONGEST).all() and (rows.resize.min(axis=1) == 235).all()
    squashed = EvalPlan(index, 224, 0.95, "bicubic", "squash").rows(0, 4)
    assert squashed.crop[0].tolist() == [0, 0, 1, 65_500] and (squashed.resize == 235).all()
