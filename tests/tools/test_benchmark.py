"""The benchmarks run, on few images; nothing is said about how fast."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from conftest import REPOSITORY
from pipelines import PipelineConfig, resolve_decode
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.forked_python import executable
from support.mixed_batches import mixed_batch
from tools import benchmark
from tools.lib.benchmark import loader as loaders
from tools.lib.benchmark import processes, resume
from tools.lib.benchmark import step as steps
from tools.lib.benchmark import teacher as teachers
from tools.lib.benchmark.results import markdown, read_result
from tools.lib.benchmark.runs import Setting
from tools.lib.common.photos import write_common_photographs
from tools.lib.shards.build import BuildOptions, build
from trainer.config.sections import DataConfig
from trainer.feed import open_splits
from trainer.models.class_names import order_doubt
from trainer.models.factory import create_model
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing


@pytest.fixture(autouse=True)
def programs_are_forks(monkeypatch):
    """The programs that benchmarks start need no seconds to import, because nothing here is about speed."""
    monkeypatch.setattr(sys, "executable", executable())


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a benchmark here. Returns its rows and the tables that it printed."""

    def run(*arguments: str) -> tuple[list[dict], str]:
        benchmark.main([*arguments, "--repeats", "1", "--json", str(tmp_path / "rows.json")])
        return rows_of(tmp_path / "rows.json"), capsys.readouterr().out

    return run


def rows_of(path) -> list[dict]:
    result = read_result(path)
    assert result["machine"]["cores"] >= 1 and result["machine"]["timm"] != "not installed"
    return result["rows"]


