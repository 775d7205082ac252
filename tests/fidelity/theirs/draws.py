"""Draws by timm 0.5.4 for images and batches; Python's, numpy's and torch's generators are seeded."""

import random

import arguments
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import FastCollateMixup, cutmix_bbox_and_lam
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomHorizontalFlip


def run(given: dict) -> dict:
    """Return the draws; all arrays have one row a draw, in order.

    Args:
      given: count, seed, sizes int64 [n, 2] (height, width of images), side of CutMix's images.
    Returns:
      crops int64 [n, count, 4] (top, left, height, width); flips bool [count]; names str [15] of the operations; ops
      int64 [count, 2], 1 + the number of an operation in names, those that were applied first, 0 for none; args
      float64 [count, 2]; cutmix bool [count]; lam float64 [count]; box int64 [count, 4], empty for mixup.
    """
    count, args = int(given["count"]), arguments.defaults()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(int(given["seed"]))
    crops = []
    for height, width in given["sizes"].tolist():
        image = Image.new("L", (width, height))
        params = RandomResizedCropAndInterpolation.get_params
        crops.append([params(image, args.scale, args.ratio) for _ in range(count)])
    flip, image = RandomHorizontalFlip(args.hflip), Image.fromarray(np.array([[0, 255]], np.uint8))
    flips = [flip(image).getpixel((0, 0)) == 255 for _ in range(count)]
    return {"crops": np.array(crops), "flips": np.array(flips), **_operations(count, args.aa), **_mixes(count, given)}


def _operations(count: int, policy: str) -> dict:
    """Record the operations that RandAugment applies: their functions are replaced by one that takes notes."""
    transform, applied = rand_augment_transform(policy, {"img_mean": (124, 116, 104)}), []
    for number, op in enumerate(transform.ops, start=1):
        op.aug_fn = lambda image, *args, number=number, **_: applied.append((number, *args[:1])) or image
    ops, args = np.zeros((count, 2), np.int64), np.zeros((count, 2))
    for row in range(count):
        applied.clear()
        transform(None)
        for column, (number, *arg) in enumerate(applied):
            ops[row, column] = number
            args[row, column] = arg[0] if arg else 0.0
    return {"names": np.array([op.name for op in transform.ops]), "ops": ops, "args": args}


def _mixes(count: int, given: dict) -> dict:
    mixup, side = FastCollateMixup(**arguments.mixing()), int(given["side"])
    cutmix, lam, box = np.zeros(count, bool), np.zeros(count), np.zeros((count, 4), np.int64)
    for row in range(count):
        lam[row], cutmix[row] = mixup._params_per_batch()
        if cutmix[row]:
            (top, bottom, left, right), lam[row] = cutmix_bbox_and_lam((128, 3, side, side), lam[row])
            box[row] = top, left, bottom - top, right - left
    return {"cutmix": cutmix, "lam": lam, "box": box}
