"""The parity report holds, and says so where it does not."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from support.processes import without_workers
from tools import parity
from tools.lib.parity import rows as comparison
from tools.lib.parity import stages, timm_reference
from tools.lib.parity.rows import EXACT, Tolerance, compare


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[comparison.Row]:
    with without_workers():
        photos = stages.open_photos(tmp_path_factory.mktemp("parity"))
    return list(stages.report(photos, size=64))


def test_every_stage_is_within_its_tolerance(rows):
    assert not [row for row in rows if not row.ok]
    compared = {(row.stage, row.ours) for row in rows if row.images}
    for stage in ("decode", "crop + bicubic resize", "flip", "evaluation, bicubic", "top-1 of a ResNet-18"):
        assert {(stage, "torchvision")} < {pair for pair in compared if pair[0] == stage}, stage
    assert len([stage for stage, ours in compared if "RandAugment: " in stage and ours == "torchvision"]) == 15
    assert {("mixup", "trainer.update.mixing"), ("CutMix", "trainer.update.mixing")} <= compared


def test_the_cpu_pipeline_equals_timms_whole_training_transform_but_for_the_resize(rows):
    """Drawing the same numbers: which crop, which operations, which arguments, and how they are done."""
    (row,) = [row for row in rows if row.stage == "whole training transform" and row.against == "timm with our resize"]
    assert row.images >= 100 and row.max == 0 and row.tolerance == str(EXACT)


def test_a_difference_above_the_tolerance_is_not_ok():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 2, np.uint8)
    row = compare("stage", "ours", "theirs", [(black, black), (black, grey)], Tolerance(max=1))
    assert not row.ok and row.max == 2 and row.mean == 2 and row.off_by_more == 0.5 and row.images == 2
    assert compare("stage", "ours", "theirs", [(black, black), (black, grey)], Tolerance(2, 1.0), "aa").ok
    assert not compare("stage", "ours", "theirs", [(black, black), (black, grey)], Tolerance(2, 1.0), "ab").ok


def test_timms_operations_are_in_the_order_of_ours():
    from timm.data.auto_augment import rand_augment_transform

    timms = rand_augment_transform(timm_reference.RANDAUGMENT, {})
    assert [op.name for op in timms.ops] == list(timm_reference.NAMES.values())
    assert list(timm_reference.NAMES) == sorted(timm_reference.NAMES)


def test_an_exceeded_tolerance_ends_the_command_with_1(rows, monkeypatch, tmp_path, capsys):
    bad = dataclasses.replace(rows[0], ok=False)
    monkeypatch.setattr(parity, "report", lambda photos, size: [*rows[1:], bad])
    monkeypatch.setattr(parity, "open_photos", lambda folder: None)
    document = tmp_path / "parity.md"
    document.write_text(f"before\n{parity.BEGIN}\nold\n{parity.END}\nafter\n")
    with pytest.raises(SystemExit, match=f"1 of {len(rows)} comparisons exceed their tolerance"):
        parity.main(["--json", str(tmp_path / "rows.json"), "--markdown", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| ") == len(rows) + 1 and "| NO |" in text


def test_a_report_that_nobody_reads_is_written(rows, monkeypatch, tmp_path):
    """Behind `| head -1` rich ends the process."""
    monkeypatch.setattr(parity, "report", lambda photos, size: rows)
    monkeypatch.setattr(parity, "open_photos", lambda folder: None)
    monkeypatch.setattr(parity, "console", lambda: sys.exit(1))
    with pytest.raises(SystemExit):
        parity.main(["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "parity.md")])
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "parity.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/rows.json"], "--json nowhere/rows.json: not a file in a folder that is there"),
        (["--markdown", "/"], "--markdown /: not a file"),
        (["--size", "0"], "--size is 0; it must be at least 1"),
    ],
)
def test_what_could_only_fail_after_the_comparison_is_refused_before_it(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parity.main(arguments)
    assert f"error: {message}" in capsys.readouterr().err
