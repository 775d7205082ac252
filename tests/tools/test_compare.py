"""tools/compare.py: who is faster, who is on the front, what an accuracy belongs to, and what fails becomes a row."""

import csv
import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from test_export import tiny_hiera

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from tools import compare
from tools.lib.compare import backends, candidates, charts, measuring, ranking, results
from tools.lib.compare.candidates import Candidate
from tools.lib.compare.measuring import FailedError, Process
from tools.lib.export.timm_folder import write_folder

pytestmark = pytest.mark.usefixtures("onnx_translations_read_once")


def turns(speed: float, rounds: int = 15, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    return speed * np.exp(noise * np.random.default_rng(seed).standard_normal(rounds))


# The front


def test_the_front_has_what_nothing_beats_in_both_coordinates():
    assert ranking.pareto_front([(80, 100), (82, 50), (81, 40), (79, 100), (84, 1)]) == [True, True, False, False, True]


def test_equal_points_are_on_the_front_together():
    assert ranking.pareto_front([(80, 100), (80, 100), (79, 90)]) == [True, True, False]


@pytest.mark.parametrize(("other", "expected"), [((80, 99), False), ((79, 100), False), ((81, 99), True)])
def test_a_tie_in_one_coordinate_is_decided_by_the_other(other, expected):
    assert ranking.pareto_front([(80, 100), other]) == [True, expected]


def test_one_model_and_none_have_a_front():
    assert ranking.pareto_front([(80, 100)]) == [True]
    assert ranking.pareto_front([]) == []


# The order


def test_a_machine_that_slows_down_by_half_changes_neither_order_nor_ties():
    drift = np.linspace(1, 0.5, 15)
    speeds = {"slow": 90 * drift, "fast": 100 * drift, "as_fast": 100.5 * drift}
    assert ranking.ranked(speeds) == {"as_fast": 1, "fast": 1, "slow": 3}
    assert ranking.spread(speeds["fast"]) > ranking.NOISY


def test_a_few_disturbed_turns_do_not_change_the_order():
    fast, slow = turns(100), turns(90)
    fast[[2, 7, 11]] *= 0.2
    assert ranking.ranked({"slow": slow, "fast": fast}) == {"fast": 1, "slow": 2}
    assert ranking.typical({"slow": slow, "fast": fast})["fast"] == pytest.approx(100)


def test_models_nearer_than_the_margin_are_tied_and_stand_by_name_however_often_they_are_measured():
    for seed in range(5):
        speeds = {"b": turns(101, 200, 0.01, seed), "a": turns(100, 200, 0.01, seed + 10)}
        assert list(ranking.ranked(speeds).items()) == [("a", 1), ("b", 1)]


def test_noise_that_hides_the_difference_makes_a_tie_and_many_rounds_resolve_it():
    assert not ranking.surely_faster(turns(110, 9, 0.3), turns(100, 9, 0.3, seed=1))
    assert ranking.surely_faster(turns(110, 400, 0.1), turns(100, 400, 0.1, seed=1))


def test_no_step_in_the_order_is_one_that_was_not_seen():
    """b is told apart from neither a nor c, which differ: all three share a rank, and none is above another."""
    speeds = {"a": turns(104), "b": turns(102), "c": turns(100), "d": turns(90)}
    assert ranking.surely_faster(speeds["a"], speeds["c"])
    assert ranking.ranked(speeds) == {"a": 1, "b": 1, "c": 1, "d": 4}


def test_a_model_that_is_slower_in_most_rounds_is_not_above_though_its_usual_speed_is_higher():
    high = np.arange(15) >= 7
    a = np.exp(1.0 * high)
    b = np.where(np.arange(15) >= 12, 1.0, 1.05 * a)
    speeds = {"a": a, "b": b} | {f"steady{number}": turns(0.1) for number in range(5)}
    usual = ranking.typical(speeds)
    assert usual["a"] > usual["b"]
    assert ranking.surely_faster(b, a)
    assert [ranking.ranked(speeds)[name] for name in ("a", "b", "steady0")] == [1, 1, 3]


def test_fewer_than_six_rounds_tell_nothing_apart():
    assert 2 * 0.5**ranking.FEWEST_ROUNDS <= 1 - ranking._CONFIDENCE < 2 * 0.5 ** (ranking.FEWEST_ROUNDS - 1)
    assert ranking.ranked({"a": turns(100, 5), "b": turns(200, 5)}) == {"a": 1, "b": 1}
    assert ranking.ranked({"a": turns(100, 6), "b": turns(200, 6)}) == {"b": 1, "a": 2}


def test_the_confidence_interval_of_a_median_leaves_out_what_the_tables_say():
    assert [ranking._skipped(rounds) for rounds in (6, 9, 15, 25)] == [0, 1, 3, 7]


def test_the_order_is_told_in_a_line():
    assert ranking.order_line({"a": 1, "b": 2, "c": 2, "d": 4}) == "a > b = c > d"


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
    assert sum(parameter.numel() for parameter in candidates._built(papers).parameters()) == 38_358_300
    (tmp_path / "mine.csv").write_text("model,top1\nlevit_384,80\n")
    (mine,) = candidates.choose(["levit_384"], [tmp_path / "mine.csv"])
    assert sum(parameter.numel() for parameter in candidates._built(mine).parameters()) == 39_128_836


def test_an_evaluation_belongs_to_the_file_that_was_evaluated_and_sets_the_size(weights, tmp_path):
    path = evaluation(tmp_path / "eval.json", source=str(weights))
    mine, other = candidates.choose([str(weights), "test_vit"], [path])
    assert (mine.accuracy.top1, mine.image_size, mine.accuracy.published) == (71.5, 96, False)
    assert other.accuracy is None


def test_an_evaluation_of_other_weights_is_refused(weights, tmp_path):
    path = evaluation(tmp_path / "eval.json")
    with pytest.raises(UserError, match="eval.json: is of somewhere/best.pt, none of the models here"):
        candidates.choose([str(weights)], [path])


def test_an_evaluation_of_a_checkpoint_is_not_the_accuracy_of_timms_model_of_that_name(weights, tmp_path):
    path = evaluation(tmp_path / "eval.json", source=str(weights))
    mine, bare = candidates.choose([str(weights), "test_resnet"], [path])
    assert (mine.accuracy.top1, bare.accuracy) == (71.5, None)
    with pytest.raises(UserError, match=r"eval.json: is of .*, none of the models here"):
        candidates.choose(["test_resnet"], [path])
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
    with pytest.raises(UserError, match=r"test_resnet: .*a.json says 70 %, .*b.json 71 %. Leave one out"):
        candidates.choose(["test_resnet"], files)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "name,top1\nresnet50,80\n", "needs a line of titles with model and top1"),
        ("a.csv", "model,top1\nresnet50,80\nlevit_384,good\n", "a.csv: line 3: top1 is 'good', not a percentage"),
        ("a.csv", "model,top1\nresnet50\n", "a.csv: line 2: top1 is 'None', not a percentage"),
        ("a.csv", "model,top1,image_size\nresnet50,80,big\n", "a.csv: line 2: image_size is 'big'"),
        ("a.json", "[]", "a.json: not what python tools/evaluate.py --run.json writes"),
        ("a.json", "{", "a.json: not what python tools/evaluate.py --run.json writes"),
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
        (["resnet50", "--accuracy", "none.csv"], "error: none.csv: cannot be read"),
        (["resnet50", "--backends", "onyx"], "error: --backends: 'onyx' is not one of openvino, onnxruntime"),
        (["resnet50", "--repeats", "0"], "error: --repeats is 0; it must be at least 1"),
        (["resnet50", "--out", "file/folder"], "error: --out is file/folder: no folder can be made there"),
        (["resnet50", "--out", "/proc"], "error: --out is /proc: no file can be made there"),
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
    missing = dataclasses.replace(backends.BACKENDS["openvino"], package="no_such_package")
    monkeypatch.setitem(backends.BACKENDS, "openvino", missing)
    with pytest.raises(UserError, match=re.escape("openvino is not installed. Run: pip install -e '.[compare]'")):
        backends.choose_backends(["openvino"], "cpu")
    found, notes = backends.choose_backends(None, "cpu")
    assert "openvino" not in [backend.name for backend in found]
    assert "openvino is left out: not installed. Run: pip install -e '.[compare]'" in notes


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(UserError, match="openvino runs on cpu, not on cuda. Add --device cpu"):
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
    model = Candidate("test_resnet", "test_resnet", None, 64)
    one, other = candidates._built(model).state_dict(), candidates._built(model).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(len(value.unique()) > 1 for value in one.values() if value.numel() > 1)


