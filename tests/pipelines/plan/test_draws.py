"""The draws have the distributions of timm's own classes, as installed."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_augment
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter

from pipelines.common.errors import UserError
from pipelines.plan import draws, rng
from pipelines.plan.draws import AugmentConfig, Op
from pipelines.plan.rng import Stream

USI = AugmentConfig()
DRAWS = 20_000


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (224, 224), (100, 900), (640, 90)])
def test_crops_are_distributed_as_timms(height, width):
    u = rng.uniforms(1, Stream.CROP, 0, DRAWS, draws.CROP_DRAWS)
    ours = draws.resized_crops(u, np.full(DRAWS, height), np.full(DRAWS, width), USI)
    random.seed(1)
    image = Image.new("RGB", (width, height))
    timms = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)]
    for column, theirs in zip(ours.T, np.array(timms).T, strict=True):
        assert same_distribution(column, theirs)
    assert same_distribution(ours[:, 2] * ours[:, 3], np.array(timms)[:, 2] * np.array(timms)[:, 3])


def test_crops_lie_inside_images_of_any_size():
    generator = np.random.default_rng(0)
    heights, widths = generator.integers(1, 3000, (2, DRAWS))
    heights[:100], widths[:100] = 1, 1
    heights[100:200], widths[200:300] = 1, 2
    u = rng.uniforms(2, Stream.CROP, 0, DRAWS, draws.CROP_DRAWS)
    top, left, height, width = draws.resized_crops(u, heights, widths, USI).T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()


def test_the_fallback_crop_is_timms():
    # no try fits: every aspect drawn is far from the image's
    u = np.full((1, draws.CROP_DRAWS), 0.999)
    for height, width, expected in [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))]:
        crop = draws.resized_crops(u, np.array([height]), np.array([width]), USI)
        assert tuple(crop[0]) == expected


def test_half_of_the_images_are_flipped():
    u = rng.uniforms(3, Stream.CROP, 0, DRAWS, draws.CROP_DRAWS)
    assert stats.binomtest(int(draws.flips(u, USI).sum()), DRAWS, 0.5).pvalue > 1e-3


# timm's name of each of our operations, in its increasing series
TIMM_NAMES = {
    "AutoContrast": Op.AUTO_CONTRAST,
    "Equalize": Op.EQUALIZE,
    "Invert": Op.INVERT,
    "Rotate": Op.ROTATE,
    "PosterizeIncreasing": Op.POSTERIZE,
    "SolarizeIncreasing": Op.SOLARIZE,
    "SolarizeAdd": Op.SOLARIZE_ADD,
    "ColorIncreasing": Op.COLOR,
    "ContrastIncreasing": Op.CONTRAST,
    "BrightnessIncreasing": Op.BRIGHTNESS,
    "SharpnessIncreasing": Op.SHARPNESS,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "TranslateXRel": Op.TRANSLATE_X,
    "TranslateYRel": Op.TRANSLATE_Y,
}


def timm_draws(policy: str, images: int) -> list[list[tuple[Op, float]]]:
    """What timm's RandAugment applies to each image, recorded where it would call the PIL function."""
    transform = timm_augment.rand_augment_transform(policy, {"img_mean": (124, 116, 104)})
    applied: list[tuple[Op, float]] = []
    for op in transform.ops:
        number = TIMM_NAMES[op.name]
        op.aug_fn = lambda image, *args, number=number, **_: applied.append((number, args[0] if args else 0.0)) or image
    drawn = []
    for _ in range(images):
        transform(None)
        drawn.append(applied.copy())
        applied.clear()
    return drawn


@pytest.mark.parametrize(("magnitude", "std"), [(7, 0.5), (9, 1.0)])
def test_randaugment_draws_as_timms_does(magnitude, std):
    random.seed(4)
    np.random.seed(4)
    timms = timm_draws(f"rand-m{magnitude}-mstd{std}-inc1", DRAWS)
    config = AugmentConfig(randaugment_magnitude=magnitude, randaugment_std=std)
    u = rng.uniforms(4, Stream.RANDAUGMENT, 0, DRAWS, draws.randaugment_draws(config))
    ops, args = draws.randaugment(u, config)
    # how many are applied to an image
    counts = [np.bincount(c, minlength=3) for c in ((ops > 0).sum(1), [len(applied) for applied in timms])]
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    # which ones
    timm_ops, timm_args = np.array([pair for applied in timms for pair in applied]).T
    frequencies = [np.bincount(o.astype(int), minlength=16)[1:] for o in (ops[ops > 0], timm_ops)]
    assert stats.chi2_contingency(frequencies).pvalue > 1e-3
    # and with which argument
    for op in TIMM_NAMES.values():
        ours, theirs = args[ops == op], timm_args[timm_ops == op].astype(np.float32)
        assert same_distribution(ours, theirs), op
        assert (np.sort(np.unique(np.sign(ours))) == np.sort(np.unique(np.sign(theirs)))).all(), op


