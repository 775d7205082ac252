"""The benchmarks run, on few images; nothing is said about how fast."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from pipelines.errors import UserError
from pipelines.index import read_index
from tools.benchmarks import loader as loaders
from tools.benchmarks import planning, resume, runs, scale
from tools.opening import decode_path
from trainer.config import DataConfig


def run(tmp_path, *arguments: str) -> tuple[list[dict], str]:
    """The rows and the printed tables of a run in a process of its own."""
    out = tmp_path / "rows.json"
    command = [sys.executable, REPOSITORY / "tools" / "benchmark.py", *arguments, "--repeats", "1", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] >= 1 and result["machine"]["timm"] != "not installed"
    return result["rows"], done.stdout


def test_read_measures_every_row_warm_and_cold(tmp_path):
    rows, printed = run(tmp_path, "read", "--images", "16")
    names = [(row["augmentation"], row["what"]) for row in rows]
    assert len(set(names)) == len(names) == 12 and {"warm", "cold"} == {temperature for temperature, _ in names}
    for row in rows:
        assert 0 < row["min"] <= row["mb_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["what"] in printed


def test_shard_measures_every_row(tmp_path):
    rows, printed = run(tmp_path, "shard", "--images", "12")
    assert [row["what"] for row in rows if row["images_per_s"] > 0 and row["mb_per_s"] > 0] == [
        "tar cf, then fsync",
        "ours, audit off",
        "decoding alone (PIL)",
        "ours, audit on",
    ]
    assert "ours, audit off" in printed


def test_loader_measures_every_row(tmp_path):
    rows, printed = run(tmp_path, "loader", "--images", "8", "--batch", "4")
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
        if row["what"] == "FFCV" and "note" in row:  # no dependency
            assert row["note"] == "not installed (ffcv)" and f"FFCV: {row['note']}" in printed
            continue
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == "ours on DALI" and (row["ratio"] == 1 or row["what"] != row["of"])
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


def test_tools_try_the_card_as_a_run_does(photos, monkeypatch):
    """On a machine without a GPU: what is tried there is only noted."""
    commands = []
    monkeypatch.setattr("pipelines.probe._try", lambda command, jpeg: commands.append(command) or "")
    assert decode_path(photos, torch.device("cuda", 0)) == ("roi", "it works")
    assert commands[0][-3:] == ["cuda:0", "roi", str(DataConfig().hw_decoder_load)]


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


def test_resume_measures_a_run_that_goes_on_deep_in_the_recipe():
    rows = resume.resume(1, "test_resnet", "none", 32, compiled=False)
    assert [(row["augmentation"], row["what"]) for row in rows] == [
        (resume.UNCOMPILED, "from step 0"),
        (resume.UNCOMPILED, "from step 300,000"),
    ]
    assert all(0 < row["built_s"] < row["seconds"] for row in rows)


def test_a_training_run_that_fails_is_told_in_its_own_words(tmp_path):
    with pytest.raises(UserError, match="2 ranks ended with code 1: .*unknown key '--run.sead'; did you mean"):
        runs.train(tmp_path, {"run.sead": 1}, ranks=2)