# Measuring


def _serve_and_die(connection):
    connection.send("ready")
    connection.recv()
    signal.raise_signal(signal.SIGKILL)


def _serve_an_error(connection, error=None):
    raise error or ValueError("first line\nsecond line")


def _serve_a_fault(connection):
    signal.raise_signal(signal.SIGABRT)


def test_a_process_that_is_killed_is_told_with_its_signal():
    with Process(_serve_and_die) as process:
        assert process.answer() == "ready"
        process.ask()
        with pytest.raises(FailedError, match="killed by SIGKILL, perhaps for want of memory"):
            process.answer()


def test_a_process_that_a_fault_ended_is_not_said_to_want_memory():
    with Process(_serve_a_fault) as process, pytest.raises(FailedError, match="killed by SIGABRT; leave this model or"):
        process.answer()


@pytest.mark.parametrize("error", [OSError("libnvinfer.so: no such file"), EOFError("the file ends early")])
def test_a_runtimes_own_error_of_reading_is_told_as_any_other(error):
    told = f"^{type(error).__name__}: {error}$"
    with Process(_serve_an_error, error) as process, pytest.raises(FailedError, match=told):
        process.answer()


def test_want_of_the_gpus_memory_is_said_with_what_to_do():
    assert (
        measuring.one_line(torch.cuda.OutOfMemoryError("CUDA ...")) == "out of the GPU's memory; use a smaller --batch"
    )


