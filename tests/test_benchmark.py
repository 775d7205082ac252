"""The benchmarks run, on few images; nothing is said about how fast."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from forked_python import executable

from pipelines.errors import UserError
from pipelines.files import read_json_lines
from pipelines.index import read_index
from tools import benchmark
from tools.benchmarks import gpu as gpus
from tools.benchmarks import loader as loaders
from tools.benchmarks import planning, processes, resume, scale, stages
from tools.benchmarks import read as reads
from tools.benchmarks import step as steps
from tools.benchmarks.runs import Setting
from tools.benchmarks.tables import markdown
from tools.opening import decode_path
from trainer.config import DataConfig


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
    rows = [row for row in loaders.contenders(setting) if what in row.what]
    assert rows
    for row in rows:
        reason = loaders.missing(row, setting)
        assert "not installed" in reason or "cannot be imported" in reason


def test_a_loader_that_fails_is_a_row_that_says_so(photos, tmp_path):
    def fails():
        raise RuntimeError("no such\ndecoder")
        yield

    setting = loaders.Setting(tmp_path, photos, 1, 1, torch.device("cpu"), "roi")
    reason = loaders.missing(loaders.Contender("theirs", loaders.BARE, fails), setting)
    assert reason == "failed, RuntimeError: no such decoder"


def test_a_package_of_a_package_is_looked_for():
    """PyTorch's libraries lie in the package nvidia, too, without DALI."""
    assert reads._is_installed("email.mime") and not reads._is_installed("email.no_such_package")
    assert not reads._is_installed("no_such_package.module")


def test_tools_try_the_card_as_a_run_does(photos, monkeypatch):
    """On a machine without a GPU: what is tried there is only noted."""
    commands = []
    monkeypatch.setattr("pipelines.probe._try", lambda command, jpeg: commands.append(command) or "")
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
    rows, printed = run("train", *TINY, "--images", "16")
    assert [row["what"] for row in rows] == ["synthetic", "real (torchvision)" if on_cpu() else "real (dali)"]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and 0 <= row["input_wait"] <= 1, row
        assert row["of"] == "synthetic" and row["what"] in printed


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


def test_the_gpus_benchmark_says_where_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["gpu"])
    assert "PyTorch finds no GPU here, so nothing was measured" in capsys.readouterr().err


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(tmp_path):
    parts = [
        gpus.Part("no-such-benchmark", (), 60),
        gpus.Part("read", (), 0.1),
        gpus.Part("shard", ("--images", "4", "--repeats", "1"), 120),
    ]
    with pytest.raises(UserError) as refused:
        gpus.run_parts(tmp_path, parts)
    assert "2 of 3 benchmarks failed: no-such-benchmark (exit code 2), read (not done after 0.1 s)" in str(
        refused.value
    )
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark-gpu-shard.json"]
    assert benchmark.read_result(tmp_path / "benchmark-gpu-shard.json")["complete"]


def test_the_parts_share_what_torch_compile_makes(tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    script.write_text("import os; open(os.path.join(os.environ['TORCHINDUCTOR_CACHE_DIR'], 'made'), 'x')")
    monkeypatch.setattr(gpus, "_SCRIPT", script)
    with pytest.raises(UserError, match=r"1 of 2 benchmarks failed: second \(exit code 1\)"):  # for it is there
        gpus.run_parts(tmp_path, [gpus.Part("first", (), 60), gpus.Part("second", (), 60)])


def test_the_gpus_benchmark_takes_less_than_ten_minutes():
    assert sum(part.limit_s + gpus.GRACE_S for part in gpus.PARTS) < 600


def on_cpu() -> bool:
    return not torch.cuda.is_available()
