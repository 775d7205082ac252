"""The report on runs: finished, in progress, killed, compared; and the images that the student saw first."""

import ast
import base64
import io
import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trainer.monitor.report.page
from conftest import REPOSITORY, TINY
from pipelines.batch import Batch
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from tools.report import main
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import parse, to_yaml
from trainer.feed import rank_plans
from trainer.loop import train
from trainer.monitor.report.charts import moving_average
from trainer.monitor.report.page import charts, differing_settings, numbers, read_run, report_or_reason, write_report
from trainer.monitor.sample_grid import keep_samples, strip_png
from trainer.monitor.telemetry import Telemetry
from trainer.update.mixing import mix_pixels

ONE = World(0, 1, 1, torch.device("cpu"))
EVERY = ["--run.log_every", "1"]


def train_here(digits: Path, out: Path, *arguments) -> dict:
    return train(
        build(parse([*TINY, *EVERY, "--data.root", str(digits), "--run.out", str(out), *map(str, arguments)]), ONE)
    )


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> Path:
    """A run of 20 steps, restarted after 7 and 12."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    for stop in (7, 12, 0):
        train_here(digits, out, "--run.stop_after_steps", stop)
    return out


@pytest.fixture
def without_drawings(monkeypatch):
    """Reports have a few bytes in place of each chart, which takes a quarter of a second to draw."""
    monkeypatch.setattr(trainer.monitor.report.page, "draw", lambda chart: b"undrawn")


def logged(out: Path, steps: int, *arguments, evaluated: bool = True, teacher: bool = False) -> Path:
    """The folder of a run that was killed after `steps` steps, 5 an epoch."""
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(to_yaml(parse([*TINY, "--run.out", str(out), *map(str, arguments)])))
    telemetry = Telemetry(out, ONE, step=0, total_steps=20, steps_per_epoch=5)
    with telemetry.live():
        for step in range(1, steps + 1):
            telemetry.advance(step)
            record = {"epoch": (step - 1) // 5, "loss": 3 / step, "lr": 1e-3, "images_per_s": 100.0, "input_wait": 0.1}
            more = {"teacher_top1": 80.0, "agreement": 4.0 * step} if teacher else {}
            telemetry.train({"step": step, **record, **more})
            if evaluated and step % 5 == 0:
                top1 = {"top1": 10.0 + step, "top5": 50.0, "loss": 2.0, "images": 96}
                telemetry.evaluation(step, {"raw": top1, "ema": {**top1, "top1": 20.0}})
    return out


class Page(HTMLParser):
    """What a page shows and what it asks for."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.asks, self.pictures, self.tags = "", [], {}, set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.asks += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag == "img":
            self.pictures[attributes["alt"]] = base64.b64decode(attributes["src"].partition("base64,")[2])

    def handle_data(self, data):
        self.text += f" {data.strip()}" if data.strip() else ""


# --- the page ---


def test_a_run_ends_with_a_page_that_needs_no_other_file(finished):
    page = Page(finished / "report" / "index.html")
    assert all(ask.startswith("data:image/png;base64,") for ask in page.asks) and "script" not in page.tags
    assert "url(" not in (finished / "report" / "index.html").read_text()
    files = {path.stem: path.read_bytes() for path in (finished / "report").glob("*.png")}
    assert files.keys() == {"loss", "lr", "top1", "throughput", "input_wait", "samples"}
    assert sorted(files.values()) == sorted(page.pictures.values())
    for content in files.values():
        picture = Image.open(io.BytesIO(content))
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture.convert("L")))) > 10
    summary = json.loads((finished / "summary.json").read_text())
    for said in (
        "finished",
        "steps done 20 of 20",
        f"top-1, EMA weights {summary['evaluation']['ema']['top1']:.2f} %",
        f"top-1, raw weights {summary['evaluation']['raw']['top1']:.2f} %",
        "restarts 2",
        "damaged images 0",
        f"settings other than the USI recipe's {len(summary['deviations'])}",
        "ema.decay 0.99996 0.9 decay of the EMA at every update",
        "teacher.name tresnet_v2_l null",
    ):
        assert said in page.text, said


