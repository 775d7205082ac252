"""Nothing in an update, an evaluation, a recording or the augmentation makes the host wait for the device, or mixes
devices.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_stub.runs import GPU, arguments, built, teacher_file, updates
from gpu_stub.stand_in import triton_launches
from pipelines.ops.torch_ops import apply_ops, erase, kernel_error
from pipelines.plan.draws import Op
from pipelines.plan.plan import EvalPlan
from pipelines.shards.index import synthetic_index
from pipelines.synthetic import SyntheticPipeline
from tools.lib.common.terminal import Progress
from tools.lib.record_teacher.blocks import encoded_rows
from tools.lib.record_teacher.recording import build_recording
from trainer.config.sections import parse
from trainer.evaluation import metrics
from trainer.evaluation.predict import EvalPass
from trainer.models.normalize import Normalize
from trainer.models.teacher import resize_pixels
from trainer.targets.pieces import Piece

TEACHER = {"teacher.name": "tiny_cnn"}
VIT = {"student.name": "test_vit"}
UPDATES = {
    "labels alone": {},
    "teacher": TEACHER,
    "teacher of another size": {**TEACHER, "teacher.image_size": 48},
    "two teachers": {**VIT, **TEACHER, "teacher.others": "[{name: tiny_cnn, checkpoint: FILE, image_size: 64}]"},
    "fp16, clipped by norm": {**TEACHER, "run.precision": "fp16", "optim.clip_norm": 1},
    "fp16": {"run.precision": "fp16"},
    "fp32, clipped adaptively": {**VIT, "run.precision": "fp32", "optim.clip_agc": 0.01},
    "contiguous": {"run.channels_last": "false"},
    "no average": {"ema.decay": 0},
    "temperature and smoothing": {**TEACHER, "distill.temperature": 2, "distill.label_smoothing": 0.1},
}


class CrossDevice(TorchDispatchMode):
    """Notes the operations whose tensors lie on several devices, copies from pinned memory aside."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        self.operations += 1
        pinned_copy = "copy" in str(function) and all(each.is_cuda or each.is_pinned() for each in tensors)
        if len({str(tensor.device) for tensor in tensors}) > 1 and not pinned_copy:
            self.found.append(f"{function}: {[(list(tensor.shape), str(tensor.device)) for tensor in tensors]}")
        return result


def test_waiting_for_the_device_is_noticed(no_host_sync):
    """Otherwise the other tests here could not fail."""
    values = torch.ones(4, device="cuda")
    for wait in (torch.Tensor.nonzero, lambda values: values.sum().item(), torch.Tensor.cpu):
        with pytest.raises(RuntimeError, match="synchronizing"), no_host_sync():
            wait(values)


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_does_not_wait_for_the_device(name, tmp_path, no_host_sync):
    path = teacher_file(tmp_path)
    settings = {key: str(value).replace("FILE", str(path)) for key, value in UPDATES[name].items()}
    run = built(tmp_path / "run", {**settings, **({"teacher.checkpoint": path} if "teacher.name" in settings else {})})
    first, *later = updates(run, 0, 3)
    run.step(iter(first), 0)  # makes the optimizer's state, compiles the Triton kernels
    with no_host_sync(), CrossDevice() as devices:
        for number, batches in enumerate(later, start=1):
            run.step(iter(batches), number)
    assert devices.operations > 100 and not devices.found


def test_augmenting_and_mixing_launch_our_kernels(tmp_path):
    """One launch for a layer of light operations and one of affine ones; mixing and normalising are one."""
    assert kernel_error() == ""
    images, fill = torch.zeros(16, 32, 32, 3, dtype=torch.uint8, device="cuda"), (124, 116, 104)
    ops = np.array([[Op.COLOR], [Op.ROTATE]] * 8, dtype=np.uint8)
    before = triton_launches()
    apply_ops(images, ops, np.full((16, 1), 0.3, np.float32), fill)
    assert triton_launches() - before == 2
    run = built(tmp_path, {})
    (batches,), before = updates(run, 0, 1), triton_launches()
    run.step(iter(batches), 0)
    assert triton_launches() - before == len(batches)


@pytest.mark.parametrize("kernel", [True, False])
def test_augmenting_does_not_wait_for_the_device(kernel, no_host_sync):
    images, fill = torch.zeros(16, 32, 32, 3, dtype=torch.uint8, device="cuda"), (124, 116, 104)
    ops = np.resize(np.arange(max(Op) + 1), (16, 2)).astype(np.uint8)
    args = np.full((16, 2), 0.3, np.float32)
    boxes = np.tile(np.array([2, 3, 8, 9], np.int32), (16, 1))
    apply_ops(images, ops, args, fill, kernel=kernel)
    with no_host_sync(), CrossDevice() as devices:
        assert apply_ops(images, ops, args, fill, kernel=kernel).is_cuda
        assert erase(images, boxes, fill).is_cuda
        assert resize_pixels(images, 48).shape == (16, 48, 48, 3)
    assert not devices.found


def test_an_evaluation_waits_at_its_end_alone(monkeypatch, no_host_sync):
    """The kernels do nothing, so the rows that come back say nothing of which image they are."""
    index, model = synthetic_index(40, 10), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).cuda()
    normalize, seen = Normalize((0.5,) * 3, (0.5,) * 3, torch.bfloat16).cuda(), []
    model(torch.zeros(16, 3, 32, 32, device="cuda"))
    monkeypatch.setattr(metrics, "joined", lambda parts, num_samples: seen.append(num_samples))

    def watched(batches):
        for batch in batches:
            with no_host_sync():
                yield batch

    pipeline = SyntheticPipeline(index, device=GPU.device)
    eval_pass = EvalPass(normalize, pipeline, EvalPlan(index, 32, 0.95, "bicubic"), 16, torch.bfloat16, GPU)
    eval_pass.predict({"raw": model}, shown=watched)
    assert seen == [40]


@pytest.mark.parametrize("codec", ["int8", "fp16", "compact"])
def test_a_recording_does_not_wait_for_the_device_within_a_block(codec, tmp_path, no_host_sync):
    settings = {**TEACHER, "teacher.checkpoint": teacher_file(tmp_path), "data.synthetic_classes": 10}
    config = parse(arguments(tmp_path / "run", settings))
    recording = build_recording(config, tmp_path / "store", codec=codec, epochs=1, world=GPU)
    assert recording.header.precision == "fp16"
    plans = recording.plan.batches(0, 4, micro_batch=recording.micro_batch)
    batches = iter(list(recording.pipelines.of["train"].batches(plans)))
    progress = Progress(4, 32, "process 1 of 1")
    encoded_rows(recording, batches, Piece(0, 2, 0, 32), lambda: 0, progress)  # compiles the Triton kernels
    with no_host_sync(), CrossDevice() as devices:
        rows, is_encoded, num_right = encoded_rows(recording, batches, Piece(2, 4, 0, 32), lambda: 0, progress)
    assert (
        num_right.is_cuda
        and rows.is_cuda
        and rows.shape == (2, 32, recording.header.open_codec().row_bytes)
        and is_encoded.shape == (2, 32)
    )
    assert devices.operations > 50 and not devices.found


def test_a_recording_in_float32_does_not_round_factors_to_tf32(tmp_path):
    """A run may, and does by default."""
    settings = {**TEACHER, "teacher.checkpoint": teacher_file(tmp_path), "data.synthetic_classes": 10}
    built(tmp_path / "run", settings)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    config = parse(arguments(tmp_path / "run", {**settings, "teacher.precision": "fp32"}))
    build_recording(config, tmp_path / "store", codec="int8", epochs=1, world=GPU)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
