"""The rows of a comparison as tables, notes, files, a picture and a page."""

import dataclasses
import io
import os
import re

import pytest
import timm
import torch
from rich.console import Console

from tools import compare
from tools.lib.common import front
from tools.lib.compare import charts, results
from tools.lib.compare.backends import Plan
from tools.lib.compare.candidates import choose
from tools.lib.compare.results import FailedRow, Row

USUAL = Row(
    rank=1,
    backend="openvino",
    model="a model",
    name="resnet50",
    weights="random",
    top1=80.0,
    top1_from="published, arXiv",
    top1_is_the_papers=True,
    top1_split="",
    top1_digest="",
    plain_attention=False,
    on_front=True,
    front_is_sure=True,
    timed_images_per_s=[100.0] * 15,
    timed_latency_s=[0.02] * 15,
    images_per_s=100.0,
    min=95.0,
    max=105.0,
    spread_percent=2.0,
    latency_ms=20.0,
    latency_min_ms=19.0,
    latency_max_ms=21.0,
    peak_memory_mib=100.0,
    parameters_m=25.5,
    gmacs=4.1,
    image_size=224,
    precision="bf16",
    batch=1,
    calls_at_once=2,
    difference_from_pytorch=0.01,
)


def row(model: str, backend: str = "openvino", **changes) -> Row:
    return dataclasses.replace(USUAL, model=model, backend=backend, **changes)


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


def test_the_page_says_what_noise_decides_as_the_picture_does():
    pytest.importorskip("plotly")
    rows = [
        row("a", images_per_s=50.0, top1=90.0),
        row("b", front_is_sure=False),
        row("c", images_per_s=9.0, top1=95.0),
    ]
    page = charts.page([*rows, row("d", on_front=False)], "a machine")
    words = (*front.LEGEND.values(), *(words for _, words in front.LINES.values()))
    assert all(each in page for each in words) and '"dash":"dash"' in page and '"dash":"solid"' in page


def test_the_papers_accuracies_are_marked_wherever_they_show():
    rows = [row("resnet50"), row("mine", rank=2, top1=81.0, top1_from="eval.json", top1_is_the_papers=False)]
    (table,) = results.tables(rows, [])
    column = next(column for column in table.columns if column.header == "top-1 %")
    assert list(column.cells) == ["80.0*", "81.0"]
    assert any(note.startswith("* published, arXiv: by the paper") for note in results.notes(rows))
    assert "published, arXiv" in results.as_csv(rows, [])


def test_ties_and_a_noisy_machine_are_said():
    text = "\n".join(results.notes([row("a"), row("b", spread_percent=14.0), row("c", rank=3)]))
    assert "from fast to slow (= the speeds are too close to call): a = b > c" in text
    assert "not tested" not in text
    assert "warning: the speed of 1 of 3 rows varied by more than 10% between timed runs: b (openvino)" in text


def test_the_front_is_that_of_the_speeds_shown_and_marks_who_is_not_surely_faster_than_the_more_accurate():
    points = {"a": (101, 79.0), "b": (100, 80.0), "c": (150, 78.0), "d": (99, 80.0)}
    rows = [
        row(name, on_front=None, front_is_sure=None, images_per_s=speed, timed_images_per_s=[speed] * 15, top1=top1)
        for name, (speed, top1) in points.items()
    ]
    rows.append(row("e", on_front=None, front_is_sure=None, top1=None))
    results.mark_front(rows)
    assert [each.on_front for each in rows] == [True, True, True, False, None]
    assert [each.front_is_sure for each in rows] == [False, True, True, None, None]
    (table,) = results.tables(rows, [])
    column = next(column for column in table.columns if column.header == "front")
    assert list(column.cells) == ["front?", "front", "front", "", ""]
    assert any(note.startswith("front? on the front by its speed as shown") for note in results.notes(rows))


def test_too_few_rounds_to_test_the_order_are_noted():
    text = "\n".join(results.notes([row(name, timed_images_per_s=[100.0] * 5) for name in "ab"]))
    assert "openvino: the order is not tested. Use --repeats 6 or more" in text and "=" not in text


def test_the_papers_accuracies_beside_evaluations_are_said_to_be_of_other_images_perhaps():
    mine = row("mine", top1_is_the_papers=False, top1_split="val", top1_digest="0123456789abcdef")
    said = "evaluations are of split 'val' with digest 0123456789ab: compare them with *"
    assert any(note.startswith(said) for note in results.notes([row("resnet50"), mine]))
    assert not [note for rows in ([row("resnet50")], [mine]) for note in results.notes(rows) if "digest" in note]


def test_what_looks_like_markup_is_shown_unchanged():
    name = "runs/[bold]:smile:[/x]\\"
    failed = FailedRow("openvino", name, "[/] is no [red]tag")
    screen = Console(file=io.StringIO(), width=200)
    for table in results.tables([row(name)], [failed]):
        screen.print(table)
    shown = screen.file.getvalue()
    assert shown.count(name) == 2
    assert "[/] is no [red]tag" in shown


def test_a_dollar_in_a_path_is_no_formula():
    assert charts.picture([row("runs/$\\frac$"), row("runs/a$b", top1=81.0)], "a machine").startswith(b"\x89PNG")


def test_a_name_that_is_not_utf_8_is_written_as_an_escape(tmp_path):
    weights, accuracies = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9.pth", b"\xe9.csv"))
    torch.save({"arch": "test_resnet", "state_dict": timm.create_model("test_resnet").state_dict()}, weights)
    accuracies.write_bytes(b"model,top1\ntest_resnet,70\n")
    candidate, other = choose([str(weights), "test_resnet"], [accuracies])
    assert candidate.label == f"{tmp_path}/caf\\udce9.pth"
    assert other.accuracy.said_by == f"{tmp_path}/\\udce9.csv"


def test_the_tables_are_shown_also_where_the_files_cannot_be_written(tmp_path, monkeypatch, capsys):
    """A folder that was removed while the models were measured."""
    out = tmp_path / "out"
    monkeypatch.setattr(compare, "measure", lambda *_: out.rmdir())
    monkeypatch.setattr(results, "rows_of", lambda _: ([row("resnet50")], []))
    with pytest.raises(SystemExit):
        compare.main(["test_resnet", "--device", "cpu", "--backends", "eager", "--out", str(out)])
    said = capsys.readouterr()
    assert f"error: {out}/comparison.csv" in said.err and "No such file or directory" in said.err
    assert "resnet50" in said.out


def test_a_former_picture_does_not_stay_beside_numbers_without_accuracies(tmp_path):
    (tmp_path / "comparison.png").touch()
    plan = Plan("cpu", batch=1, repeats=1, threads=1)
    rows = [row("a", top1=None, on_front=None, top1_is_the_papers=False)]
    assert compare.write(tmp_path, rows, [], [], plan) == ["comparison.csv", "comparison.json"]
    assert not (tmp_path / "comparison.png").exists()
