"""The device's memory: what an update holds, and what `run.micro_batch auto` leaves for the rest of a run."""

import gc

import pytest
import torch

from gpu_stub.runs import GPU, built, teacher_file, updates
from gpu_stub.stand_in import DeviceMemory
from pipelines.dali import DaliPipeline, _Shape
from pipelines.index import ShardIndex
from pipelines.synthetic import SyntheticPipeline, synthetic_index
from trainer import metrics, run
from trainer.data import Pipelines
from trainer.step import gray_batch

MIB = 1 << 20
DEVICE_MIB, GRAPH_MIB = 450, 60
SETTINGS = {
    "student.name": "test_resnet",
    "data.image_size": "[[0,64],[1,96]]",
    "run.global_batch": 256,
    "run.micro_batch": "auto",
    "run.eval_batch": 32,
}


def test_what_teachers_see_is_gone_before_the_backward_pass(tmp_path):
    """A batch of 16 images of 96 pixels is 0.9 MB to each of them. Their logits stay, and what is said of them."""
    teacher = {"teacher.name": "tiny_cnn", "teacher.checkpoint": teacher_file(tmp_path)}
    others = f"[{{name: tiny_cnn, checkpoint: {teacher['teacher.checkpoint']}, image_size: 64}}]"
    batch, held = gray_batch(16, 96, 16, GPU.device), []
    for number, settings in enumerate(({}, teacher, {**teacher, "teacher.others": others})):
        run = built(tmp_path / str(number), {**settings, "data.image_size": 96, "data.eval_image_size": 96})
        run.step._loss(batch)  # cuBLAS takes its workspace
        before = torch.cuda.memory_allocated()
        loss = run.step._loss(batch)
        held.append(torch.cuda.memory_allocated() - before)
        del loss
    assert held[0] > 16 * 96 * 96 * 3 * 2 and max(held) - held[0] < 32 << 10, held


class LikeDali(SyntheticPipeline):
    """Batches behind a graph that takes memory outside of torch, from the first batch on until it is forgotten."""

    def __init__(self, index: ShardIndex):
        super().__init__(index, device=GPU.device)
        self.graph: DeviceMemory | None = None

    def forget(self) -> None:
        self.graph = None

    def batches(self, plans):
        if self.graph is None:
            torch.cuda.empty_cache()
            self.graph = DeviceMemory(GRAPH_MIB * MIB)
        yield from super().batches(plans)


@pytest.fixture
def like_dali(monkeypatch) -> dict[str, "LikeDali"]:
    """A training and a validation split on a small device; nothing is made of what a model predicts."""
    gc.collect()
    torch.cuda.empty_cache()
    monkeypatch.setenv("CUDA_STUB_MIB", str(DEVICE_MIB))
    index = synthetic_index(256, 10)
    val = synthetic_index(64, 10)
    monkeypatch.setattr(run, "open_indices", lambda config: (index, val))
    monkeypatch.setattr(metrics, "joined", lambda parts, num_samples: None)
    monkeypatch.setattr(metrics, "accuracy", lambda predictions: {"top1": 0.0})
    pipelines = {}

    def opened(config, indices, world):
        real = real_open(config, indices, world)
        pipelines.update({split: LikeDali(each) for split, each in indices.items()})
        return Pipelines(pipelines, real.quarantine, real.decode)

    real_open = run.open_pipelines
    monkeypatch.setattr(run, "open_pipelines", opened)
    return pipelines


def test_a_run_whose_micro_batch_was_searched_has_room_for_its_evaluation(like_dali, tmp_path):
    """The graphs of both splits stay once they are built, so an update has to fit beside them."""
    found = built(tmp_path / "run", SETTINGS)
    assert 16 < found.state.micro_batch < 256  # the search had something to find
    assert not any(pipeline.graph for pipeline in like_dali.values())
    assert all(module.training for module in found.state.student.modules())
    for first in (0, found.plan.steps_per_epoch):  # of the smaller and of the larger size
        (batches,) = updates(found, first, first + 1)
        found.step(iter(batches), first)
        found.evaluate()
        found.step(iter(batches), first)
    assert all(pipeline.graph for pipeline in like_dali.values())


def test_the_search_takes_the_largest_that_fits(like_dali, tmp_path):
    found = built(tmp_path / "run", SETTINGS)
    settings = {**SETTINGS, "run.micro_batch": 2 * found.state.micro_batch, "data.image_size": 96}
    too_large = built(tmp_path / "other", settings)
    like_dali["val"].graph = DeviceMemory(GRAPH_MIB * MIB)
    (batches,) = updates(too_large, 0, 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        too_large.step(iter(batches), 0)


def test_a_graph_of_dali_is_built_beside_an_empty_cache(monkeypatch, photos):
    """What torch keeps for itself is as much as taken for DALI, which allocates on its own."""
    reserved = []

    class Built:
        def __init__(self, *_, **__):
            reserved.append(torch.cuda.memory_reserved())

        def build(self) -> None:
            """The rest takes a device."""

    monkeypatch.setattr("pipelines.dali._dali_graph", Built)
    options = {"threads": 1, "prefetch": 1, "decode": "roi", "hw_decoder_load": 0.0, "decoder_padding_mib": 1}
    pipeline = DaliPipeline(photos, device=GPU.device, **options, on_bad=lambda *_: None)
    free = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    del free
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= 64 * MIB
    pipeline._build(_Shape(16, 224, "bicubic", False))
    assert reserved[0] - torch.cuda.memory_allocated() < 32 * MIB  # what is left of segments that are in use
