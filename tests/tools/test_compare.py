"""tools/compare.py: who is faster, who is on the front, what an accuracy belongs to, and what fails becomes a row."""

import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from support.models import tiny_hiera
from tools import compare
from tools.lib.common.hardware import BACKEND_PACKAGES
from tools.lib.compare import backends, candidates, measuring, results
from tools.lib.compare.backends import Plan
from tools.lib.compare.candidates import Candidate
from tools.lib.compare.measuring import FailedError, Process
from tools.lib.export.timm_folder import write_folder

pytestmark = pytest.mark.usefixtures("onnx_translations_read_once")


# Models and accuracies


def evaluation(path, **changes):
    report = {"model": "test_resnet", "source": "somewhere/best.pt", "top1": 71.5, "view": {"image_size": 96}}
    path.write_text(json.dumps(report | {"split": "val", "digest": "0123456789abcdef"} | changes))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An exported folder of test_resnet with ten classes and images of 64 px."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=10)
    save_file(model.state_dict(), folder / "model.safetensors")
    own = {**model.pretrained_cfg, "input_size": [3, 64, 64], "num_classes": 10}
    own.pop("test_input_size", None)
    config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_without_models_the_papers_are_taken_and_marked():
    found = candidates.choose([], [])
    assert {model.name: model.accuracy.top1 for model in found}["convnext_small"] == 84.0
    assert len(found) == 14
    assert all(timm.is_model(model.name) and model.accuracy.published and model.image_size == 224 for model in found)


def test_the_papers_accuracy_stands_beside_the_papers_model(tmp_path):
    """timm's levit_384 has a second classifier since."""
    (papers,) = candidates.choose(["levit_384"], [])
    assert sum(parameter.numel() for parameter in candidates.unfolded(papers).parameters()) == 38_358_300
    (tmp_path / "mine.csv").write_text("model,top1\nlevit_384,80\n")
    (mine,) = candidates.choose(["levit_384"], [tmp_path / "mine.csv"])
    assert sum(parameter.numel() for parameter in candidates.unfolded(mine).parameters()) == 39_128_836


def test_an_evaluation_belongs_to_the_file_that_was_evaluated_and_sets_the_size(weights, tmp_path):
    path = evaluation(tmp_path / "eval.json", source=str(weights))
    mine, other = candidates.choose([str(weights), "test_vit"], [path])
    assert (mine.accuracy.top1, mine.image_size, mine.accuracy.published) == (71.5, 96, False)
    assert other.accuracy is None


def test_an_evaluation_of_a_checkpoint_is_not_the_accuracy_of_another_one_or_of_timms_model(weights, tmp_path):
    other_weights = shutil.copytree(weights, tmp_path / "other")
    path = evaluation(tmp_path / "eval.json", source=str(weights))
    mine, bare = candidates.choose([str(weights), "test_resnet"], [path])
    assert (mine.accuracy.top1, bare.accuracy) == (71.5, None)
    for others in (["test_resnet"], [str(other_weights)]):
        with pytest.raises(UserError, match="eval.json: is of none of the models here"):
            candidates.choose(others, [path])
    timms = evaluation(tmp_path / "timms.json", source="timm's test_resnet", top1=70)
    mine, bare = candidates.choose([str(weights), "test_resnet"], [path, timms])
    assert (mine.accuracy.top1, bare.accuracy.top1) == (71.5, 70)


@pytest.mark.parametrize("changes", [{"digest": "fedcba9876543210"}, {"split": "train"}])
def test_evaluations_on_different_images_are_refused(changes, tmp_path):
    files = [
        evaluation(tmp_path / f"{name}.json", model=name, source=f"timm's {name}", **different)
        for name, different in (("test_resnet", {}), ("test_vit", changes))
    ]
    message = (
        "test_vit.json: was evaluated on split .* with digest .*, .*test_resnet.json on split 'val' with digest 0123"
    )
    with pytest.raises(UserError, match=message):
        candidates.choose(["test_resnet", "test_vit"], files)
    evaluation(files[1], model="test_vit", source="timm's test_vit")
    assert len(candidates.choose(["test_resnet", "test_vit"], files)) == 2


