"""The benchmarks run, on few images; nothing is said about how fast."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import pytest
import torch

from conftest import REPOSITORY, pytest_ignore_collect
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.index import read_index
from support.forked_python import executable
from support.mixed_batches import mixed_batch
from tools import benchmark
from tools.lib.benchmark import gpu as gpus
from tools.lib.benchmark import loader as loaders
from tools.lib.benchmark import planning, processes, resume, scale
from tools.lib.benchmark import read as reads
from tools.lib.benchmark import step as steps
from tools.lib.benchmark import teacher as teachers
from tools.lib.benchmark.runs import Setting
from tools.lib.common import timing
from tools.lib.common.opening import decode_path
from tools.lib.common.photos import write_common_photographs
from tools.lib.common.tables import markdown
from tools.lib.doctor import stages
from tools.lib.shards.job import BuildOptions, build
from trainer.config.sections import DataConfig
from trainer.feed import dataset_classes
from trainer.models.class_names import order_doubt
from trainer.models.factory import create_model
from trainer.models.preprocessing import preprocessing
from trainer.update.mixing import Normalize

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def programs_are_forks(monkeypatch):
    """What benchmarks start needs no seconds to import: nothing is said here about how fast it is."""
    monkeypatch.setattr(sys, "executable", executable())


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a benchmark here. Returns its rows and the tables that it printed."""

    def run(*arguments: str) -> tuple[list[dict], str]:
        benchmark.main([*arguments, "--repeats", "1", "--json", str(tmp_path / "rows.json")])
        return rows_of(tmp_path / "rows.json"), capsys.readouterr().out

    return run


def rows_of(path) -> list[dict]:
    result = benchmark.read_result(path)
    assert result["machine"]["cores"] >= 1 and result["machine"]["timm"] != "not installed"
    return result["rows"]


