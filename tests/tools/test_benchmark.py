"""The benchmarks run, on few images; nothing is said about how fast."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

from conftest import REPOSITORY
from pipelines import PipelineConfig, resolve_decode
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.synthetic import SyntheticPipeline
from support.forked_python import executable
from tools import benchmark
from tools.lib.benchmark import loader as loaders
from tools.lib.benchmark import replay as replays
from tools.lib.benchmark import step as steps
from tools.lib.benchmark import together as togethers
from tools.lib.benchmark import train as trains
from tools.lib.benchmark.photographs import photograph_index
from tools.lib.benchmark.results import markdown, read_result
from tools.lib.benchmark.runs import Setting, open_run, settings
from tools.lib.common.photos import write_common_photographs
from tools.lib.shards.build import BuildOptions, build
from trainer.config.sections import DataConfig
from trainer.feed import open_splits
from trainer.models.class_names import order_doubt


@pytest.fixture(autouse=True)
def short_timed_runs(monkeypatch):
    """The batches that are made ahead may count: no speed is looked at here."""
    for module in (replays, togethers, trains):
        monkeypatch.setattr(module, "_LEAD", 1)


@pytest.fixture
def run(tmp_path, capsys, jobs_in_this_process):
    """Runs a benchmark here. Returns its rows and what it printed."""

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
    assert len(names) == len(set(names)) == 18
    for augmentation, whats in {
        loaders.BARE: {"ours on DALI, repeats 3", "DALI's own reader", "webdataset + torchvision", "timm", "FFCV"},
        loaders.RECIPE: {"ours on torchvision", "ours on torchvision, repeats 3", "timm"},
        loaders.EVERY_OP: {"ours on torchvision", "DALI's own reader", "webdataset + torchvision", "timm"},
    }.items():
        assert {(augmentation, what) for what in whats} < set(names)
    for row in rows:
        if row["what"] == "FFCV" and "note" in row:  # It is no dependency.
            assert row["note"] == "not installed (ffcv)" and f"FFCV: {row['note']}" in printed
            continue
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == "ours on DALI" and row["what"] in printed and row["augmentation"] in printed


@pytest.mark.parametrize(
    ("module", "what"), [("webdataset", "webdataset + torchvision"), ("nvidia.dali", "ours on DALI"), ("ffcv", "FFCV")]
)
def test_a_package_that_is_missing_is_a_row_that_says_so(photos, tmp_path, monkeypatch, module, what):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pipelines.dali", raising=False)
    setting = loaders.Setting(tmp_path, photos, 1, 1, torch.device("cpu"), "roi")
    reason = loaders.failure(loaders.loaders(setting, loaders.BARE)[what])
    assert "not installed" in reason or "cannot be imported" in reason


def test_a_loader_that_fails_is_a_row_that_says_so():
    def fails():
        raise RuntimeError("no such\ndecoder")
        yield

    assert loaders.failure(fails) == "failed, RuntimeError: no such decoder"


def test_tools_probe_the_gpu_as_a_run_does(photos, monkeypatch):
    """No GPU is needed: what would be tried on it is only noted."""
    tried = []
    monkeypatch.setattr(
        "pipelines.dali_probe.decode_failure", lambda device, _, *how: tried.append((device, *how)) or ""
    )
    assert resolve_decode(PipelineConfig(), photos, torch.device("cuda", 0)) == ("roi", "it works")
    assert tried == [("cuda:0", "roi", DataConfig().hw_decoder_load)]


TINY = ("--models", "test_byobnet", "--teacher", "test_resnet", "--size", "32", "--batch", "8", "--seconds", "0.05")


def test_step_measures_ours_and_timms_update_and_the_models_alone(run):
    rows, printed = run("step", *TINY)
    learns = [row["setting"].partition(",")[0] for row in rows]
    assert learns == ["test_byobnet from test_resnet"] * 4 + ["test_byobnet alone"] * 4
    assert [row["what"] for row in rows] == 2 * [steps.OURS, steps.LOOP, steps.TIMM, steps.ALONE]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ms"] > 0 and row["ratio"] > 0, row
        assert ("overhead" in row) == (row["what"] != steps.ALONE)
        assert row["setting"].endswith("batches of 8, 32 px, fp32, not compiled")
        assert row["what"] in printed and row["setting"] in printed


def test_a_timm_with_other_tasks_is_a_row_that_says_so(monkeypatch):
    """Its tasks have no EMA of their own."""
    monkeypatch.delattr("timm.task.task.TrainingTask.setup_ema")
    rows = {row["what"]: row for row in steps.step(["test_byobnet"], "null", 8, 32, "fp32", "no", 1, 0.05)}
    assert "not measured, AttributeError" in rows[steps.TIMM]["note"] and "images_per_s" not in rows[steps.TIMM]
    assert rows[steps.OURS]["images_per_s"] > 0 and "ratio" not in rows[steps.OURS]


def test_timms_update_changes_the_student_and_its_ema(tmp_path):
    setting = Setting("test_byobnet", "null", None, 8, 32, "fp32", False)
    ours = steps.Ours(setting, tmp_path)
    timm_style = steps.TimmStyle(setting, ours.run, next(ours.batches()))
    student, average = timm_style._task.trainable_module, timm_style._task.trainable_module_ema.module
    before = [parameter.clone() for parameter in student.parameters()]
    timm_style.update()
    assert any((old != new).any() for old, new in zip(before, student.parameters(), strict=True))
    timm_style.update()
    assert any((old != new).any() for old, new in zip(student.parameters(), average.parameters(), strict=True))


def test_a_timed_loop_makes_twice_the_updates_and_times_the_second_half(tmp_path):
    ours = steps.Ours(Setting("test_byobnet", "null", None, 8, 32, "fp32", False), tmp_path)
    for stop in (4, 8):
        assert ours.loop_seconds(2) > 0
        lines = [line for line in read_json_lines(ours.run.config.run.out / "metrics.jsonl") if line["kind"] == "train"]
        assert [line["step"] for line in lines] == [*range(2, stop + 1, 2)] and ours.run.state.step == stop


def test_train_measures_a_run_on_photographs_against_itself_on_synthetic_images(run):
    rows, printed = run("train", *TINY, "--compile", "no", "--images", "16")
    pipeline = "torchvision" if on_cpu() else "dali"
    assert [row["what"] for row in rows] == ["synthetic", f"{pipeline} alone", f"real ({pipeline})"]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == "synthetic" and row["what"] in printed and row["built_s"] > 0
    assert 0 <= rows[0]["input_wait"] <= 1 and 0 <= rows[2]["input_wait"] <= 1 and "input_wait" not in rows[1]


def test_replay_measures_updates_recording_and_reading(run):
    rows, printed = run("replay", *TINY, "--compile", "no", "--images", "16")
    updates = [replays.ALONE, replays.LIVE, replays.AT_HAND, replays.REPLAY, replays.RECORDING]
    assert [row["what"] for row in rows] == [*updates, replays.LOADER, replays.BESIDE, replays.READING]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ms"] > 0 and row["ratio"] > 0, row
        assert (row.get("cpu_ms", 0) > 0) == on_cpu(), row
        assert row["of"] == (replays.ALONE if row["what"] in updates else replays.LOADER)
        assert row["what"] in printed and row["setting"] in printed


def test_students_together_are_measured_beside_one_alone(run):
    rows, printed = run("together", *TINY, "--compile", "no", "--images", "16", "--students", "2")
    assert [row["what"] for row in rows] == ["one student alone", "2 together"]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ms"] > 0 and row["ratio"] > 0, row
        assert row["of"] == "one student alone" and row["what"] in printed and row["setting"] in printed


def test_the_store_of_the_replay_benchmark_has_what_its_live_teacher_says(tmp_path):
    """Beside the run whose teacher it is, a replaying run gets targets that decode to that teacher's logits."""
    photograph_index(tmp_path, 16, 512)
    data = ["--data.root", str(tmp_path / "data"), "--augment.cycle_epochs", "1"]
    chosen = {"batch": 8, "size": 32, "precision": "fp32", "compile": "no", "classes": 16}
    setting = next(settings(["test_byobnet"], ["test_resnet"], tmp_path, **chosen))
    live = open_run(setting, tmp_path, data)
    recorder = replays.Recorder(live, setting, tmp_path / "store")
    store = recorder.record_epoch()
    recorder.record(3)
    names = sorted(path.name for path in store.glob("*.safetensors"))
    assert names == ["00000000-00000002.0-8.safetensors", "00000002-00000005.0-8.safetensors"]
    replayed = open_run(setting, tmp_path, [*data, "--teacher.store", str(store)])
    steps = []
    for run in (live, replayed):
        pipeline = SyntheticPipeline(run.plan.index, device=run.world.device)
        with contextlib.closing(replays._batches(run, pipeline)) as batches:
            steps.append([run.step.teachers(run.step.inputs(next(batches)).teachers).softmax(1) for _ in range(3)])
    for heard, read in zip(*steps, strict=True):
        torch.testing.assert_close(read, heard, rtol=0.02, atol=1e-4)
    assert not torch.equal(steps[0][0], steps[0][1])  # The steps have outputs of their own, and the third repeats one.
    assert torch.equal(steps[0][0], steps[0][2])