def test_two_operations_of_an_image_are_drawn_independently():
    u = rng.uniforms(5, Stream.RANDAUGMENT, 0, DRAWS, draws.randaugment_draws(USI))
    ops, _ = draws.randaugment(u, USI)
    table = np.zeros((16, 16))
    np.add.at(table, (ops[:, 0], ops[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("strength", [0.3, 0.4, 1.5])
def test_colour_jitter_draws_as_torchvisions(strength):
    config = AugmentConfig(color_jitter=strength)
    ops, args = draws.color_jitters(rng.uniforms(9, Stream.COLOR_JITTER, 0, DRAWS, 4), config)
    torch.manual_seed(9)
    theirs = ColorJitter(strength, strength, strength)
    ranges = (theirs.brightness, theirs.contrast, theirs.saturation)
    drawn = [ColorJitter.get_params(*ranges, None) for _ in range(DRAWS)]
    numbers = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)  # torchvision's functions 0, 1 and 2; 3 is hue, which is off
    orders = np.array([[numbers[i] for i in order.tolist() if i < 3] for order, *_ in drawn])
    counts = []
    for order in itertools.permutations(numbers):
        counts.append([(ops == order).all(1).sum(), (orders == order).all(1).sum()])
    assert np.sum(counts) == 2 * DRAWS
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    for i, op in enumerate(numbers):
        assert same_distribution(args[ops == op], np.array([factors[i] for _, *factors in drawn], dtype=np.float32))
    assert abs(np.corrcoef(args, rowvar=False) - np.eye(3)).max() < 0.03
    assert args.min() >= max(0, 1 - strength) - 1e-6 and args.max() <= 1 + strength + 1e-6


def test_three_augment_chooses_one_of_three_evenly_and_blurs_by_a_uniform_radius():
    ops, args = draws.three_augments(rng.uniforms(10, Stream.THREE_AUGMENT, 0, DRAWS, 4))
    found, counts = np.unique(ops, return_counts=True)
    assert sorted(found) == sorted([Op.COLOR, Op.SOLARIZE, Op.GAUSSIAN_BLUR])
    assert stats.chisquare(counts).pvalue > 1e-3
    assert (args[ops == Op.COLOR] == 0).all() and (args[ops == Op.SOLARIZE] == 128).all()
    assert stats.kstest(args[ops == Op.GAUSSIAN_BLUR], "uniform", (0.1, 1.9)).pvalue > 1e-3


class Erased:
    """Stands for an image: notes the box that timm erases."""

    box = (0, 0, 0, 0)

    def __setitem__(self, key, value):
        _, rows, columns = key
        self.box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)


@pytest.mark.parametrize(("size", "probability"), [(224, 0.25), (32, 1.0), (5, 1.0)])
def test_boxes_are_erased_as_timm_does(size, probability):
    u = rng.uniforms(11, Stream.ERASE, 0, DRAWS, draws.ERASE_DRAWS)
    ours = draws.erasures(u, size, AugmentConfig(erase_prob=probability))
    random.seed(11)
    erasing = RandomErasing(probability, device="cpu")
    theirs = []
    for _ in range(DRAWS):
        image = Erased()
        erasing._erase(image, 3, size, size, torch.float32)
        theirs.append(image.box)
    theirs = np.array(theirs)
    theirs[theirs[:, 2] * theirs[:, 3] == 0] = 0
    counts = [[(box[:, 2] > 0).sum(), (box[:, 2] == 0).sum() + 1] for box in (ours, theirs)]
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    ours, theirs = ours[ours[:, 2] > 0], theirs[theirs[:, 2] > 0]
    for column, timms in zip(ours.T, theirs.T, strict=True):
        assert same_distribution(column, timms)
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all() and (ours[:, 2:] < size).all()


def test_an_image_too_small_for_a_box_keeps_its_pixels():
    u = rng.uniforms(12, Stream.ERASE, 0, 100, draws.ERASE_DRAWS)
    assert not draws.erasures(u, 1, AugmentConfig(erase_prob=1.0)).any()


def test_operations_are_randaugments_then_three_augments_then_colour_jitters():
    settings = {"randaugment_ops": 2, "three_augment": True, "color_jitter": 0.3}
    drawn = {}
    for name, value in settings.items():
        off = {"randaugment_ops": 0, "three_augment": False, "color_jitter": 0.0}
        drawn[name] = draws.operations(13, 40, 140, AugmentConfig(**{**off, name: value}))
    assert [ops.shape[1] for ops, _ in drawn.values()] == [2, 1, 3]
    ops, args = draws.operations(13, 40, 140, AugmentConfig(**settings))
    assert np.array_equal(ops, np.concatenate([ops for ops, _ in drawn.values()], axis=1))
    assert np.array_equal(args, np.concatenate([args for _, args in drawn.values()], axis=1))
    assert ops.dtype == np.uint8 and args.dtype == np.float32
    parts = [draws.operations(13, start, start + 20, AugmentConfig(**settings))[1] for start in range(40, 140, 20)]
    assert np.array_equal(args, np.concatenate(parts))
    none = draws.operations(13, 40, 140, AugmentConfig(randaugment_ops=0))
    assert [part.shape for part in none] == [(100, 0), (100, 0)]


def test_mixes_are_distributed_as_timms():
    size = 224
    u = rng.uniforms(6, Stream.MIX, 0, DRAWS, draws.MIX_DRAWS)
    lam, box = draws.mixes(u, size, USI)
    np.random.seed(6)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    timm_mixup, timm_cutmix = [], []
    for _ in range(DRAWS):
        value, use_cutmix = mixup._params_per_batch()
        if use_cutmix:
            (top, bottom, left, right), value = cutmix_bbox_and_lam((1, 3, size, size), value, correct_lam=True)
            timm_cutmix.append((top, left, bottom - top, right - left, value))
        else:
            timm_mixup.append(value)
    cutmix = box[:, 2] > 0
    # our CutMix with an empty box counts as mixup with lam 1
    table = [[cutmix.sum(), DRAWS - cutmix.sum()], [sum(b[2] * b[3] > 0 for b in timm_cutmix), 0]]
    table[1][1] = DRAWS - table[1][0]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert same_distribution(lam[~cutmix & (lam < 1)], np.array(timm_mixup))
    theirs = np.array([b for b in timm_cutmix if b[2] * b[3] > 0])
    for column, timm_column in zip(np.column_stack([box, lam])[cutmix].T, theirs.T, strict=True):
        assert same_distribution(column, timm_column)


def test_cutmix_lambda_is_the_boxes_true_area():
    u = rng.uniforms(7, Stream.MIX, 0, 1000, draws.MIX_DRAWS)
    lam, box = draws.mixes(u, 96, AugmentConfig(mixup_alpha=0))
    assert np.allclose(lam, 1 - box[:, 2] * box[:, 3] / 96**2, atol=1e-7)
    assert (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= 96).all()


@pytest.mark.parametrize(
    "off", [{"mix_prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}], ids=["probability", "alphas"]
)
def test_mixing_can_be_switched_off(off):
    lam, box = draws.mixes(rng.uniforms(8, Stream.MIX, 0, 100, draws.MIX_DRAWS), 32, AugmentConfig(**off))
    assert (lam == 1).all() and not box.any()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 8.0])
def test_beta_quantiles_are_exact(alpha):
    u = np.concatenate([np.linspace(0, 1, 10_001)[:-1], [1e-12, 1 - 1e-12]])
    assert abs(draws.beta_quantile(u, alpha) - stats.beta.ppf(u, alpha, alpha)).max() < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix_group": 0}, "augment.mix_group is 0"),
        ({"flip": 1.5}, "augment.flip is 1.5; it must lie in"),
        ({"crop_area": (0.5, 0.1)}, "augment.crop_area"),
        ({"crop_area": (0.5, 2.0)}, "augment.crop_area"),
        ({"interpolation": "nearest"}, "augment.interpolation is 'nearest'; it must be one of bicubic"),
        ({"randaugment_magnitude": 11}, "augment.randaugment_magnitude is 11"),
        ({"color_jitter": -0.1}, "augment.color_jitter is -0.1; it must lie in"),
        ({"erase_prob": 25}, "augment.erase_prob is 25; it must lie in"),
        ({"mixup_alpha": -1}, "augment.mixup_alpha is -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AugmentConfig(**settings)