def test_an_error_in_a_process_is_told_in_a_line():
    with Process(_serve_an_error) as process, pytest.raises(FailedError, match="^ValueError: first line second line$"):
        process.answer()


def test_a_backend_that_computes_something_else_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    model = Candidate("test_resnet", "test_resnet", None, 64)
    facts = candidates.prepare(model, tmp_path, [candidates.ONNX])
    assert (facts.parameters, facts.folded) == (469_688, 15)
    session = backends.OnnxRuntimeSession(backends.Opening(model, tmp_path, "cpu", batch=2, threads=1))
    assert measuring._difference(session, tmp_path) < 1e-4
    reference = torch.load(tmp_path / candidates.REFERENCE, weights_only=True)
    torch.save({**reference, "logits": -reference["logits"]}, tmp_path / candidates.REFERENCE)
    with pytest.raises(UserError, match="its logits are 200% away from PyTorch's"):
        measuring._difference(session, tmp_path)


def test_a_model_whose_fused_attention_is_not_exported_runs_with_plain_attention_on_these_backends_and_a_note_says_so(
    tmp_path,
):
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    (tmp_path / "hiera").mkdir()
    write_folder(tiny_hiera(), tmp_path / "hiera")
    model = Candidate("mine", "hiera_tiny_224", tmp_path / "hiera", 32)
    facts = candidates.prepare(model, tmp_path, files := [candidates.ONNX, candidates.HALF_ONNX, candidates.OPENVINO])
    assert facts.plain_attention == {*files}
    session = backends.OnnxRuntimeSession(backends.Opening(model, tmp_path, "cpu", batch=2, threads=1))
    assert measuring._difference(session, tmp_path) < 1e-4
    opened = measuring.Opened(2, 1, "float32", 1, 1 << 20, 0.0)
    names = ("openvino", "onnxruntime", "tensorrt", "eager")
    measured = [measuring.Measured(model, backends.BACKENDS[name], opened, [1.0] * 6, [1.0] * 6) for name in names]
    rows = results.rows_of({model: facts}, measured)
    assert [row["plain_attention"] for row in rows] == [True, True, True, False]
    said = "with timm's plain attention, because the fused one cannot be exported: "
    assert f"{said}mine (openvino), mine (onnxruntime), mine (tensorrt)" in results.notes(rows)


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
    rows = {(row["backend"], row["name"]): row for row in found["rows"]}
    assert set(rows) == {(b, m) for b in ("openvino", "onnxruntime", "eager") for m in ("test_resnet", "test_vit")}
    for (_, name), row in rows.items():
        if name == "test_vit":
            assert "height" in row["failed"]  # 30 px are no number of patches
            continue
        assert row["images_per_s"] > 0
        assert row["latency_ms"] > 0
        assert row["peak_memory_mib"] > 1
        assert (row["image_size"], row["top1"], row["on_front"]) == (64, 71, True)
        assert row["difference_from_pytorch"] < (0.05 if row["backend"] == "openvino" else 1e-4)
    assert rows["openvino", "test_resnet"]["precision"] in ("f16", "bf16", "f32")
    assert [rows[b, "test_resnet"]["batch"] for b in ("openvino", "onnxruntime", "eager")] == [1, 2, 2]
    assert {"cpu", "cores", "torch", "onnxruntime", "openvino"} <= set(found["machine"])


