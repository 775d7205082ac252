"""What is compiled, and what depends on that: nothing but the speed."""

import functools
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

from conftest import run_trainer
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.mixed_batches import assert_kernel_equals_torch, mixed_batch
from support.processes import interpreted
from trainer import builder
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import rank_plans
from trainer.models.batch_norm import synchronize_batch_norms
from trainer.models.normalize import Normalize
from trainer.update import compiler as compiling
from trainer.update.mixing import mixed_inputs

ONE = World(0, 1, 1, torch.device("cpu"))
MODEL = nn.Linear(1, 1)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# everything but the code generator, which is slow
traced = functools.partial(torch.compile, backend="aot_eager", dynamic=False)


@pytest.fixture
def arguments(tmp_path):
    """A run of models of a few layers: tracing takes a while for each of them."""
    return arguments_for("tiny_cnn", "tiny_cnn", tmp_path)


@pytest.fixture
def arguments_of_timms_models(tmp_path):
    """A run of two different architectures."""
    return arguments_for("test_byobnet", "test_resnet", tmp_path)


def arguments_for(student: str, teacher: str, folder: Path) -> list[str]:
    """A run on synthetic images, with a teacher; BatchNorm, dropout and two micro-batches an update."""
    torch.manual_seed(0)
    torch.save(timm.create_model(teacher, num_classes=10).state_dict(), folder / "teacher.pth")
    data = ["--data.pipeline", "synthetic", "--data.synthetic_samples", "256", "--data.synthetic_classes", "10"]
    models = ["--student.name", student, "--student.kwargs.drop_rate", "0.1", "--teacher.name", teacher]
    models += ["--teacher.checkpoint", str(folder / "teacher.pth")]
    run = ["--run.out", str(folder / "run"), "--run.device", "cpu", "--run.global_batch", "64"]
    return [*data, *models, *run, "--augment.mix_group", "32", "--data.image_size", "[[0,32],[1,40]]"]


def losses(arguments: list[str], num_steps: int, world: World = ONE) -> tuple[list[float], list[int]]:
    """Of each update; and how many graphs had been compiled before it."""
    torch._dynamo.reset()
    counters.clear()
    run = builder.build(parse(arguments), world)
    found, graphs = [], []
    for step in range(num_steps):
        graphs.append(counters["stats"]["unique_graphs"])
        plans = rank_plans(run.plan, step, step + 1, world, run.state.micro_batch)
        found.append(run.step(run.pipelines.of["train"].batches(plans), step).loss.item())
        run.state.step += 1
    return found, graphs


def test_a_compiled_run_is_compiled_before_its_first_step_and_trains_alike(arguments, monkeypatch):
    """2 steps are an epoch, after which the images are larger, which is compiled when it comes and only then.

    Dropout is what eager PyTorch draws, since the code generator is left out.
    """
    arguments += ["--data.synthetic_samples", "128"]
    plain, none = losses([*arguments, "--run.compile", "false"], 5)
    monkeypatch.setattr(compiling, "compiled", traced)
    found, graphs = losses([*arguments, "--run.compile", "true"], 5)
    assert found == pytest.approx(plain, rel=1e-5) and set(none) == {0}
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert 0 < graphs[0] == graphs[2] < graphs[3] == graphs[4]


def test_auto_compiles_nothing_on_a_cpu():
    assert compiling.choose_compiler("auto", MODEL, ONE) == (compiling.uncompiled, "")
    assert compiling.choose_compiler(False, MODEL, ONE) == (compiling.uncompiled, "")


def test_auto_compiles_no_layers_that_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(compiling, "why_not", lambda device: "")
    monkeypatch.setattr(World, "all_gather", lambda self, values: values * self.size)
    two_gpus = World(0, 2, 2, torch.device("cuda", 0))
    synchronized = synchronize_batch_norms(timm.create_model("test_resnet"), two_gpus)
    compiler, note = compiling.choose_compiler("auto", synchronized, two_gpus)
    assert compiler is compiling.uncompiled and "run.batch_norm sync makes the host wait" in note
    assert compiling.choose_compiler(True, synchronized, two_gpus) == (compiling.compiled, "")
    vit = synchronize_batch_norms(timm.create_model("test_vit"), two_gpus)  # has no such layers
    assert compiling.choose_compiler("auto", vit, two_gpus) == (compiling.compiled, "")