def test_a_users_accuracy_comes_before_the_papers(tmp_path):
    (tmp_path / "mine.csv").write_text("model,top1,image_size\nresnet50,79.25,288\n")
    mine, papers = candidates.choose(["resnet50", "levit_384"], [tmp_path / "mine.csv"])
    assert (mine.accuracy.top1, mine.image_size, mine.accuracy.published) == (79.25, 288, False)
    assert (papers.accuracy.top1, papers.accuracy.published) == (82.7, True)


def test_two_accuracies_of_a_model_are_refused(tmp_path):
    timms = "timm's test_resnet"
    files = [evaluation(tmp_path / f"{name}.json", source=timms, top1=top1) for name, top1 in (("a", 70), ("b", 71))]
    with pytest.raises(UserError, match=r"test_resnet: .*a.json and .*b.json say its accuracy. Leave one out"):
        candidates.choose(["test_resnet"], files)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "name,top1\nresnet50,80\n", "a.csv: not a CSV with columns model, top1 .*'model'"),
        ("a.csv", "model,top1\nresnet50,80\nlevit_384,good\n", "a.csv: not a CSV with columns .*'good'"),
        ("a.csv", "model,top1\nresnet50\n", "a.csv: not a CSV with columns model, top1"),
        ("a.csv", "model,top1,image_size\nresnet50,80,big\n", "a.csv: not a CSV with columns .*'big'"),
        ("a.csv", "model,top1\nresnet50,180\n", "a.csv: top1 of resnet50 is 180, not a percentage"),
        ("a.json", "[]", "a.json: not an evaluation .* Write it with python tools/evaluate.py --run.json"),
        ("a.json", "{", "a.json: not an evaluation"),
    ],
)
def test_a_file_of_accuracies_that_is_none_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        candidates.choose(["resnet50"], [tmp_path / name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5"], "error: unknown model 'resnet5'; did you mean"),
        (["no/such/run"], "error: no/such/run: not found. Give a checkpoint"),
        (["resnet50", "--accuracy", "none.csv"], "error: none.csv: not a CSV with columns"),
        (["resnet50", "--repeats", "0"], "error: --repeats is 0; it must be positive"),
        (["resnet50", "--out", "file/folder"], "error: --out is file/folder: cannot be written to"),
        (["resnet50", "--out", "/proc"], "error: --out is /proc: cannot be written to"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--device", "cpu"])
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_backend_that_is_missing_is_an_error_if_it_was_named_and_a_note_if_not(monkeypatch):
    command = BACKEND_PACKAGES["openvino"][1]
    monkeypatch.setitem(BACKEND_PACKAGES, "openvino", ("no_such_package", command))
    with pytest.raises(UserError, match=re.escape("openvino is not installed. Run: pip install -e '.[compare]'")):
        backends.choose_backends(["openvino"], "cpu")
    found, notes = backends.choose_backends(None, "cpu")
    assert "openvino" not in [backend.name for backend in found]
    assert "left out: openvino is not installed. Run: pip install -e '.[compare]'" in notes


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(UserError, match="openvino does not run on cuda. Use --device cpu"):
        backends.choose_backends(["openvino"], "cuda")


# What does not depend on the machine


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("resnet50", 4.08, 4.13),
        ("vit_small_patch16_224", 4.55, 4.65),  # 4.25 without the products of attention
        ("mobilenetv3_large_100", 0.21, 0.23),
    ],
)
def test_multiply_adds_are_the_published_ones(name, least, most):
    assert least < candidates.gmacs(timm.create_model(name).eval(), 224) < most


def test_random_weights_are_the_same_every_time_and_hold_nothing_to_leave_out():
    model = Candidate("test_resnet", "test_resnet", "", 64)
    one, other = candidates.unfolded(model).state_dict(), candidates.unfolded(model).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(len(value.unique()) > 1 for value in one.values() if value.numel() > 1)


# Measuring


def _serve_and_die():
    yield "ready"
    signal.raise_signal(signal.SIGKILL)


def _serve_an_error(error=None):
    yield "ready"
    raise error or ValueError("first line\nsecond line")


def _serve_a_fault():
    yield "ready"
    signal.raise_signal(signal.SIGABRT)


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (_serve_and_die, "ended with signal SIGKILL, perhaps for want of memory"),
        (_serve_a_fault, "ended with signal SIGABRT; leave this model or"),
        (_serve_an_error, "^ValueError: first line second line$"),
    ],
)
def test_a_process_that_fails_is_reported_with_the_reason_in_a_line(serve, message):
    with Process(serve) as process:
        assert process.answer() == "ready"
        with pytest.raises(FailedError, match=message):
            process.answer()