def test_loader_measures_every_row(tmp_path):
    """In a process of its own, which forks the workers of others from one that it starts."""
    command = [executable(), REPOSITORY / "tools" / "benchmark.py", "loader", "--images", "4", "--batch", "2"]
    command += ["--repeats", "1", "--json", tmp_path / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows, printed = rows_of(tmp_path / "rows.json"), done.stdout
    names = [(row["augmentation"], row["what"]) for row in rows]
    for augmentation in (loaders.BARE, loaders.RECIPE, loaders.EVERY_OP):
        for what in ("ours on DALI", "ours on torchvision", "timm"):
            assert names.count((augmentation, what)) == 1
    for augmentation in (loaders.BARE, loaders.EVERY_OP):
        assert {(augmentation, "DALI's own reader"), (augmentation, "webdataset + torchvision")} < set(names)
    for augmentation in (loaders.BARE, loaders.RECIPE):
        assert (augmentation, "ours on DALI, repeats 3") in names
    assert [augmentation for augmentation, what in names if what == "FFCV"] == [loaders.BARE]
    for row in rows:
        if row["what"] == "FFCV" and "note" in row:  # It is no dependency.
            assert row["note"] == "not installed (ffcv)" and f"FFCV: {row['note']}" in printed
            continue
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == "ours on DALI"
        assert row["ratio"] == 1 or row["what"] != row["of"]
        assert row["what"] in printed and row["augmentation"] in printed


@pytest.mark.parametrize(
    ("module", "what"), [("webdataset", "webdataset + torchvision"), ("nvidia.dali", "DALI"), ("ffcv", "FFCV")]
)
def test_a_package_that_is_missing_is_a_row_that_says_so(photos, tmp_path, monkeypatch, module, what):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pipelines.dali", raising=False)
    setting = loaders.Setting(tmp_path, photos, 1, 1, torch.device("cpu"), PipelineConfig(threads=1, decode="roi"))
    rows = [row for row in loaders.candidates(setting) if what in row.what]
    assert rows
    for row in rows:
        reason = loaders.missing(row, setting)
        assert "not installed" in reason or "cannot be imported" in reason


def test_a_loader_that_fails_is_a_row_that_says_so(photos, tmp_path):
    def fails():
        raise RuntimeError("no such\ndecoder")
        yield

    setting = loaders.Setting(tmp_path, photos, 1, 1, torch.device("cpu"), PipelineConfig(threads=1, decode="roi"))
    reason = loaders.missing(loaders.Candidate("theirs", loaders.BARE, fails), setting)
    assert reason == "failed, RuntimeError: no such decoder"


def test_tools_probe_the_gpu_as_a_run_does(photos, monkeypatch):
    """No GPU is needed: the command that would probe it is only noted."""
    commands = []
    monkeypatch.setattr("pipelines.dali_probe._try", lambda command, jpeg: commands.append(command) or "")
    assert resolve_decode(PipelineConfig(), photos, torch.device("cuda", 0)) == ("roi", "it works")
    assert commands[0][-3:] == ["cuda:0", "roi", str(DataConfig().hw_decoder_load)]


@pytest.mark.long
def test_resume_measures_a_run_that_resumes_deep_in_the_recipe():
    rows = resume.resume("test_resnet", "null", 32, "no", 1)
    assert [(row["augmentation"], row["what"]) for row in rows] == [
        (resume.UNCOMPILED, "from step 0"),
        (resume.UNCOMPILED, "from step 300,000"),
    ]
    assert all(0 < row["built_s"] < row["seconds"] for row in rows)


def test_a_training_run_that_fails_is_reported_with_its_own_error(tmp_path):
    with pytest.raises(UserError, match="run.py ended with code 1: .*unknown key '--run.sead'; did you mean"):
        processes.run_training(tmp_path, {"run.sead": 1})


TINY = ("--models", "test_byobnet", "--teacher", "test_resnet", "--size", "32", "--batch", "8", "--seconds", "0.05")


def test_step_measures_ours_and_timms_update_and_the_models_alone(run):
    rows, printed = run("step", *TINY)
    assert [(row["teacher"], row["what"]) for row in rows] == [
        (teacher, what)
        for teacher in ("test_resnet", None)
        for what in (steps.OURS, steps.LOOP, steps.TIMM, steps.ALONE)
    ]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ms"] > 0 and row["ratio"] > 0, row
        assert ("overhead" in row) == (row["what"] != steps.ALONE)
        assert (row["batch"], row["size"], row["compiled"]) == (8, 32, False)
        assert row["what"] in printed and row["setting"] in printed


def test_a_timm_without_tasks_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.task", None)
    rows = {row["what"]: row for row in steps.step(("test_byobnet",), "null", 8, 32, "fp32", "no", 1, 0.05)}
    assert "not measured, ModuleNotFoundError" in rows[steps.TIMM]["note"] and "images_per_s" not in rows[steps.TIMM]
    assert rows[steps.OURS]["images_per_s"] > 0 and "ratio" not in rows[steps.OURS]


def test_a_timm_with_other_tasks_is_a_row_that_says_so(monkeypatch):
    """Its tasks have no EMA of their own."""
    monkeypatch.delattr("timm.task.task.TrainingTask.setup_ema")
    rows = {row["what"]: row for row in steps.step(("test_byobnet",), "null", 8, 32, "fp32", "no", 1, 0.05)}
    assert "not measured, AttributeError" in rows[steps.TIMM]["note"] and rows[steps.OURS]["images_per_s"] > 0


def test_timms_update_changes_the_student_and_its_ema(tmp_path):
    setting = Setting("test_byobnet", None, None, 8, 32, "fp32", False)
    ours = steps.Ours(setting, tmp_path)
    timm_style = steps.TimmStyle(setting, ours.run, ours.first_batch())
    student, average = timm_style._task.trainable_module, timm_style._task.trainable_module_ema.module
    before = [parameter.clone() for parameter in student.parameters()]
    timm_style.update()
    assert any((old != new).any() for old, new in zip(before, student.parameters(), strict=True))
    timm_style.update()
    assert any((old != new).any() for old, new in zip(student.parameters(), average.parameters(), strict=True))


def test_a_timed_loop_makes_twice_the_updates_and_times_the_second_half(tmp_path):
    ours = steps.Ours(Setting("test_byobnet", None, None, 8, 32, "fp32", False), tmp_path)
    for _ in range(2):
        assert ours.loop_seconds(2) > 0
        lines = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
        assert [line["step"] for line in lines] == [2, 4] and ours.run.state.step == 4


def test_train_measures_a_run_on_photographs_against_itself_on_synthetic_images(run):
    rows, printed = run("train", *TINY, "--compile", "no", "--images", "16")
    pipeline = "torchvision" if on_cpu() else "dali"
    assert [row["what"] for row in rows] == ["synthetic", f"{pipeline} alone", f"real ({pipeline})"]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == "synthetic" and row["what"] in printed and row["built_s"] > 0
    assert 0 <= rows[0]["input_wait"] <= 1 and 0 <= rows[2]["input_wait"] <= 1 and "input_wait" not in rows[1]


def test_the_classes_of_photographs_have_one_order_however_many_there_are(tmp_path):
    """As text and by number: a teacher whose outputs have no names is rejected where the two differ."""
    write_common_photographs(tmp_path / "src", 101, classes=101)
    build(tmp_path / "src", tmp_path / "data", BuildOptions(), workers=1)
    names = open_splits(DataConfig(root=tmp_path / "data"))[1]
    assert names == [f"class{number:03d}" for number in range(101)] and not order_doubt(tmp_path / "data")


def test_train_takes_torchvision_where_dali_cannot_be_used_and_says_why(run, monkeypatch):
    def fail(*_):
        raise UserError("DALI can decode neither regions nor whole images")

    monkeypatch.setattr("tools.lib.benchmark.train.resolve_decode", fail)
    rows, printed = run("train", *TINY, "--compile", "no", "--images", "16")
    assert [row["what"] for row in rows] == ["synthetic", "torchvision alone", "real (torchvision)"]
    assert {row["note"] for row in rows} == {"without DALI: DALI can decode neither regions nor whole images"}
    assert "without DALI" in printed


def test_decode_measures_the_paths_that_work_and_says_why_one_does_not(monkeypatch, run):
    """Without a GPU; the answer of the process that would try a path is given at once."""
    tried = []

    def failure(device, jpeg, path, load):
        tried.append((device, path, load))
        return "it ended by SIGSEGV" if path == "roi" else ""

    monkeypatch.setattr("tools.lib.benchmark.decode.decode_failure", failure)
    monkeypatch.setattr("tools.lib.benchmark.decode.first_device", lambda: torch.device("cpu"))
    rows, printed = run("decode", "--images", "8", "--batch", "4")
    assert tried == [("cpu", "full", 0.0), ("cpu", "roi", 0.0)]
    assert [(row["what"].split(",")[0], row["works"]) for row in rows] == [("full", "yes"), ("roi", "no")]
    assert 0 < rows[0]["min"] <= rows[0]["images_per_s"] <= rows[0]["max"]
    assert "full, hw_decoder_load 0: works yes, images/s " in printed  # It is printed as soon as it is known.
    assert "images_per_s" not in rows[1] and "roi, hw_decoder_load 0: does not work: it ended by SIGSEGV" in printed


def test_a_teacher_is_nearer_to_fp32_in_fp16_than_in_bf16(run):
    rows, printed = run("teacher", "--teacher", "test_resnet", "--images", "16", "--size", "64", "--seconds", "0.05")
    exact, bf16, fp16 = rows
    assert [row["what"] for row in rows] == ["fp32", "bf16", "fp16"] and "KL from fp32" in printed
    assert (exact["kl"], exact["kl_max"], exact["agreement"]) == (0, 0, 1)
    assert 0 < fp16["kl"] < bf16["kl"] < 0.1 and fp16["kl"] <= fp16["kl_max"]
    assert 0.5 < bf16["agreement"] <= fp16["agreement"] <= 1
    assert all(0 < row["min"] <= row["images_per_s"] <= row["max"] for row in rows)


def test_random_weights_give_a_teacher_logits_that_differ_between_images():
    batch = mixed_batch(64, 8)
    model = create_model("test_resnet", 1000, 64, {}, teachers.weights_that_differ("test_resnet", 64, batch), "here")
    expects = preprocessing(model)
    with torch.no_grad():
        logits = model.eval()(Normalize(expects.mean, expects.std)(batch.images))
    assert logits.std(dim=1).mean().item() == pytest.approx(2.5, rel=0.1)
    assert len(set(logits.argmax(1).tolist())) > 12  # There are 24.


def test_a_teachers_own_weights_are_measured(tmp_path, run):
    path = tmp_path / "teacher.pt"
    torch.save(create_model("test_resnet", 10, 64, {}).state_dict(), path)
    with pytest.raises(SystemExit):  # They have ten classes instead of a thousand.
        run("teacher", "--teacher", "test_resnet", "--checkpoint", str(path), "--images", "4", "--size", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", "--compile", "maybe"), "--compile is 'maybe', not one of no, yes, both"),
        (("step", "--precision", "fp8"), "--precision is 'fp8', not auto, bf16 or fp32"),
        (("train", "--images", "4", "--batch", "8"), "--images 4 is less than --batch 8"),
        (("step", "--batch", "7"), "--batch is 7: timm mixes images in pairs"),
        (("step", "--repeats", "0"), "--repeats is 0; it must be positive"),
        (("step", "--seconds", "inf"), "--seconds is inf; it must be positive and finite"),
        (("decode", "--json", "no/such/folder.json"), "folder.json: not a file in a folder that is there"),
        (("decode", "--json", "docs"), "docs: not a file in a folder that is there"),
        (("table", "no-such-file.json"), "no-such-file.json: cannot be read"),
        (("table", "setup.cfg"), "setup.cfg: cannot be read"),
    ],
)
def test_a_command_that_cannot_be_done_is_refused_in_a_line(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit):
        benchmark.main([*arguments])
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_a_file_that_holds_something_else_is_no_result(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match="other.json: not a result of tools/benchmark.py"):
        read_result(path)