def test_read_measures_every_row_warm_and_cold(run):
    rows, printed = run("read", "--images", "16")
    names = [(row["augmentation"], row["what"]) for row in rows]
    assert len(set(names)) == len(names) == 12 and {"warm", "cold"} == {temperature for temperature, _ in names}
    for row in rows:
        assert 0 < row["min"] <= row["mb_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["what"] in printed


def test_shard_measures_every_row(run):
    rows, printed = run("shard", "--images", "12")
    assert [row["what"] for row in rows if row["images_per_s"] > 0 and row["mb_per_s"] > 0] == [
        "tar cf, then fsync",
        "ours, audit off",
        "decoding alone (PIL)",
        "ours, audit on",
    ]
    assert "ours, audit off" in printed


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
    for ours in ("ours on DALI", "ours on torchvision"):
        for stage in (stages.READING_COLD, stages.READING, stages.DECODING, stages.RESIZING, stages.PIPELINE):
            assert names.count((f"{ours}, per stage", stage)) == 1
    assert [augmentation for augmentation, what in names if what == "FFCV"] == [loaders.BARE]
    for row in rows:
        if row["what"] == "FFCV" and "note" in row:  # no dependency
            assert row["note"] == "not installed (ffcv)" and f"FFCV: {row['note']}" in printed
            continue
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == (stages.PIPELINE if "per stage" in row["augmentation"] else "ours on DALI")
        assert row["ratio"] == 1 or row["what"] != row["of"]
        assert row["what"] in printed and row["augmentation"] in printed


@pytest.mark.parametrize(
    ("module", "what"), [("webdataset", "webdataset + torchvision"), ("nvidia.dali", "DALI"), ("ffcv", "FFCV")]
)
def test_a_package_that_is_missing_is_a_row_that_says_so(photos, tmp_path, monkeypatch, module, what):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pipelines.dali", raising=False)
    setting = loaders.Setting(tmp_path, photos, 1, 1, torch.device("cpu"), "roi")
    rows = [row for row in loaders.candidates(setting) if what in row.what]
    assert rows
    for row in rows:
        reason = loaders.missing(row, setting)
        assert "not installed" in reason or "cannot be imported" in reason


def test_a_loader_that_fails_is_a_row_that_says_so(photos, tmp_path):
    def fails():
        raise RuntimeError("no such\ndecoder")
        yield

    setting = loaders.Setting(tmp_path, photos, 1, 1, torch.device("cpu"), "roi")
    reason = loaders.missing(loaders.Candidate("theirs", loaders.BARE, fails), setting)
    assert reason == "failed, RuntimeError: no such decoder"


def test_a_package_of_a_package_is_looked_for():
    """PyTorch's libraries lie in the package nvidia, too, without DALI."""
    assert reads._is_installed("email.mime") and not reads._is_installed("email.no_such_package")
    assert not reads._is_installed("no_such_package.module")


def test_tools_try_the_card_as_a_run_does(photos, monkeypatch):
    """On a machine without a GPU: what is tried there is only noted."""
    commands = []
    monkeypatch.setattr("pipelines.dali_probe._try", lambda command, jpeg: commands.append(command) or "")
    assert decode_path(photos, torch.device("cuda", 0)) == ("roi", "it works")
    assert commands[0][-3:] == ["cuda:0", "roi", str(DataConfig().hw_decoder_load)]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks would need two GPUs")
def test_scale_trains_on_every_number_of_ranks_and_compares_them_with_one():
    rows = scale.rank_rows([1, 2], 1, "test_resnet", 32, 8)
    assert [row["what"] for row in rows] == ["1 x cpu", "2 x cpu"]
    assert rows[0]["ratio"] == rows[0]["efficiency"] == 1
    assert rows[1]["efficiency"] == pytest.approx(rows[1]["ratio"] / 2, abs=1e-3)
    assert all(0 < row["min"] <= row["images_per_s"] <= row["max"] for row in rows)


def test_scale_refuses_a_batch_that_the_ranks_cannot_share():
    with pytest.raises(UserError, match="--batch is 9: 2 ranks cannot share it. Use a multiple of 2"):
        scale.rank_rows([1, 2], 1, "test_resnet", 32, 9)


def test_the_index_and_plan_of_any_size_are_measured_on_a_dataset_that_is_whole(tmp_path):
    planning.write_dataset(tmp_path / "set", 7000)
    index = read_index(tmp_path / "set", "train")
    assert len(index) == 7000 and len(index.paths) == 2
    assert index.name(6999) == "train-00001.tar: sample 000000000006999 at byte 224144896"
    rows = planning.plan_rows((1024, 7000), 2)
    assert [row["what"] for row in rows] == ["1,024 samples", "7,000 samples"]
    for row in rows:
        assert (
            0 < row["open_min"] <= row["open_s"] <= row["open_max"] and 0 < row["min"] <= row["plan_ms"] <= row["max"]
        )


@pytest.mark.long
def test_resume_measures_a_run_that_goes_on_deep_in_the_recipe():
    rows = resume.resume("test_resnet", "null", 32, "no", 1)
    assert [(row["augmentation"], row["what"]) for row in rows] == [
        (resume.UNCOMPILED, "from step 0"),
        (resume.UNCOMPILED, "from step 300,000"),
    ]
    assert all(0 < row["built_s"] < row["seconds"] for row in rows)


def test_a_training_run_that_fails_is_told_in_its_own_words(tmp_path):
    with pytest.raises(UserError, match="2 ranks ended with code 1: .*unknown key '--run.sead'; did you mean"):
        processes.run_training(tmp_path, {"run.sead": 1}, ranks=2)


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
    """Whose tasks have no average of their own."""
    monkeypatch.delattr("timm.task.task.TrainingTask.setup_ema")
    rows = {row["what"]: row for row in steps.step(("test_byobnet",), "null", 8, 32, "fp32", "no", 1, 0.05)}
    assert "not measured, AttributeError" in rows[steps.TIMM]["note"] and rows[steps.OURS]["images_per_s"] > 0


def test_timms_update_changes_the_student_and_its_average(tmp_path):
    setting = Setting("test_byobnet", None, None, 8, 32, "fp32", False)
    ours = steps.Ours(setting, tmp_path)
    timm_style = steps.TimmStyle(setting, ours.run, ours.first_batch())
    student, average = timm_style._task.trainable_module, timm_style._task.trainable_module_ema.module
    before = [parameter.clone() for parameter in student.parameters()]
    timm_style.update()
    assert any((old != new).any() for old, new in zip(before, student.parameters(), strict=True))
    timm_style.update()
    assert any((old != new).any() for old, new in zip(student.parameters(), average.parameters(), strict=True))


def test_a_turn_of_the_loop_makes_twice_the_updates_and_times_the_second_half(tmp_path):
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
    """As text and by number: a teacher whose outputs have no names is refused where the two differ."""
    write_common_photographs(tmp_path / "src", 101, classes=101)
    build(tmp_path / "src", tmp_path / "data", BuildOptions(), workers=1)
    names = dataset_classes(DataConfig(root=tmp_path / "data"))
    assert names == [f"class{number:03d}" for number in range(101)] and not order_doubt(tmp_path / "data")


def test_train_takes_torchvision_where_dali_cannot_be_used_and_says_why(run, monkeypatch):
    def refuse(*_):
        raise UserError("DALI can decode neither regions nor whole images")

    monkeypatch.setattr("tools.lib.benchmark.train.decode_path", refuse)
    rows, printed = run("train", *TINY, "--compile", "no", "--images", "16")
    assert [row["what"] for row in rows] == ["synthetic", "torchvision alone", "real (torchvision)"]
    assert {row["note"] for row in rows} == {"without DALI: DALI can decode neither regions nor whole images"}
    assert "without DALI" in printed


def test_decode_measures_the_paths_that_work_and_says_why_one_does_not(monkeypatch, run):
    """Here without a GPU; what is tried in another process is answered at once."""
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
    assert len(set(logits.argmax(1).tolist())) > 12  # of 24


def test_a_teachers_own_weights_are_measured(tmp_path, run):
    path = tmp_path / "teacher.pt"
    torch.save(create_model("test_resnet", 10, 64, {}).state_dict(), path)
    with pytest.raises(SystemExit):  # of ten classes, where there are a thousand
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
        (("shard", "--json", "no/such/folder.json"), "folder.json: not a file in a folder that is there"),
        (("read", "--json", "docs"), "docs: not a file in a folder that is there"),
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
        benchmark.read_result(path)


def test_a_result_becomes_tables_in_markdown(capsys):
    path = REPOSITORY / "docs" / "benchmark-loader.json"
    benchmark.main(["table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    titles = {row["augmentation"] for row in benchmark.read_result(path)["rows"]}
    assert lines[0].startswith("`python tools/benchmark.py loader --images 2048") and "timm" in lines[0]
    assert sum(line.startswith("|---|") for line in lines) == len(titles) > 1
    assert "| crop + flip | images/s | min | max | ratio | of |" in lines


def test_rows_that_were_measured_before_a_benchmark_ends_early_are_in_its_file(tmp_path, monkeypatch):
    def rows(**_):
        yield {"what": "first", "ratio": 1}
        raise RuntimeError

    monkeypatch.setitem(benchmark.BENCHMARKS, "read", dataclasses.replace(benchmark.BENCHMARKS["read"], rows=rows))
    with pytest.raises(RuntimeError):
        benchmark.main(["read", "--json", str(tmp_path / "rows.json")])
    result = benchmark.read_result(tmp_path / "rows.json")
    assert [row["what"] for row in result["rows"]] == ["first"] and not result["complete"]
    assert "Cut off before its end" in markdown(result, benchmark.BENCHMARKS["read"].columns)


# --- the first ten minutes on a GPU ---


def test_without_a_gpu_nothing_is_started(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--out", str(tmp_path)])
    assert "PyTorch finds no GPU here, so nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--out", "no/such/folder"])
    assert "--out no/such/folder: no such folder" in capsys.readouterr().err


HERE = {"machine": timing.machine(), "source": "this one"}


def script(name: str, code: str, limit_s: float = 60) -> gpus.Part:
    return gpus.Part(name, ("-c", code), limit_s, has_result=False)


def summary(folder) -> dict:
    return json.loads((folder / gpus.SUMMARY).read_text())


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(tmp_path, capfd):
    parts = [
        script("fails", "import sys; print('so far so good', flush=True); sys.exit('out of luck')"),
        script("crashes", "import os; os.kill(os.getpid(), 11)"),
        script("hangs", "import time; print('asleep', flush=True); time.sleep(60)", 1),
        gpus.Part("shard", ("tools/benchmark.py", "shard", "--images", "4", "--repeats", "1"), 120),
    ]
    with pytest.raises(UserError) as refused:
        gpus.run_parts(tmp_path, parts, HERE)
    assert (
        "3 of 4 parts are not done: fails (exit code 1), crashes (it ended by SIGSEGV), hangs (not done after 1 s)"
        in str(refused.value)
    )
    found = summary(tmp_path)
    assert {name: found[name] for name in HERE} == HERE
    assert [(name, part["outcome"]) for name, part in found["parts"].items()] == [
        *(("fails", gpus.FAILED), ("crashes", gpus.FAILED), ("hangs", gpus.TIMED_OUT), ("shard", gpus.DONE)),
    ]
    assert found["parts"]["fails"]["end"] == ["so far so good", "out of luck"]
    assert found["parts"]["hangs"]["end"] == ["asleep"] and found["parts"]["hangs"]["seconds"] >= 1
    assert "asleep" in capfd.readouterr().out
    assert benchmark.read_result(tmp_path / "benchmark-gpu-shard.json")["complete"]


def counting(tmp_path, name: str, code: int = 0) -> gpus.Part:
    """A part that leaves a line in a file each time."""
    return script(name, f"import sys; print('x', file=open({str(tmp_path / name)!r}, 'a')); sys.exit({code})")


def times_run(tmp_path, *names: str) -> list[int]:
    return [(tmp_path / name).read_text().count("x") for name in names]


def test_a_later_call_goes_on_with_the_parts_that_are_not_done(tmp_path):
    parts = [counting(tmp_path, "a"), counting(tmp_path, "b", code=1), counting(tmp_path, "c")]
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 3 parts are not done: b"):
            gpus.run_parts(tmp_path, parts, HERE)
    assert times_run(tmp_path, "a", "b", "c") == [1, 2, 1]
    parts[1] = counting(tmp_path, "b")
    gpus.run_parts(tmp_path, parts, HERE)
    gpus.run_parts(tmp_path, parts, HERE, again=["a"])
    assert times_run(tmp_path, "a", "b", "c") == [2, 3, 1]
    gpus.run_parts(tmp_path, parts, HERE, again=[gpus.ALL])
    assert times_run(tmp_path, "a", "b", "c") == [3, 4, 2]
    (tmp_path / gpus.SUMMARY).unlink()
    gpus.run_parts(tmp_path, parts, HERE)
    assert times_run(tmp_path, "a", "b", "c") == [4, 5, 3]


@pytest.mark.parametrize("other", [{"source": "another one"}, {"machine": {**HERE["machine"], "gpu": "NVIDIA H200"}}])
def test_on_another_machine_or_with_another_source_nothing_counts_as_done(tmp_path, other):
    parts = [counting(tmp_path, "a"), counting(tmp_path, "b")]
    gpus.run_parts(tmp_path, parts, HERE)
    gpus.run_parts(tmp_path, parts[:1], HERE | other)
    assert times_run(tmp_path, "a", "b") == [2, 1]
    assert list(summary(tmp_path)["parts"]) == ["a"], (
        "what was done elsewhere must not stand beside this machine's name"
    )


def test_the_last_part_has_the_time_that_the_others_leave(tmp_path, monkeypatch):
    sleeping = [script(name, "import time; time.sleep(1)", 0.1) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"1 of 2 parts are not done: a \(not done after 0.1 s\)"):
        gpus.run_parts(tmp_path, sleeping, HERE)
    monkeypatch.setattr(gpus, "WHOLE_S", 0)
    with pytest.raises(UserError, match=r"a \(not done after 0.1 s\), b \(not done after 0.1 s\)"):
        gpus.run_parts(tmp_path, sleeping, HERE, again=[gpus.ALL])


def test_a_part_with_other_options_or_without_its_whole_result_is_not_done(tmp_path):
    part = gpus.Part("read", ("tools/benchmark.py", "read", "--images", "4", "--repeats", "1"), 120)
    record = {"outcome": gpus.DONE, "arguments": " ".join(part.arguments)}
    result = {"complete": True, "machine": HERE["machine"]}
    path = part.result(tmp_path)
    assert not gpus.is_done(part, record, tmp_path, HERE)
    path.write_text(json.dumps(result))
    assert gpus.is_done(part, record, tmp_path, HERE)
    assert not gpus.is_done(part, {**record, "arguments": "-c pass"}, tmp_path, HERE)
    assert not gpus.is_done(part, {**record, "outcome": gpus.CUT_OFF}, tmp_path, HERE)
    assert not gpus.is_done(part, None, tmp_path, HERE)
    for change in ({"complete": False}, {"machine": {**HERE["machine"], "torch": "1.0"}}):
        path.write_text(json.dumps(result | change))
        assert not gpus.is_done(part, record, tmp_path, HERE)


def test_a_call_that_is_killed_leaves_a_summary_of_what_was_done(tmp_path):
    """The second part ends the process that started it, as a machine's time limit does."""
    kill = script("b", "import os; os.kill(os.getppid(), 9)")
    code = (
        "from pathlib import Path; from tools.lib.benchmark import gpu;"
        f"gpu.run_parts(Path({str(tmp_path)!r}), {[script('a', 'print(1)'), kill]!r}, {HERE!r})"
    ).replace("Part(", "gpu.Part(")
    ended = subprocess.run([PYTHON, "-c", code], cwd=REPOSITORY)
    assert ended.returncode == -9
    assert {name: part["outcome"] for name, part in summary(tmp_path)["parts"].items()} == {
        "a": gpus.DONE,
        "b": gpus.CUT_OFF,
    }


def test_the_source_is_every_file_that_decides_what_the_parts_do(tmp_path, monkeypatch):
    for folder in ("pipelines", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pipelines" / "a.py").write_text("1")
    monkeypatch.setattr(gpus, "REPOSITORY", tmp_path)
    digests = [gpus.source_digest()]
    (tmp_path / "pipelines" / "a.py").write_text("2")
    digests.append(gpus.source_digest())
    (tmp_path / "pipelines" / "a.py").rename(tmp_path / "tests" / "a.py")
    digests.append(gpus.source_digest())
    (tmp_path / "setup.cfg").write_text("[metadata]")
    digests.append(gpus.source_digest())
    assert len(set(digests)) == 4
    (tmp_path / "notes.md").write_text("nothing that is run")
    assert gpus.source_digest() == digests[-1]


@pytest.mark.parametrize(("selected", "opened"), [("gpu", False), ("not long", True)])
def test_tests_for_a_gpu_open_no_other_files(selected, opened):
    """A machine with a GPU may lack what others import, and time to import it."""
    config = types.SimpleNamespace(option=types.SimpleNamespace(markexpr=selected))
    paths = [REPOSITORY / "tests" / name for name in ("pipelines/plan/test_rng.py", "pipelines/ops/test_torch_ops.py")]
    assert [not pytest_ignore_collect(path, config) for path in paths] == [opened, True]


def test_the_first_ten_minutes_are_less_than_ten_and_the_docs_say_how_they_are_divided():
    """With 20 s for what this command itself does."""
    assert sum(part.limit_s + gpus.GRACE_S for part in gpus.PARTS) <= gpus.WHOLE_S <= 580
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    table = re.findall(r"^\| `([\w-]+)` \| .* \| (\d+) s( and what the others have left)? \|$", text, re.MULTILINE)
    assert [(name, limit) for name, limit, _ in table] == [(part.name, str(part.limit_s)) for part in gpus.PARTS]
    assert [bool(more) for _, _, more in table] == [part is gpus.PARTS[-1] for part in gpus.PARTS]


@pytest.mark.parametrize("part", [part for part in gpus.PARTS if part.has_result], ids=lambda part: part.name)
def test_every_part_of_the_first_ten_minutes_is_a_command_that_is_understood(part, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "first_device", lambda: torch.device("cuda", 0))
    options = benchmark._parse([*part.arguments[1:], "--json", str(part.result(tmp_path))])
    assert options.json.name == f"benchmark-gpu-{part.name}.json"
    assert getattr(options, "compile", "no") == ("yes" if part.name == "train-compiled" else "no")


def on_cpu() -> bool:
    return not torch.cuda.is_available()