def test_the_classes_of_photographs_have_one_order_however_many_there_are(tmp_path):
    """As text and by number: a teacher whose outputs have no names is rejected where the two differ."""
    write_common_photographs(tmp_path / "src", 101, classes=101)
    build(tmp_path / "src", tmp_path / "data", BuildOptions(), workers=1)
    names = open_splits(DataConfig(root=tmp_path / "data"))[1]
    assert names == [f"class{number:03d}" for number in range(101)] and not order_doubt(tmp_path / "data")


def test_train_takes_torchvision_where_dali_cannot_be_used_and_says_why(photos, monkeypatch):
    def fail(*_):
        raise UserError("DALI can decode neither regions nor whole images")

    monkeypatch.setattr("tools.lib.benchmark.train.resolve_decode", fail)
    options, note = trains._pipeline_here(photos, torch.device("cuda", 0))
    assert options == ["--data.pipeline", "torchvision"]
    assert note == {"note": "without DALI: DALI can decode neither regions nor whole images"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--images", "4", "--batch", "8"), "--images 4 is less than --batch 8"),
        (("replay", "--images", "4", "--batch", "8"), "--images 4 is less than --batch 8"),
        (("replay", "--teacher", "null"), "--teacher is null: there is nothing to record"),
        (("step", "--batch", "7"), "--batch is 7: timm mixes images in pairs"),
        (("step", "--repeats", "0"), "--repeats is 0; it must be positive"),
        (("step", "--seconds", "inf"), "--seconds is inf; it must be positive and finite"),
        (("loader", "--json", "no/such/folder.json"), "folder.json: not a file in a folder that is there"),
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
    path.write_text('{"benchmark": "step", "rows": []}')
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

    monkeypatch.setitem(benchmark.BENCHMARKS, "loader", rows)
    with pytest.raises(RuntimeError):
        benchmark.main(["loader", "--json", str(tmp_path / "rows.json")])
    result = read_result(tmp_path / "rows.json")
    assert [row["what"] for row in result["rows"]] == ["first"] and not result["complete"]
    assert "Cut off before its end" in markdown(result)


def test_a_result_of_a_benchmark_that_is_gone_can_still_be_printed(tmp_path, capsys):
    path = tmp_path / "old.json"
    result = {"benchmark": "shard", "options": {}, "date": "2026-11-22", "machine": {}, "complete": True}
    path.write_text(json.dumps({**result, "rows": [{"what": "tar", "augmentation": "warm", "mb_per_s": 466}]}))
    benchmark.main(["table", str(path)])
    assert "| warm | mb_per_s |\n|---|--:|\n| tar | 466 |\n" in capsys.readouterr().out


def on_cpu() -> bool:
    return not torch.cuda.is_available()