def test_the_curves_are_those_of_the_log_with_marks_where_the_run_was_restarted(finished):
    drawn = {chart.name: chart for chart in charts([read_run(finished, "it")])}
    lines = read_json_lines(finished / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    (loss,) = drawn["loss"].curves
    assert list(loss.y) == losses and list(loss.x) == [step / 5 for step in range(1, 21)]
    assert drawn["loss"].x_label == "epoch" and drawn["loss"].marks == [("session", None, 1.4), ("session", None, 2.4)]
    ema, raw = drawn["top1"].curves
    assert list(ema.y) == [line["ema"]["top1"] for line in lines if line["kind"] == "eval"]
    assert list(raw.y) == [line["raw"]["top1"] for line in lines if line["kind"] == "eval"] and raw.is_dashed
    assert list(drawn["input_wait"].curves[0].y) == [x["input_wait"] for x in lines if x["kind"] == "train"]
    assert "agreement" not in drawn


@pytest.mark.usefixtures("without_drawings")
def test_a_run_that_goes_on_is_reported_so_far(tmp_path):
    run = logged(tmp_path / "run", 7)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    page = Page(write_report([run], tmp_path / "out"))
    assert "not finished; last line 20" in page.text and "steps done 7 of 20" in page.text
    assert "best top-1 20.00 % (ema, epoch 0)" in page.text


def test_a_summary_of_an_earlier_session_does_not_speak_for_a_run_that_went_on(tmp_path):
    run = logged(tmp_path / "run", 7)
    (run / "summary.json").write_text(json.dumps({"finished": False, "step": 5, "deviations": []}))
    record = read_run(run, "it")
    assert numbers(record)["state"].startswith("not finished; ") and len(record.deviations) > 5


@pytest.mark.usefixtures("without_drawings")
def test_a_run_without_a_validation_set(tmp_path):
    run = logged(tmp_path / "run", 7, evaluated=False)
    page = Page(write_report([run], tmp_path / "out"))
    assert "top-1, raw weights –" in page.text and "Validation accuracy" not in page.pictures
    assert "Training loss" in page.pictures


@pytest.mark.parametrize("remaining", ["config.yaml", "metrics.jsonl"])
def test_a_run_killed_before_its_first_line(tmp_path, remaining):
    run = logged(tmp_path / "run", 0)
    for name in {"config.yaml", "metrics.jsonl"} - {remaining}:
        (run / name).unlink()
    page = Page(write_report([run], tmp_path / "out"))
    assert "state not finished" in page.text and not page.pictures


@pytest.mark.usefixtures("without_drawings")
def test_a_log_of_an_earlier_version_has_steps_for_epochs(tmp_path):
    run = logged(tmp_path / "run", 6)
    old = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] != "session"]
    lines = [json.dumps({key: value for key, value in line.items() if key != "time"}) for line in old]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert charts([read_run(run, "it")])[0].x_label == "step"
    page = Page(write_report([run], tmp_path / "out"))
    assert "steps done 6 " in page.text and "state not finished" in page.text


@pytest.mark.usefixtures("without_drawings")
def test_a_run_that_went_back_to_a_checkpoint_says_from_where(tmp_path):
    run = logged(tmp_path / "run", 4)
    telemetry = Telemetry(run, ONE, step=4, total_steps=20, steps_per_epoch=5)
    with telemetry.live():
        telemetry.advance(5)
        telemetry.rewind(3)
    page = Page(write_report([run], tmp_path / "out"))
    assert "went back to the checkpoint, from step 5" in page.text and "went back to a checkpoint 1" in page.text
    assert charts([read_run(run, "it")])[0].marks == [("session", None, 0.8), ("rollback", None, 0.6)]


def test_agreement_with_the_teacher_is_drawn_where_the_log_has_it(tmp_path):
    run = logged(tmp_path / "run", 6, teacher=True)
    (chart,) = (chart for chart in charts([read_run(run, "it")]) if chart.name == "agreement")
    assert {curve.label: list(curve.y) for curve in chart.curves} == {
        "teacher with labels": [80.0] * 6,
        "student with teacher": [4.0, 8.0, 12.0, 16.0, 20.0, 24.0],
    }


def test_a_number_that_is_not_finite_or_not_there_leaves_a_gap(tmp_path):
    run = logged(tmp_path / "run", 3)
    lines = read_json_lines(run / "metrics.jsonl")
    lines[2]["loss"], lines[3]["agreement"] = float("nan"), None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = {chart.name: chart for chart in charts([read_run(run, "it")])}
    assert list(drawn["loss"].curves[0].y) == [3.0, 1.0] and "agreement" not in drawn