@pytest.mark.parametrize("error", [OSError("libnvinfer.so: no such file"), EOFError("the file ends early")])
def test_a_runtimes_own_error_of_reading_is_reported_like_any_other(error):
    with Process(_serve_an_error, error) as process:
        process.answer()
        with pytest.raises(FailedError, match=f"^{type(error).__name__}: {error}$"):
            process.answer()


def test_parameters_are_counted_before_batch_norms_are_folded(tmp_path):
    model = Candidate("test_resnet", "test_resnet", "", 64)
    assert candidates.prepare(model, tmp_path, []).parameters_m == pytest.approx(0.469_688)
    assert not [module for module in candidates.build(model).modules() if isinstance(module, torch.nn.BatchNorm2d)]


class Prepared(NamedTuple):
    """A Hiera whose fused attention is not exported, the folder with its files, the backends that these are for."""

    model: Candidate
    folder: Path
    facts: candidates.Facts
    names: list[str]


@pytest.fixture(scope="module", params=["float32", pytest.param("float16", marks=pytest.mark.long)])
def hiera(request, tmp_path_factory) -> Prepared:
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    folder, names = tmp_path_factory.mktemp("hiera"), ["openvino", "onnxruntime"]
    names += ["tensorrt"] if request.param == "float16" else []
    write_folder(tiny_hiera(), folder)
    model = Candidate("mine", "hiera_tiny_224", str(folder), 32)
    facts = candidates.prepare(model, folder, [backends.BACKENDS[name].file for name in names])
    return Prepared(model, folder, facts, names)


def test_a_backend_that_computes_something_else_is_refused(hiera, tmp_path):
    session = backends.OnnxRuntimeSession(hiera.model, hiera.folder, Plan("cpu", batch=2, repeats=1, threads=1))
    assert measuring._difference(session, hiera.folder) < 1e-4
    reference = torch.load(hiera.folder / candidates.REFERENCE, weights_only=True)
    torch.save({**reference, "logits": -reference["logits"]}, tmp_path / candidates.REFERENCE)
    with pytest.raises(UserError, match="its logits are 200% away from PyTorch's"):
        measuring._difference(session, tmp_path)


def test_a_model_whose_fused_attention_is_not_exported_runs_with_plain_attention_on_these_backends_and_a_note_says_so(
    hiera,
):
    assert hiera.facts.plain_attention == {backends.BACKENDS[name].file for name in hiera.names}
    opened = measuring.Opened(
        batch=2, calls_at_once=1, precision="float32", peak_memory_mib=1, difference_from_pytorch=0
    )
    timed = [1.0] * 6
    measured = [
        measuring.Measured(hiera.model, backends.BACKENDS[name], hiera.facts, opened, timed, timed)
        for name in (*hiera.names, "eager")
    ]
    rows, _ = results.rows_of(measured)
    assert [row.plain_attention for row in rows] == [True] * len(hiera.names) + [False]
    said = "with timm's plain attention, because the fused one cannot be exported: "
    assert f"{said}{', '.join(f'mine ({name})' for name in hiera.names)}" in results.notes(rows)