def test_the_table_as_csv_has_the_rows_without_their_turns(compared):
    rows = list(csv.DictReader(io.StringIO((compared / "comparison.csv").read_text())))
    assert len(rows) == 6
    assert not [key for key in rows[0] if key.startswith("turns_")]
    assert sum(bool(row["failed"]) for row in rows) == 3


def test_the_picture_is_one(compared):
    from PIL import Image

    with Image.open(compared / "comparison.png") as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 1


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
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert not list(tmp_path.glob("usi-compare-*"))
    assert not list((tmp_path / "out").iterdir())


# Showing


def row(model: str, backend: str = "openvino", **changes) -> dict:
    usual = {
        "rank": 1,
        "backend": backend,
        "model": model,
        "top1": 80.0,
        "top1_from": "published, arXiv",
        "top1_is_the_papers": True,
        "top1_split": "",
        "top1_digest": "",
        "plain_attention": False,
        "on_front": True,
        "front_is_sure": True,
        "turns_images_per_s": [100.0] * 15,
        "images_per_s": 100.0,
        "min": 95.0,
        "max": 105.0,
        "spread_percent": 2.0,
        "latency_ms": 20.0,
        "peak_memory_mib": 100.0,
        "parameters_m": 25.5,
        "gmacs": 4.1,
        "image_size": 224,
        "precision": "bf16",
        "batch": 1,
        "calls_at_once": 2,
    }
    return usual | changes


def test_the_page_needs_nothing_from_elsewhere_and_shows_what_is_asked_when_hovering():
    pytest.importorskip("plotly")
    page = charts.page([row("resnet50"), row("<b>evil</b>", "onnxruntime", on_front=False)], "a machine")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)\s*=", page)
    for shown in (
        "resnet50",
        "100.0 images",
        "25.50 M parameters",
        "4.100 GMACs",
        "top-1 80 %",
        "published by the paper",
    ):
        assert shown in page
    assert "onnxruntime: bf16, batch 1, 2 at once" in page  # to be chosen
    assert "\\u003cb\\u003eevil" not in page
    assert "<b>evil" not in page


def test_the_papers_accuracies_are_marked_wherever_they_show():
    rows = [row("resnet50"), row("mine", rank=2, top1=81.0, top1_from="eval.json", top1_is_the_papers=False)]
    (table,) = results.tables(rows)
    column = next(column for column in table.columns if column.header == "top-1 %")
    assert list(column.cells) == ["80.0*", "81.0"]
    assert any(note.startswith("* published by the paper (arXiv)") for note in results.notes(rows))
    assert "published, arXiv" in results.as_csv(rows)


def test_ties_and_a_noisy_machine_are_said():
    text = "\n".join(results.notes([row("a"), row("b", spread_percent=14.0), row("c", rank=3)]))
    assert "from fast to slow: a = b > c" in text
    assert "= cannot be told apart" in text
    assert "not tested" not in text
    assert "warning: the speed of 1 of 3 rows varied by more than 10% between turns (b (openvino)" in text


