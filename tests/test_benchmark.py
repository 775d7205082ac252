"""The benchmarks run, on few images; nothing is said about how fast."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from pipelines.errors import UserError
from tools import benchmark
from tools.benchmarks import loader as loaders
from tools.benchmarks.tables import markdown
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
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] and row["ratio"] > 0, row
        assert row["of"] == "ours on DALI" and (row["ratio"] == 1 or row["what"] != row["of"])
        assert row["what"] in printed and row["augmentation"] in printed


@pytest.mark.parametrize(("module", "what"), [("webdataset", "webdataset + torchvision"), ("nvidia.dali", "DALI")])
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shard", "--json", "no/such/folder.json"), "no/such is not a folder"),
        (("table", "no-such-file.json"), "no-such-file.json: cannot be read"),
        (("table", "setup.cfg"), "setup.cfg: cannot be read"),
    ],
)
def test_a_command_that_cannot_be_done_is_refused_in_a_line(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit):
        benchmark.main([*arguments])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_holds_something_else_is_no_result(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match="other.json: not a result of tools/benchmark.py"):
        benchmark.read_result(path)


def test_a_result_becomes_tables_in_markdown(capsys):
    benchmark.main(["table", str(REPOSITORY / "docs" / "benchmark-loader.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`python tools/benchmark.py loader --images 2048") and "timm" in lines[0]
    assert sum(line.startswith("|---|") for line in lines) == 3
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