def test_a_result_becomes_tables_in_markdown(capsys):
    path = REPOSITORY / "docs" / "results" / "benchmark-loader.json"
    benchmark.main(["table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    titles = {row["augmentation"] for row in read_result(path)["rows"]}
    assert lines[0].startswith("`python tools/benchmark.py loader --images 2048") and "timm" in lines[0]
    assert sum(line.startswith("|---|") for line in lines) == len(titles) > 1
    assert "| crop + flip | images/s | min | max | ratio | of |" in lines


def test_rows_that_were_measured_before_a_benchmark_ends_early_are_in_its_file(tmp_path, monkeypatch):
    def rows(**_):
        yield {"what": "first", "ratio": 1}
        raise RuntimeError

    measured = dataclasses.replace(benchmark.BENCHMARKS["decode"], rows=rows)
    monkeypatch.setitem(benchmark.BENCHMARKS, "decode", measured)
    with pytest.raises(RuntimeError):
        benchmark.main(["decode", "--json", str(tmp_path / "rows.json")])
    result = read_result(tmp_path / "rows.json")
    assert [row["what"] for row in result["rows"]] == ["first"] and not result["complete"]
    assert "Cut off before its end" in markdown(result, benchmark.columns_of(result))


def test_a_result_of_a_benchmark_that_is_gone_can_still_be_printed(tmp_path, capsys):
    path = tmp_path / "old.json"
    result = {"benchmark": "shard", "options": {}, "date": "2026-11-22", "machine": {}, "complete": True}
    path.write_text(json.dumps({**result, "rows": [{"what": "tar", "augmentation": "warm", "mb_per_s": 466}]}))
    benchmark.main(["table", str(path)])
    assert "| warm | mb_per_s |\n|---|--:|\n| tar | 466 |\n" in capsys.readouterr().out


def on_cpu() -> bool:
    return not torch.cuda.is_available()