def test_the_front_is_that_of_the_speeds_shown_and_marks_who_is_not_surely_faster_than_the_more_accurate():
    points = {"a": (101, 79.0), "b": (100, 80.0), "c": (150, 78.0), "d": (99, 80.0)}
    rows = [
        row(name, images_per_s=speed, turns_images_per_s=turns(speed), top1=top1)
        for name, (speed, top1) in points.items()
    ]
    rows.append(row("e", top1=None))
    results._mark_front(rows)
    assert [each["on_front"] for each in rows] == [True, True, True, False, None]
    assert [each["front_is_sure"] for each in rows] == [False, True, True, None, None]
    (table,) = results.tables(rows)
    column = next(column for column in table.columns if column.header == "front")
    assert list(column.cells) == ["front?", "front", "front", "", ""]
    assert any(note.startswith("front? on the front by its speed as shown") for note in results.notes(rows))


def test_so_few_rounds_that_the_order_is_not_tested_are_said():
    text = "\n".join(results.notes([row(name, turns_images_per_s=[100.0] * 5) for name in "ab"]))
    assert "= not tested: of fewer than 6 rounds nothing can be said of the order. Use --repeats 6 or more" in text


def test_the_papers_accuracies_beside_evaluations_are_said_to_be_of_other_images_perhaps():
    mine = row("mine", top1_is_the_papers=False, top1_split="val", top1_digest="0123456789abcdef")
    said = "* is of ImageNet's validation images; the evaluations are of split 'val' with digest 0123456789ab: compare"
    assert any(note.startswith(said) for note in results.notes([row("resnet50"), mine]))
    assert not [note for rows in ([row("resnet50")], [mine]) for note in results.notes(rows) if "digest" in note]


def test_what_looks_like_markup_is_shown_as_it_is():
    name = "runs/[bold]:smile:[/x]\\"
    failed = {"backend": "openvino", "model": name, "rank": None, "failed": "[/] is no [red]tag"}
    screen = Console(file=io.StringIO(), width=200)
    for table in results.tables([row(name), failed]):
        screen.print(table)
    shown = screen.file.getvalue()
    assert shown.count(name) == 2
    assert "[/] is no [red]tag" in shown


def test_a_dollar_in_a_path_is_no_formula():
    assert charts.picture([row("runs/$\\frac$"), row("runs/a$b", top1=81.0)], "a machine").startswith(b"\x89PNG")


def test_a_name_that_is_not_utf_8_is_written_as_an_escape(tmp_path):
    model = Candidate(os.fsdecode(b"caf\xe9"), "resnet18", Path(os.fsdecode(b"caf\xe9")), 224)
    failed = measuring.Measured(model, backends.BACKENDS["eager"], failed="no weights")
    rows = results.rows_of({model: "no weights"}, [failed])
    assert rows[0]["model"] == rows[0]["weights"] == "caf\\udce9"
    assert "caf\\udce9" in results.as_csv(rows).encode().decode()


def test_the_tables_are_shown_also_where_the_files_cannot_be_written(tmp_path, monkeypatch, capsys):
    """A folder that was removed while the models were measured."""
    out = tmp_path / "out"

    def measured(*_):
        out.rmdir()
        return {}, []

    monkeypatch.setattr(compare, "_with_progress", measured)
    monkeypatch.setattr(results, "rows_of", lambda *_: [row("resnet50")])
    with pytest.raises(SystemExit):
        compare.main(["test_resnet", "--device", "cpu", "--backends", "eager", "--out", str(out)])
    said = capsys.readouterr()
    assert f"error: --out is {out}: cannot be written (No such file or directory). Name another" in said.err
    assert "resnet50" in said.out


def test_a_former_picture_does_not_stay_beside_numbers_without_accuracies(tmp_path):
    (tmp_path / "comparison.png").touch()
    plan = measuring.Plan("cpu", None, 1, 1)
    rows = [row("a", top1=None, on_front=None, top1_is_the_papers=False)]
    assert compare.write(tmp_path, rows, [], plan) == ["comparison.csv", "comparison.json"]
    assert not (tmp_path / "comparison.png").exists()


def test_a_process_ends_with_the_block_that_opened_it():
    with Process(_serve_and_die) as process:
        assert process.answer() == "ready"
    assert process._process.exitcode == 0