@pytest.mark.usefixtures("without_drawings")
def test_several_runs_are_in_the_same_pictures_and_the_page_lists_what_differs(tmp_path, finished):
    other = logged(tmp_path / "lower lr", 9, "--optim.lr", 1e-4, "--student.kwargs.drop_rate", 0.1)
    page = Page(write_report([finished, other], tmp_path / "out"))
    runs = [read_run(finished, "finished"), read_run(other, "lower lr")]
    assert differing_settings(runs)["optim.lr"] == [2e-3, 1e-4] and "run.out" not in differing_settings(runs)
    assert "2 runs compared" in page.text and "optim.lr 0.002 0.0001" in page.text
    assert 'student.kwargs {} {"drop_rate": 0.1}' in page.text and "steps done 20 of 20 9 of 20" in page.text
    drawn = {chart.name: chart for chart in charts(runs)}
    assert [curve.label for curve in drawn["loss"].curves] == ["finished", "lower lr"]
    assert [(curve.label, curve.color) for curve in drawn["top1"].curves] == [
        ("finished, EMA weights", 0),
        ("finished, raw weights", 0),
        ("lower lr, EMA weights", 1),
        ("lower lr, raw weights", 1),
    ]
    assert (tmp_path / "out" / "samples-1.png").read_bytes() == (finished / "samples.png").read_bytes()


@pytest.mark.usefixtures("without_drawings")
def test_runs_of_the_same_name_are_distinguished_by_their_folders(tmp_path):
    runs = [logged(tmp_path / parent / "run", 1) for parent in "ab"]
    page = Page(write_report(runs, tmp_path / "out"))
    assert str(runs[0]) in page.text and str(runs[1]) in page.text


@pytest.mark.usefixtures("without_drawings")
def test_names_are_shown_and_never_obeyed(tmp_path):
    run = logged(tmp_path / "<script>", 1, "--student.name", "<img src=x onerror=alert(1)>")
    page = Page(write_report([run, logged(tmp_path / "$a_b^{", 1)], tmp_path / "out"))
    assert "<script>" in page.text and "<img src=x onerror=alert(1)>" in page.text
    assert "script" not in page.tags and all(ask.startswith("data:") for ask in page.asks)


