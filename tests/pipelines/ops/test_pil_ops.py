"""The reference's stages against timm, torchvision and PIL."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, Grayscale
from torchvision.transforms.functional import hflip

from pipelines.ops.pil_ops import apply_op, decode, transform
from pipelines.plan.draws import AugmentConfig, Op
from pipelines.plan.plan import EvalPlan
from pipelines.shards.damage import decode_with_pil
from pipelines.shards.reader import ShardReader
from support.executors import difference, pixels, train_plan


def assert_nearly_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Torch's resize and PIL's round the weights of the filter to other numbers of bits."""
    diff = difference(ours, theirs)
    assert diff.max() <= 2 and diff.mean() <= 0.02, (diff.max(), diff.mean())


def test_training_crops_equal_timms_crop_of_the_same_box(photos, monkeypatch):
    plan = train_plan(photos).rows(0, 10)
    ours = pixels("torchvision", photos, [plan])
    timms = RandomResizedCropAndInterpolation(96, interpolation="bicubic")
    for row, jpeg in enumerate(ShardReader(photos).read(plan.sample)):
        box = tuple(plan.crop[row].tolist())
        monkeypatch.setattr(timms, "get_params", lambda *_, box=box: box)
        expected = timms(decode_with_pil(jpeg))
        if plan.flip[row]:
            expected = hflip(expected)
        assert_nearly_equal(ours[row], np.asarray(expected))


def test_jpegs_are_decoded_to_pils_pixels_and_other_images_too(photos):
    for jpeg in ShardReader(photos).read(np.arange(10)):
        assert np.array_equal(decode(jpeg), np.asarray(decode_with_pil(jpeg)))
    png = io.BytesIO()
    decode_with_pil(jpeg).save(png, "PNG")
    assert np.array_equal(decode(np.frombuffer(png.getvalue(), np.uint8)), decode(jpeg))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_timms_transform(photos, interpolation):
    ours = pixels("torchvision", photos, [EvalPlan(photos, 224, 0.95, interpolation).rows(0, 10)])
    timms = create_transform(224, is_training=False, interpolation=interpolation, crop_pct=0.95, normalize=False)
    for row, jpeg in enumerate(ShardReader(photos).read(np.arange(10))):
        expected = timms(decode_with_pil(jpeg)).permute(1, 2, 0).numpy()
        assert_nearly_equal(ours[row], expected)


TIMM_ARGUMENTS = [
    (Op.AUTO_CONTRAST, "AutoContrast", None),
    (Op.EQUALIZE, "Equalize", None),
    (Op.INVERT, "Invert", None),
    (Op.ROTATE, "Rotate", -21.25),
    (Op.POSTERIZE, "PosterizeIncreasing", 2),
    (Op.SOLARIZE, "SolarizeIncreasing", 77),
    (Op.SOLARIZE_ADD, "SolarizeAdd", 80),
    (Op.COLOR, "ColorIncreasing", 1.625),
    (Op.CONTRAST, "ContrastIncreasing", 0.375),
    (Op.BRIGHTNESS, "BrightnessIncreasing", 1.5),
    (Op.SHARPNESS, "SharpnessIncreasing", 0.25),
    (Op.SHEAR_X, "ShearX", 0.21875),
    (Op.SHEAR_Y, "ShearY", -0.1875),
    (Op.TRANSLATE_X, "TranslateXRel", 0.3125),
    (Op.TRANSLATE_Y, "TranslateYRel", -0.28125),
]


@pytest.mark.parametrize(("op", "name", "arg"), TIMM_ARGUMENTS, ids=[name for _, name, _ in TIMM_ARGUMENTS])
def test_each_operation_is_timms(photos, op, name, arg):
    image = decode_with_pil(ShardReader(photos).read(np.array([0]))[0]).resize((96, 96))
    fill = (124, 116, 104)
    arguments = () if arg is None else (arg,)
    expected = NAME_TO_OP[name](image, *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC)
    ours = apply_op(image, op, float(np.float32(arg or 0.0)), fill)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))
    assert not np.array_equal(np.asarray(ours), np.asarray(image))


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    return decode_with_pil(ShardReader(photos).read(np.array([0]))[0]).resize((96, 96))


@pytest.mark.parametrize(
    ("op", "arg", "theirs"),
    [
        (Op.COLOR, 0.0, Grayscale(3)),
        (Op.SOLARIZE, 128.0, ImageOps.solarize),
        (Op.GAUSSIAN_BLUR, 0.1, lambda image: image.filter(ImageFilter.GaussianBlur(0.1))),
        (Op.GAUSSIAN_BLUR, 1.375, lambda image: image.filter(ImageFilter.GaussianBlur(1.375))),
    ],
    ids=["grayscale", "solarize", "hardly blurred", "blurred"],
)
def test_three_augments_are_torchvisions_and_pils(photo, op, arg, theirs):
    ours = apply_op(photo, op, float(np.float32(arg)), (124, 116, 104))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs(photo)))


def test_colour_jitter_equals_torchvisions_with_the_same_factors(photos, monkeypatch):
    plan = train_plan(photos, AugmentConfig(mix_group=5, randaugment_ops=0, color_jitter=0.4)).rows(0, 10)
    bare = dataclasses.replace(plan, ops=plan.ops[:, :0], args=plan.args[:, :0])
    numbers = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]
    theirs = ColorJitter(0.4, 0.4, 0.4)
    for row, jpeg in enumerate(ShardReader(photos).read(plan.sample)):
        ops, args = plan.ops[row].tolist(), plan.args[row].tolist()
        params = torch.tensor([numbers.index(op) for op in ops]), *(args[ops.index(op)] for op in numbers), None
        monkeypatch.setattr(theirs, "get_params", lambda *_, params=params: params)
        image = decode(jpeg)
        expected = theirs(Image.fromarray(transform(image, bare, row)))
        assert np.array_equal(transform(image, plan, row), np.asarray(expected))


def test_erasing_fills_its_box_at_last_with_the_colour_that_normalises_to_nothing(photos):
    config = AugmentConfig(mix_group=5, erase_prob=1.0, color_jitter=0.4)
    plan = train_plan(photos, config).rows(0, 10)
    ours = pixels("torchvision", photos, [plan])
    expected = pixels("torchvision", photos, [dataclasses.replace(plan, erase=np.zeros_like(plan.erase))])
    for row, (top, left, height, width) in enumerate(plan.erase.tolist()):
        assert height and width
        assert not np.array_equal(ours[row], expected[row])
        expected[row, top : top + height, left : left + width] = plan.fill
    assert np.array_equal(ours, expected)
    # timm erases to 0 after normalisation; the nearest uint8 pixel is half a level off at most.
    normalised = (np.array(plan.fill) / 255 - np.array(IMAGENET_DEFAULT_MEAN)) / np.array(IMAGENET_DEFAULT_STD)
    assert abs(normalised).max() < 0.5 / 255 / min(IMAGENET_DEFAULT_STD)
