"""Which images timm 0.5.4's samplers give to which rank."""

from unittest import mock

import numpy as np
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data.distributed import DistributedSampler

SAMPLERS = {"repeated": RepeatAugSampler, "plain": DistributedSampler, "ordered": OrderedDistributedSampler}


def run(given: dict) -> dict:
    """Return for each case its samples, int64 [ranks, samples], and `lengths`, int64 [8, counts].

    Args:
      given: cases str [n], "KIND IMAGES RANKS" with a kind of SAMPLERS; for each number of images that occurs there
        `order IMAGES`, int64 [images], which stands in for the epoch's random permutation; counts int64 [n].
    Returns:
      lengths: the number of samples that RepeatAugSampler gives to one of 1 to 8 ranks, for each count of images.
    """
    found = {case: _samples(*case.split(), given) for case in given["cases"].tolist()}
    for_ranks = [[len(RepeatAugSampler(range(n), ranks, 0)) for n in given["counts"]] for ranks in range(1, 9)]
    return {**found, "lengths": np.array(for_ranks)}


def _samples(kind: str, images: str, ranks: str, given: dict) -> np.ndarray:
    order = torch.from_numpy(given[f"order {images}"])
    with mock.patch("torch.randperm", lambda n, generator=None: order):
        samplers = [SAMPLERS[kind](range(len(order)), int(ranks), rank) for rank in range(int(ranks))]
        return np.array([list(sampler) for sampler in samplers])