@pytest.mark.usefixtures("without_drawings")
def test_what_is_not_a_run_or_not_writable_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"not the folder of a run, it has no config.yaml. Give what --run.out was"):
        write_report([tmp_path], tmp_path / "out")
    run = logged(tmp_path / "run", 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out: cannot be written .*. Name another folder with --out"):
        write_report([run], tmp_path / "file" / "out")


def test_a_report_that_fails_does_not_make_the_run_fail(tmp_path, monkeypatch):
    def broken(chart):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(trainer.monitor.report.page, "draw", broken)
    said = report_or_reason(logged(tmp_path / "run", 1))
    assert said.startswith("no report was drawn (RuntimeError: no fonts); tools/report.py ") and "\n" not in said


def test_any_name_of_a_folder_is_shown_on_the_page_and_in_the_pictures(tmp_path):
    names = ["$\\frac$", "_run", os.fsdecode(b"caf\xe9"), "a\nb", "<b>"]
    runs = [logged(tmp_path / str(i), 2).rename(tmp_path / name) for i, name in enumerate(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(runs, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert all(shown in text for shown in ("$\\frac$", "_run", "caf\\udce9", "&lt;b&gt;"))


@pytest.mark.usefixtures("without_drawings")
def test_what_cannot_be_used_is_left_out_and_said(tmp_path, capsys):
    """tests/chaos/reports.py damages files in many more ways."""
    run = logged(tmp_path / "run", 4)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'[]\nnull\n{"kind": "train", "step": "x"}\n\xff\xfe\n{"kind": "eval", "step": 3, "epoch"')
    (run / "summary.json").write_text('{"finished": true}')
    (run / "quarantine.jsonl").write_text('{"key": "x"}\n')
    (run / "config.yaml").write_text("student: {name: [}")
    page = Page(write_report([run], tmp_path / "out"))
    said = "what cannot be used of metrics.jsonl, quarantine.jsonl, summary.json, config.yaml is left out"
    assert f"run: {said}." in page.text and f"note: {run}: {said}\n" in capsys.readouterr().err
    assert "steps done 4 of 20" in page.text and "damaged images 0" in page.text


@pytest.mark.parametrize("name", ["index.html", "loss.png"])
@pytest.mark.usefixtures("without_drawings")
def test_a_full_disk_while_the_report_is_written_leaves_a_reason_and_no_half_of_a_file(tmp_path, name):
    run = logged(tmp_path / "run", 2)
    (run / "report").mkdir()
    (run / "report" / name).symlink_to("/dev/full")
    said = report_or_reason(run)
    assert "cannot be written (No space left on device)" in said and f"tools/report.py {run} tries again" in said
    (run / "report" / name).unlink()
    assert report_or_reason(run) == f"report: {run / 'report' / 'index.html'}"


def test_matplotlib_is_imported_only_inside_the_functions_that_draw():
    for path in (REPOSITORY / "trainer").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", "") or ""]
            assert not any(str(name).startswith("matplotlib") for name in names), path


@pytest.mark.usefixtures("without_drawings")
def test_the_command_writes_to_the_run_or_for_several_to_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        logged(tmp_path / name, 1)
    capsys.readouterr()
    main(["a"])
    main(["a", "b", "a"])
    main(["b", "--out", "elsewhere"])
    assert capsys.readouterr().out.split() == ["a/report/index.html", "report/index.html", "elsewhere/index.html"]
    assert "2 runs compared" in (tmp_path / "report" / "index.html").read_text()
    with pytest.raises(SystemExit):
        main(["none"])
    assert re.match(r"error: none: not the folder of a run", capsys.readouterr().err)


@pytest.mark.parametrize("length", [1, 2, 100, 1001])
def test_a_moving_average_keeps_a_constant_and_the_length(length):
    assert np.allclose(moving_average(np.full(length, 3.0)), 3.0) and len(moving_average(np.zeros(length))) == length


def test_a_moving_average_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=400)
    averaged = moving_average(values)
    assert averaged[200] == pytest.approx(values[196:205].mean()) and averaged[0] == pytest.approx(values[:5].mean())


# --- the first images ---


def test_the_samples_are_the_first_images_of_the_run_as_they_were_mixed(digits, finished):
    config = parse([*TINY, "--data.root", str(digits), "--run.out", str(finished)])
    run = build(config, ONE)
    batches = run.pipelines.of["train"].batches(rank_plans(run.plan, 0, 1, ONE, 32))
    pixels = mix_pixels(next(batches)).numpy()
    batches.close()
    picture = np.asarray(Image.open(finished / "samples.png"))
    assert picture.shape == (2 * 100 + 4, 8 * 100 + 4, 3)  # 32 px enlarged to 96, 4 px between
    for i in (0, 7, 8, 15):
        top, left = 4 + i // 8 * 100, 4 + i % 8 * 100
        assert np.array_equal(picture[top : top + 96 : 3, left : left + 96 : 3], pixels[i])


def test_samples_that_are_there_stay_and_batches_pass_unchanged(tmp_path):
    def batch(value: int) -> Batch:
        rows = {"labels": torch.zeros(4, dtype=torch.int64), "lam": torch.ones(4), "valid": torch.ones(4, dtype=bool)}
        images = torch.full((4, 8, 8, 3), value, dtype=torch.uint8)
        return Batch(images=images, box=torch.zeros(4, 4, dtype=torch.int32), position=0, mix_group=4, **rows)

    batches = [batch(10), batch(20)]
    assert list(keep_samples(iter(batches), tmp_path / "samples.png")) == batches
    first = (tmp_path / "samples.png").read_bytes()
    assert set(np.unique(np.asarray(Image.open(io.BytesIO(first))))) == {10, 255}
    assert list(keep_samples(iter(batches[1:]), tmp_path / "samples.png")) == batches[1:]
    assert (tmp_path / "samples.png").read_bytes() == first


@pytest.mark.parametrize(("count", "size", "shape"), [(3, 224, (232, 688)), (20, 50, (112, 436)), (12, 96, (204, 804))])
def test_a_strip_has_rows_of_eight(count, size, shape):
    picture = Image.open(io.BytesIO(strip_png(torch.zeros(count, size, size, 3, dtype=torch.uint8))))
    assert picture.size == shape[::-1]


@pytest.mark.usefixtures("without_drawings")
def test_a_section_of_the_configuration_that_is_none_is_left_out_and_said(tmp_path):
    run = logged(tmp_path / "run", 4)
    (run / "config.yaml").write_text("student: {name: resnet50}\nteacher: 3\n")
    page = Page(write_report([run], tmp_path / "out"))
    assert "what cannot be used of config.yaml is left out" in page.text and "student resnet50" in page.text
