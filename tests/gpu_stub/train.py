"""trainer/run.py on the stand-in, with the same arguments.

Kernels do nothing, so fresh memory stays zero (PYTORCH_NO_CUDA_MEMORY_CACHING sees to it that memory is fresh), and all
that is computed is zero. What cannot do with zeros is done on the host. NCCL looks for a device of its own: Gloo takes
its place.
"""

import sys
from pathlib import Path

sys.path[:1] = [str(parent) for parent in Path(__file__).resolve().parents[1:3]]
import pipelines  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)
from gpu_stub.build import leave_out_cudnn  # noqa: E402

leave_out_cudnn()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import support.tiny_model  # noqa: E402, F401  (registers the student)
from trainer import run  # noqa: E402
from trainer.cluster import rendezvous  # noqa: E402
from trainer.cluster import world as distributed  # noqa: E402
from trainer.evaluation import metrics  # noqa: E402
from trainer.monitor.report import page  # noqa: E402


def connect_by_gloo(store, rank: int, size: int, device, seconds: float) -> None:
    how = {"timeout": rendezvous.COLLECTIVE_TIMEOUT, "device_id": device}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, **how)


def broadcast_object(world: distributed.World, value):
    """By way of the host: torch cuts an object out of its bytes with kernels."""
    chosen = [value]
    if world.size > 1:
        dist.broadcast_object_list(chosen, device=torch.device("cpu"))
    return chosen[0]


def joined_by_place(parts: list[metrics.Predictions], num_samples: int) -> metrics.Predictions:
    """As many predictions as images, all zero."""
    zeros = np.zeros(num_samples, np.int64)
    return metrics.Predictions(zeros, zeros, zeros[:, None], zeros.astype(np.float32), zeros.astype(np.float32))


distributed.World.broadcast_object = broadcast_object
rendezvous.connect = connect_by_gloo
metrics.joined = joined_by_place
page.draw = lambda chart: b""  # The report gets empty pictures: to draw them takes as long as the run.
run.main()
