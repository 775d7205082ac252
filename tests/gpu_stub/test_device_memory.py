"""The device's memory: what an update holds, and what `run.micro_batch auto` leaves for the rest of a run."""

import contextlib
import dataclasses
import gc
import itertools

import pytest
import torch

from gpu_stub.runs import GPU, arguments, built, teacher_file
from gpu_stub.stand_in import DeviceMemory
from pipelines.common.errors import UserError
from pipelines.shards.index import ShardIndex, synthetic_index
from pipelines.synthetic import SyntheticPipeline
from trainer import builder
from trainer.builder import Run, build
from trainer.config.sections import parse
from trainer.evaluation import metrics
from trainer.evaluation.predict import EvalPass
from trainer.feed import Pipelines, rank_plans
from trainer.update.step import TrainStep, gray_batch

MIB = 1 << 20
DEVICE_MIB, GRAPH_MIB = 450, 60
SETTINGS = {
    "student.name": "test_resnet",
    "data.image_size": "[[0,64],[1,96]]",
    "run.global_batch": 256,
    "run.micro_batch": "auto",
    "run.eval_batch": 32,
}


def test_what_teachers_see_is_gone_when_the_student_begins(tmp_path):
    """A batch of 16 images of 96 pixels is 0.9 MB to each of them. Their logits stay."""
    teacher = {"teacher.name": "tiny_cnn", "teacher.checkpoint": teacher_file(tmp_path)}
    others = f"[{{name: tiny_cnn, checkpoint: {teacher['teacher.checkpoint']}, image_size: 64}}]"
    batch, held = gray_batch(16, 96, 16, GPU.device), []
    for number, settings in enumerate(({}, teacher, {**teacher, "teacher.others": others})):
        run = built(tmp_path / str(number), {**settings, "data.image_size": 96, "data.eval_image_size": 96})
        run.step._forward(batch)  # cuBLAS takes its workspace
        run.state.student.register_forward_pre_hook(lambda *_: held.append(torch.cuda.memory_allocated()))
        before = torch.cuda.memory_allocated()
        run.step._forward(batch)
        held[-1] -= before
    assert held[0] >= 16 * 96 * 96 * 3 * 2 and max(held) - held[0] < 32 << 10, held


class LikeDali(SyntheticPipeline):
    """Batches behind a graph for each image size that takes memory outside of torch, as DaliPipeline has them.

    The graph of another size is built before the last one is dropped. One that was gone through to the end is kept
    until it is forgotten, one that was left early is not.
    """

    def __init__(self, index: ShardIndex):
        super().__init__(index, device=GPU.device)
        self.graphs: dict[int, DeviceMemory] = {}

    def forget(self) -> None:
        self.graphs.clear()

    def batches(self, plans):
        plans = list(plans)
        try:
            for size, alike in itertools.groupby(plans, lambda plan: plan.image_size):
                for each in {plan.image_size for plan in plans} - self.graphs.keys():
                    torch.cuda.empty_cache()
                    self.graphs[each] = DeviceMemory(GRAPH_MIB * MIB)
                yield from super().batches(alike)
                if size != plans[-1].image_size:
                    del self.graphs[size]
                    plans = [plan for plan in plans if plan.image_size != size]
        except GeneratorExit:
            self.graphs.clear()
            raise


@pytest.fixture
def like_dali(monkeypatch) -> dict[str, "LikeDali"]:
    """A training and a validation split on a small device; nothing is made of what a model predicts."""
    gc.collect()
    torch.cuda.empty_cache()
    monkeypatch.setenv("CUDA_STUB_MIB", str(DEVICE_MIB))
    index = synthetic_index(256, 10)
    val = synthetic_index(64, 10)
    monkeypatch.setattr(builder, "open_splits", lambda config: ({"train": index, "val": val}, None))
    monkeypatch.setattr(metrics, "joined", lambda parts, num_samples: None)
    monkeypatch.setattr(metrics, "accuracy", lambda predictions: {"top1": 0.0})
    pipelines = {}

    def opened(config, indices, world, decode):
        real = real_open(config, indices, world, decode)
        pipelines.update({split: LikeDali(each) for split, each in indices.items()})
        return Pipelines(pipelines, real.quarantine, real.decode)

    real_open = builder.open_pipelines
    monkeypatch.setattr(builder, "open_pipelines", opened)
    return pipelines


