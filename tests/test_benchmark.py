"""The benchmarks run, on few images; nothing is said about how fast."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from tools.benchmarks import loader as loaders
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