def test_without_a_compiler_auto_goes_on_and_true_says_what_to_do(monkeypatch):
    def broken(_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    with pytest.raises(UserError, match=r"run.compile is true.*no C compiler.*C compiler are needed; or use --run"):
        compiling.choose_compiler(True, MODEL, ONE)
    on_gpu = World(0, 1, 1, torch.device("cuda", 0))
    monkeypatch.setattr(compiling, "why_not", lambda device: "RuntimeError: no C compiler")
    compiler, note = compiling.choose_compiler("auto", MODEL, on_gpu)
    assert compiler is compiling.uncompiled and "not compiled" in note and "no C compiler" in note


def test_a_model_that_cannot_be_compiled_ends_in_one_line_or_trains_as_it_is(arguments, monkeypatch):
    def fail(graph, inputs):
        raise NotImplementedError("an operation without a lowering")

    monkeypatch.setattr(compiling, "compiled", functools.partial(torch.compile, backend=fail, dynamic=False))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"tiny_cnn.*cannot be compiled.*without a lowering.*--run.compile false"):
        builder.build(parse([*arguments, "--run.compile", "true"]), ONE)
    monkeypatch.setattr(builder, "choose_compiler", lambda *_: (compiling.compiled, ""))  # as on a GPU
    run = builder.build(parse([*arguments, "--run.compile", "auto"]), ONE)
    assert "run.compile auto: not compiled" in run.notes[-1] and "without a lowering" in run.notes[-1]
    plans = rank_plans(run.plan, 0, 1, ONE, run.state.micro_batch)
    assert run.step(run.pipelines.of["train"].batches(plans), 0).loss.isfinite()


@pytest.mark.long
def test_two_ranks_with_generated_code_train_what_one_does(arguments_of_timms_models, tmp_path):
    """Compiled before DDP wraps it. The statistics are the mean over both ranks either way."""
    arguments = arguments_of_timms_models
    arguments[arguments.index("0.1")] = "0"
    for ranks in (1, 2):
        more = ["--run.compile", "true", "--run.stop_after_steps", "3", "--run.out", tmp_path / str(ranks)]
        run_trainer(*arguments, *more, ranks=ranks)
    a, b = (read_json_lines(tmp_path / ranks / "metrics.jsonl")[1]["loss"] for ranks in ("1", "2"))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.long
def test_generated_code_trains_alike(arguments_of_timms_models):
    arguments = arguments_of_timms_models
    arguments[arguments.index("0.1")] = "0"  # generated code draws other numbers for dropout
    plain, _ = losses([*arguments, "--run.compile", "false"], 3)
    found, _ = losses([*arguments, "--run.compile", "true"], 3)
    assert found == pytest.approx(plain, rel=1e-4)


@pytest.mark.gpu
def test_generated_code_trains_alike_on_the_gpu(arguments_of_timms_models):
    arguments = arguments_of_timms_models
    arguments[arguments.index("0.1")] = "0"
    world, exact = World(0, 1, 1, torch.device("cuda", 0)), ["--run.precision", "fp32", "--run.tf32", "false"]
    plain, _ = losses([*arguments, *exact, "--run.compile", "false"], 3, world)
    found, graphs = losses([*arguments, *exact, "--run.compile", "true"], 3, world)
    assert found == pytest.approx(plain, rel=1e-3)
    assert graphs[0] == graphs[2] and not counters["graph_break"], (graphs, dict(counters["graph_break"]))


# --- the kernel that mixes and normalises ---


@needs_triton
def test_the_interpreted_kernel_equals_torch():
    """Size 2 is one program an image, size 20 two. bfloat16 is truncated there."""
    script = (
        "import torch; from support.mixed_batches import assert_kernel_equals_torch as check;"
        "check('cpu', (2,), {torch.float16: 0}); check('cpu', (20,), {torch.float32: 0, torch.float16: 0});"
        "print('equal')"
    )
    assert interpreted(script) == "equal\n"


@pytest.mark.gpu
@needs_triton
def test_the_kernel_equals_torch_on_the_gpu():
    assert_kernel_equals_torch(
        "cuda", (2, 21, 97, 224), dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0)
    )


@pytest.mark.gpu
@needs_triton
def test_mixing_waits_for_nothing_on_the_gpu():
    batch, models = mixed_batch(33, 8, "cuda"), [Normalize((0.5,) * 3, (0.5,) * 3).cuda()]
    mixed_inputs(batch, models)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed_inputs(batch, models)
    finally:
        torch.cuda.set_sync_debug_mode("default")