def test_a_run_whose_micro_batch_was_searched_has_room_for_its_evaluation(like_dali, tmp_path, monkeypatch):
    """The search goes through what takes most: both sizes' graphs, then those of both splits beside an update."""
    graphs = []
    warm_up = TrainStep.warm_up

    def noted(step, batch, **how):
        warm_up(step, batch, **how)
        graphs.append([len(pipeline.graphs) for pipeline in like_dali.values()])

    monkeypatch.setattr(TrainStep, "warm_up", noted)
    found = built(tmp_path / "run", SETTINGS)
    assert graphs[-2:] == [[2, 1], [1, 1]]
    assert 16 < found.state.micro_batch < 256  # the search had something to find
    assert not any(pipeline.graphs for pipeline in like_dali.values())
    assert all(module.training for module in found.state.student.modules())
    go_through(found)


def go_through(found: Run) -> None:
    """The last update of the smaller size, an evaluation, the first update of the larger size, another evaluation."""
    last = found.plan.steps_per_epoch - 1
    plans = rank_plans(found.plan, last, last + 2, GPU, found.state.micro_batch)
    with contextlib.closing(found.pipelines.of["train"].batches(plans)) as batches:
        found.step(batches, last)
        found.evaluate()
        found.step(batches, last + 1)
        found.evaluate()


def test_the_search_takes_the_largest_that_fits(like_dali, tmp_path):
    found = built(tmp_path / "run", SETTINGS)
    too_large = built(tmp_path / "other", {**SETTINGS, "run.micro_batch": 2 * found.state.micro_batch})
    with pytest.raises(RuntimeError, match="out of memory"):
        go_through(too_large)


def test_an_evaluation_is_tried_beside_moments_and_gradients(like_dali, tmp_path, monkeypatch):
    """They are there between two updates."""
    held, accuracy = [], EvalPass.accuracy

    def noted(*args, **how):
        held.append(torch.cuda.memory_allocated())
        return accuracy(*args, **how)

    monkeypatch.setattr(EvalPass, "accuracy", noted)
    found = built(tmp_path / "run", SETTINGS)
    beside = held[-1]
    found.evaluate()
    alone = held[-1]
    assert beside - alone >= 3 * sum(parameter.nbytes for parameter in found.state.student.parameters())


@pytest.mark.long
def test_a_run_that_does_not_fit_is_refused_with_advice(like_dali, tmp_path):
    with pytest.raises(UserError, match="not even two images fit .* Lower run.eval_b"):
        built(tmp_path / "run", {**SETTINGS, "run.eval_batch": 8192})


def test_the_search_sends_no_heartbeats(like_dali, tmp_path):
    """Ranks fail to fit at different places, and the watchdog takes the one with fewer heartbeats for a lost one."""
    heartbeats = []
    build(
        parse(arguments(tmp_path / "run", SETTINGS)),
        dataclasses.replace(GPU, heartbeat=lambda *where: heartbeats.append(where)),
    )
    assert heartbeats == []


def test_a_graph_of_dali_is_built_beside_an_empty_cache(monkeypatch, photos):
    """What torch keeps for itself is as much as taken for DALI, which allocates on its own."""
    from pipelines import PipelineConfig
    from pipelines.dali import DaliPipeline, _Shape

    reserved = []

    class Built:
        def __init__(self, *_, **__):
            reserved.append(torch.cuda.memory_reserved())

        def build(self) -> None:
            """The rest takes a device."""

    monkeypatch.setattr("pipelines.dali._dali_graph", Built)
    config = PipelineConfig(threads=1, prefetch=1, decode="roi", hw_decoder_load=0.0, decoder_padding_mib=1)
    pipeline = DaliPipeline(photos, config, device=GPU.device, on_damage=lambda *_: None)
    free = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    del free
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= 64 * MIB
    pipeline._build(_Shape(16, 224, "bicubic"))
    assert reserved[0] - torch.cuda.memory_allocated() < 32 * MIB  # Segments that are in use keep the rest.
