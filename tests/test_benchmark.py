"""The benchmarks run, on few images; nothing is said about how fast."""

import json
import sys

import pytest

from tools.benchmark import main
from tools.benchmarks import loader as loaders


def run(command: str, tmp_path, *options: str) -> list[dict]:
    out = tmp_path / "rows.json"
    main([command, *options, "--repeats", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] >= 1 and result["machine"]["timm"] != "not installed"
    return result["rows"]


def test_shard_measures_every_row(tmp_path, capsys):
    rows = run("shard", tmp_path, "--images", "12")
    assert [row["what"] for row in rows if row["images_per_s"] > 0 and row["mb_per_s"] > 0] == [
        "tar cf, then fsync",
        "ours, audit off",
        "decoding alone (PIL)",
        "ours, audit on",
    ]
    assert "ours, audit off" in capsys.readouterr().out


def test_loader_measures_every_row_or_says_why_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loaders, "SIZE_PX", 64)
    rows = run("loader", tmp_path, "--images", "12", "--batch", "4")
    by_name = {(row["augmentation"], row["what"]): row for row in rows}
    assert len(by_name) == len(rows)
    for augmentation in (loaders.BARE, loaders.EVERY_OP):
        for what in ("DALI's own reader", "webdataset + torchvision", "timm", "ours on torchvision"):
            row = by_name[augmentation, what]
            assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
    for what in ("timm", "ours on torchvision", "ours on torchvision, repeats 3"):
        assert by_name[loaders.RECIPE, what]["images_per_s"] > 0
    assert by_name[loaders.BARE, "ours on DALI"]["ratio"] == 1
    assert all(("images_per_s" in row) != bool(row.get("note")) for row in rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*loaders._RANDAUGMENT, "ours on DALI", "timm"))


@pytest.mark.parametrize(("module", "what"), [("webdataset", "webdataset + torchvision"), ("nvidia.dali", "DALI")])
def test_a_package_that_is_missing_is_a_row_that_says_so(photos, tmp_path, monkeypatch, module, what):
    import torch

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pipelines.dali", raising=False)
    setting = loaders.Setting(tmp_path, photos, 2, 1, torch.device("cpu"))
    rows = [row for row in loaders.contenders(setting) if what in row.what]
    assert rows
    for row in rows:
        reason = loaders.missing(row, setting)
        assert "not installed" in reason or "cannot be imported" in reason