@pytest.fixture(scope="module")
def compared(weights, tmp_path_factory):
    """Every backend of the CPU but the compiled one, a model that fails among the others."""
    for package in ("onnxruntime", "openvino", "plotly"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("compared")
    (folder / "mine.csv").write_text(f"model,top1,image_size\n{weights},71,64\ntest_vit,60,30\n")
    names = [str(weights), "test_vit", "--backends", "openvino", "onnxruntime", "eager"]
    arguments = [*names, "--repeats", "1", "--batch", "2", "--device", "cpu"]
    compare.main([*arguments, "--accuracy", str(folder / "mine.csv"), "--out", str(folder / "out")])
    return folder / "out"


def test_a_trained_model_is_measured_on_each_backend_and_one_that_fails_is_a_row_with_the_reason(compared, weights):
    found = json.loads((compared / "comparison.json").read_text())
    rows = {(row["backend"], row["model"]): row for row in found["rows"]}
    assert set(rows) == {(b, m) for b in ("openvino", "onnxruntime", "eager") for m in (str(weights), "test_vit")}
    for (_, name), row in rows.items():
        if name == "test_vit":
            assert "height" in row["failed"]  # 30 px are no number of patches
            continue
        assert row["name"] == "test_resnet"
        assert row["images_per_s"] > 0
        assert row["latency_ms"] > 0
        assert row["peak_memory_mib"] > 1
        assert (row["image_size"], row["top1"], row["on_front"]) == (64, 71, True)
        assert row["difference_from_pytorch"] < (0.05 if row["backend"] == "openvino" else 1e-4)
    assert rows["openvino", str(weights)]["precision"] in ("f16", "bf16", "f32")
    assert [rows[b, str(weights)]["batch"] for b in ("openvino", "onnxruntime", "eager")] == [1, 2, 2]
    assert {"cpu", "cores", "torch", "onnxruntime", "openvino"} <= set(found["machine"])
    assert found["measured_on"] == f"{found['machine']['cpu']}, {found['threads']} cores"


def test_the_table_as_csv_has_the_rows_without_their_timed_runs(compared):
    rows = list(csv.DictReader(io.StringIO((compared / "comparison.csv").read_text())))
    assert len(rows) == 6
    assert not [key for key in rows[0] if key.startswith("timed_")]
    assert sum(bool(row["failed"]) for row in rows) == 3


def test_the_picture_is_one(compared):
    from PIL import Image

    with Image.open(compared / "comparison.png") as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 1


def test_a_comparison_that_nobody_reads_is_written(tmp_path, monkeypatch):
    """Behind `| head -1` rich ends the process."""
    monkeypatch.setattr(compare, "measure", lambda *arguments: [])
    monkeypatch.setattr(results, "tables", lambda rows, failed: sys.exit(1))
    with pytest.raises(SystemExit):
        compare.main(["test_resnet", "--device", "cpu", "--out", str(tmp_path)])
    assert {"comparison.csv", "comparison.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.long
def test_ctrl_c_ends_a_comparison_in_silence_and_leaves_nothing(tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools/compare.py"), "test_resnet", "--device", "cpu"]
    command += ["--backends", "eager", "--repeats", "1000", "--out", str(tmp_path / "out")]
    look = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    scratch = {**os.environ, "TMPDIR": str(tmp_path)}
    usual = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell may have it ignored
    with subprocess.Popen(command, env=scratch, preexec_fn=usual, **look) as process:
        time.sleep(30)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (130, "")
    assert not list(tmp_path.glob("usi-compare-*"))
    assert not list((tmp_path / "out").iterdir())


def test_a_process_ends_with_the_block_that_opened_it():
    with Process(_serve_and_die) as process:
        assert process.answer() == "ready"
    assert process._process.exitcode == 0
