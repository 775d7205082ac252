"""Batches to be mixed, and the kernel that mixes them held to torch.

Kept apart so that the script that interprets the kernel need import neither timm nor the trainer's tests.
"""

import itertools

import torch

from pipelines.batch import Batch
from trainer.models.normalize import Normalize
from trainer.update.mixing import mixed_inputs


def mixed_batch(size: int, mix_group: int, device: str = "cpu") -> Batch:
    """24 images: CutMix in the first group, mixup in the others, some of it with lambda 1/2."""
    generator = torch.Generator().manual_seed(size)
    lam = torch.rand(24, generator=generator)
    lam[-4:] = 0.5
    box = torch.zeros(24, 4, dtype=torch.int32)
    box[:8] = torch.tensor([1, 0, size // 2, size - 1])
    return Batch(
        images=torch.randint(0, 256, (24, size, size, 3), dtype=torch.uint8, generator=generator).to(device),
        labels=torch.zeros(24, dtype=torch.int64, device=device),
        lam=lam.to(device),
        box=box.to(device),
        valid=torch.ones(24, dtype=torch.bool, device=device),
        position=0,
        mix_group=mix_group,
    )


def assert_kernel_equals_torch(device: str, sizes: tuple[int, ...], tolerances: dict[torch.dtype, float]) -> None:
    for size, mix_group, (dtype, tolerance) in itertools.product(sizes, (0, 8), tolerances.items()):
        batch = mixed_batch(size, mix_group, device)
        values = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.5,) * 3)
        models = [Normalize(*each, dtype).to(device) for each in values]
        ours, theirs = (mixed_inputs(batch, models, kernel=kernel) for kernel in (True, False))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == dtype and a.shape == b.shape and a.stride() == b.stride()
            assert a.untyped_storage().nbytes() == a.nbytes  # one that is kept keeps no other
            assert (a.float() - b.float()).abs().max() <= tolerance, (size, mix_group, dtype)
