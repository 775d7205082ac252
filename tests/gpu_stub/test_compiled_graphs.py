"""What torch.compile makes of a run: whole graphs, those of the first image size while the run is built."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from gpu_stub.runs import GPU, built, teacher_file
from trainer.update import compiler
from trainer.update.step import gray_batch

TEACHER = {"teacher.name": "tiny_cnn", "teacher.checkpoint": "FILE"}
CASES = {
    "labels alone": {},
    "teacher": TEACHER,
    "teacher of its own size": {**TEACHER, "teacher.image_size": 48},
    "drop path": {"student.name": "test_resnet", "student.kwargs.drop_path_rate": 0.1},
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_compiled_in_whole_graphs_and_again_only_for_a_new_size(name, tmp_path, monkeypatch):
    """Traced as for a GPU, without the code generator. Another size is compiled in its first update."""
    monkeypatch.setattr(compiler, "compiled", functools.partial(torch.compile, backend="aot_eager", dynamic=False))
    monkeypatch.setattr(compiler, "why_not", lambda device: "")
    torch._dynamo.reset()
    counters.clear()
    path = teacher_file(tmp_path)
    settings = {**CASES[name], "run.compile": "true", "data.image_size": "[[0,32],[1,48]]"}
    run = built(tmp_path / "run", {key: str(value).replace("FILE", str(path)) for key, value in settings.items()})
    graphs = [counters["stats"]["unique_graphs"]]

    def step(size: int) -> None:
        run.step(iter([gray_batch(16, size, 16, GPU.device) for _ in range(2)]), 0)
        graphs.append(counters["stats"]["unique_graphs"])

    step(32)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        run.state.student.eval()(torch.zeros(4, 3, 32, 32, device=GPU.device))
    run.state.student.train()
    for size in (32, 48, 48, 32):
        step(size)
    assert not counters["graph_break"], dict(counters["graph_break"])
    built_with, *_, before, larger, again, back = graphs
    assert 0 < built_with == before < larger == again == back, graphs
