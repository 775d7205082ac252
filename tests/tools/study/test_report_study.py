"""The report of a study: its numbers, what it warns of, and that equal files give equal bytes."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tools.lib.study.report
from conftest import TINY
from support.sessions import ONE
from tools.lib.common import front
from tools.lib.study.report import Point, write_report
from tools.lib.study.results import PaperPoint, StudentResult, StudyResults, TeacherResult
from trainer.config.recipe import audit
from trainer.config.sections import parse, to_yaml
from trainer.monitor.run_files import write_summary
from trainer.monitor.telemetry import Telemetry

IMAGES = 400
DRAWING = tools.lib.study.report.draw, front.picture


@pytest.fixture(autouse=True)
def without_drawings(monkeypatch):
    """Pictures are a few bytes, which say what would be drawn: a real one takes a second."""
    monkeypatch.setattr(tools.lib.study.report, "draw", lambda chart: repr(chart).encode())
    monkeypatch.setattr(front, "picture", lambda panels, title, legend: repr(panels).encode())


def trained(folder: Path, name: str, seed: int, *arguments: str, steps: int = 20, stop: int = 0, **summary) -> Path:
    """The folder of a run as the trainer's writers leave it; it was restarted after `stop` steps."""
    folder.mkdir(parents=True)
    settings = [*TINY, "--student.name", name, "--student.seed", str(seed), "--augment.fill", "[1, 2, 3]"]
    config = parse([*settings, "--run.out", str(folder), *arguments])
    (folder / "config.yaml").write_text(to_yaml(config))
    for start, end in ((0, stop), (stop, steps)) if stop else ((0, steps),):
        telemetry = Telemetry(folder, ONE, step=start, total_steps=steps, steps_per_epoch=5, validation="v" * 64)
        with telemetry.live():
            for step in range(start + 1, end + 1):
                telemetry.advance(step)
                record = {"epoch": (step - 1) // 5, "loss": 3 / step, "lr": 1e-3, "input_wait": 0.1}
                telemetry.train({"step": step, "images_per_s": 100.0, **record})
                top1 = {"top1": 10.0 + step, "top5": 50.0, "loss": 2.0, "images": IMAGES}
                telemetry.evaluation(step, {"raw": top1, "ema": top1})
    ended = {"finished": True, "step": steps, "total_steps": steps, "student": name, "teacher": None}
    ended |= {"dataset": "d" * 64, "deviations": audit(config), "quarantined": 0, "version": "1.0", "source": "abc"}
    ended |= {
        "evaluation": {"raw": {"top1": 33.0}},
        "best": {"step": 15, "weights": "ema", "top1": 44.0},
        "session": {},
    }
    write_summary(folder / "summary.json", {**ended, **summary})
    return folder


def evaluated(path: Path, num_right: int, **changes) -> Path:
    """An evaluation in which the first `num_right` images are recognised, and its predictions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = {"image_size": 32, "crop_pct": 0.95}
    report = {"top1": 100 * num_right / IMAGES, "parameters": 1_500_000, "digest": "e" * 64, "images": IMAGES}
    report |= {"precision": "float32", "pipeline": "torchvision", "software": {"torch": "2"}, "view": transform}
    path.write_text(json.dumps({**report, **changes}))
    label = np.zeros(IMAGES, np.int64)
    top = np.where(np.arange(IMAGES) < num_right, 0, 1)[:, None]
    np.savez(path.with_suffix(".npz"), sample=np.arange(IMAGES), label=label, top=top)
    return path


def student(root: Path, name: str, seed: int, num_right: int, *arguments: str, report=None, **run) -> StudentResult:
    folder = trained(root / "students" / f"{name}-{seed}", name, seed, *arguments, **run)
    path = evaluated(root / "evaluations" / f"{name}-{seed}" / "ema.json", num_right, **(report or {}))
    commands = [["python", "trainer/run.py", "--run.out", str(folder)]]
    return StudentResult(name, name, {}, seed, run=folder, evaluations={"ema": path}, commands=commands)


def study(students: list[StudentResult], **facts) -> StudyResults:
    return StudyResults("a study", None, students, **facts)


def reported(root: Path, results: StudyResults) -> dict:
    write_report(root / "report", results)
    return json.loads((root / "report" / "study.json").read_text())


def page_text(root: Path) -> str:
    page = re.sub(
        r"(?s)<style>.*?</style>|data:image/png;base64,[^\"]*", "", (root / "report" / "index.html").read_text()
    )
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


# --- numbers ---


def test_means_spreads_and_which_students_are_distinguishable(tmp_path):
    students = [student(tmp_path, "good", seed, right) for seed, right in enumerate((378, 380, 382))]
    students += [student(tmp_path, "bad", 0, 300), student(tmp_path, "tied", 0, 379)]
    found = reported(tmp_path, study(students, teacher=TeacherResult("test_resnet")))
    assert list(found["students"]) == ["good", "tied", "bad"]  # from the best to the worst
    good = found["students"]["good"]
    assert good["top1_ema"] == pytest.approx(95.0) and good["sd_ema"] == pytest.approx(0.5)
    assert good["top1_raw"] == 33.0  # The run's own summary says it where nobody has evaluated it.
    assert good["low"] < 95 < good["high"] and good["parameters"] == 1_500_000
    assert [row["letters"] for row in found["students"].values()] == ["a", "a", "b"]
    pairs = {(pair["a"], pair["b"]): pair["distinguishable"] for pair in found["pairs"]}
    assert pairs == {("good", "tied"): False, ("good", "bad"): True, ("tied", "bad"): True}
    text = page_text(tmp_path)
    assert "95.00 ± 0.50" in text and "+20.00 [" in text and "44.00 (ema, step 15)" in text
    assert found["warnings"] == [] and "Before you compare" not in text
    rows = list(csv.DictReader((tmp_path / "report" / "study.csv").open()))
    assert [row["student"] for row in rows] == ["good", "tied", "bad"] and rows[0]["seeds"] == "3"


def test_speed_has_a_front_that_says_where_a_faster_student_may_be_as_accurate(tmp_path):
    students = [
        student(tmp_path, *each) for each in (("slow", 0, 380), ("fast", 0, 379), ("fastest", 0, 200), ("no", 0, 90))
    ]
    speeds = {"x/slow": 10.0, "x/fast": 20.0, "x/fastest": 40.0, "x/no": 5.0}
    rows = [
        {
            "backend": "eager",
            "model": model,
            "images_per_s": speed,
            "min": 1,
            "max": 99,
            "precision": "fp32",
            "batch": 4,
        }
        for model, speed in speeds.items()
    ]
    failed = {"backend": "openvino", "model": "x/slow", "failed": "no such operator"}
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [*rows, failed]}))
    results = study(
        students,
        speed=tmp_path / "comparison.json",
        speed_models={model[2:]: model for model in speeds},
        paper=[PaperPoint("slow", 81.0, "arXiv 2204.03475")],
    )
    found = reported(tmp_path, results)["measured"]["students"]
    fronts = {name: each["eager: fp32, batch 4"]["front"] for name, each in found.items()}
    assert fronts == {"slow": "front?", "fast": "front", "fastest": "front", "no": ""}
    drawn = (tmp_path / "report" / "front.png").read_text()
    assert (
        "Point(model='slow, paper', top1=81.0, images_per_s=10.0, top1_interval=None, top1_is_the_papers=True" in drawn
    )
    assert "nothing of them was measured here" in page_text(tmp_path)


def test_hours_count_every_session_and_are_divided_among_students_that_were_trained_at_once(tmp_path, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr("trainer.monitor.telemetry.time.time", lambda: 36.0 * next(seconds))
    alone = student(tmp_path, "alone", 0, 300, stop=5)
    together = [student(tmp_path, "together", seed, 300) for seed in (0, 1)]
    for each in together:
        each.commands[:] = [["python", "trainer/together.py", "a.yaml", "b.yaml"]]
    found = reported(tmp_path, study([alone, *together]))["measured"]["students"]
    # A session of n steps writes 2 n lines after its first one, 0.01 hours apart.
    assert found["alone"]["device_hours"] == pytest.approx(0.4)
    assert found["together"]["device_hours"] == pytest.approx(0.4)  # two of 0.4, each with half of them


# --- warnings ---


def test_another_augmentation_of_one_student_is_named_with_both_values(tmp_path):
    students = [student(tmp_path, "a", seed, 300) for seed in (0, 1)]
    students += [student(tmp_path, "b", 0, 300), student(tmp_path, "c", 0, 300, "--augment.mix_prob", "0.5")]
    found = reported(tmp_path, study(students))["warnings"]
    assert found == ["runs differ in augment.mix_prob: 1.0 in a, b; 0.5 in c"]
    assert found[0] in page_text(tmp_path)


def test_what_changes_no_result_is_no_warning(tmp_path):
    students = [student(tmp_path, "a", 0, 300), student(tmp_path, "a", 1, 300, "--data.threads", "3")]
    assert reported(tmp_path, study(students))["warnings"] == []


def test_another_file_of_teacher_weights_is_named(tmp_path):
    teachers = [["--teacher.name", "test_resnet", "--teacher.checkpoint", file] for file in ("x.pth", "y.pth")]
    students = [student(tmp_path, name, 0, 300, *teacher) for name, teacher in zip("ab", teachers, strict=True)]
    assert (
        "runs differ in teacher.checkpoint: x.pth in a; y.pth in b" in reported(tmp_path, study(students))["warnings"]
    )


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"dataset": "0" * 64}, "runs differ in digest of the dataset: "),
        (
            {"source": "def"},
            'runs differ in version of the code: ["1.0", "abc"] in a, b (seed 0); ["1.0", "def"] in b (seed 1)',
        ),
        ({"steps": 15}, "runs differ in number of steps: 20 in a, b (seed 0); 15 in b (seed 1)"),
        ({"report": {"digest": "0" * 64}}, "runs differ in evaluation ema, digest: "),
        (
            {"report": {"precision": "bfloat16"}},
            "runs differ in evaluation ema, precision: float32 in a, b (seed 0); bfl",
        ),
        (
            {
                "deviations": [
                    {"key": "run.micro_batch", "usi": "128", "here": "BatchNorm over 16 images", "meaning": "x"}
                ]
            },
            "runs differ in run.micro_batch, as the run has found it: not set in a, b (seed 0); BatchNorm over 16",
        ),
    ],
)
def test_other_data_code_or_length_of_a_run_is_named(tmp_path, changes, warning):
    students = [
        student(tmp_path, "a", 0, 300),
        student(tmp_path, "b", 0, 300),
        student(tmp_path, "b", 1, 300, **changes),
    ]
    assert [line for line in reported(tmp_path, study(students))["warnings"] if line.startswith(warning)]


def test_the_fill_colour_that_the_students_decide_is_compared(tmp_path):
    students = [student(tmp_path, "a", seed, 300, "--augment.fill", "null") for seed in (0, 1)]
    for each, color in zip(students, ((1, 2, 3), (4, 5, 6)), strict=True):
        (each.run / "checkpoints").mkdir()
        torch.save({"plan": {"fill": list(color)}}, each.run / "checkpoints" / "best.pt")
    (warning,) = reported(tmp_path, study(students))["warnings"]
    assert warning.endswith("which the student decides: [1, 2, 3] in a (seed 0); [4, 5, 6] in a (seed 1)")


def test_a_failed_student_and_a_missing_seed_are_reported_and_the_others_have_their_numbers(tmp_path):
    log = tmp_path / "logs" / "a #1.log"
    log.parent.mkdir()
    log.touch()
    failed = StudentResult("a", "a", {}, 1, failed="train: error: <no memory>", log=log)
    students = [student(tmp_path, "a", 0, 300), failed, student(tmp_path, "b", 0, 100)]
    students += [StudentResult("gone", "gone", {}, 0, run=tmp_path / "nowhere", failed="train: killed")]
    found = reported(tmp_path, study(students, stages_failed={"speed": "error: no runtime"}))
    assert found["warnings"][:3] == [
        "stage speed has failed: error: no runtime",
        "a, seed 1, has no result: train: error: <no memory>",
        "gone, seed 0, has no result: train: killed",
    ]
    assert found["warnings"][3].startswith("each student has one seed")
    assert [row["top1_ema"] for row in found["students"].values()] == [75.0, 25.0, None]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "&lt;no memory&gt;" in page and 'href="../logs/a%20%231.log"' in page and "<no memory>" not in page


def test_a_study_in_which_everything_failed_has_a_page_and_no_pictures_of_an_earlier_one(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "front.png").touch()
    found = reported(tmp_path, study([StudentResult("a", "a", {}, 0, failed="train: killed")]))
    assert found["pairs"] == [] and "train: killed" in page_text(tmp_path)
    assert not (tmp_path / "report" / "front.png").exists()


def test_students_that_were_evaluated_on_other_images_are_not_compared(tmp_path):
    students = [student(tmp_path, "a", 0, 300), student(tmp_path, "b", 0, 200)]
    students.append(student(tmp_path, "c", 0, 100, report={"digest": "0" * 64}))
    found = reported(tmp_path, study(students))
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [("a", "b")]
    assert "letters" not in found["students"]["c"]


# --- files ---


def test_curves_of_more_runs_than_there_are_colors_and_points_with_intervals_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tools.lib.study.report, "draw", lambda chart: drawn.append(chart) or b"")
    students = [student(tmp_path, f"s{number}", 0, 300, steps=3) for number in range(9)]
    reported(tmp_path, study(students))
    draw, picture = DRAWING
    first, last = (dataclasses.replace(drawn[0], curves=[drawn[0].curves[i]] * 2) for i in (0, 7))
    assert drawn[0].curves[7].color == 7 and draw(first) != draw(last)  # The same color of seven, with another marker.
    points = [Point("a", 80.0, 10.0, (70.0, 90.0), on_front=True), Point("b, paper", 81.0, 9.0, None, True)]
    pictures = [picture({"eager": some}, "", {False: "", True: ""}) for some in (points, [points[0], points[0]])]
    assert pictures[0] != pictures[1] and all(each.startswith(b"\x89PNG") for each in pictures)


def test_a_study_that_was_interrupted_has_the_same_results_and_curves(tmp_path, monkeypatch):
    def made(root: Path, stop: int) -> dict[str, bytes]:
        monkeypatch.chdir(root)  # Names of files are relative and thus the same.
        students = [student(Path(), "a", seed, 300 + seed, stop=stop) for seed in (0, 1)]
        write_report(Path("report"), study([*students, student(Path(), "b", 0, 200, stop=stop)]))
        content = {path.name: path.read_bytes() for path in Path("report").iterdir()}
        results = json.loads(content.pop("study.json"))
        content.pop("index.html")
        del results["measured"]
        rows = csv.DictReader(content.pop("study.csv").decode().splitlines())
        return {**content, "results": results, "rows": [{**row, "device_hours": ""} for row in rows]}

    for name in ("once", "again"):
        (tmp_path / name).mkdir()
    assert made(tmp_path / "once", stop=0) == made(tmp_path / "again", stop=7)


def test_the_same_files_give_the_same_bytes(tmp_path):
    results = study([student(tmp_path, "a", 0, 300), student(tmp_path, "b", 0, 200)])
    first, second = (
        {path.name: path.read_bytes() for path in write_report(tmp_path / "report", results).parent.iterdir()}
        for _ in range(2)
    )
    assert first == second and {"index.html", "study.csv", "study.json", "loss.png", "top1.png"} <= set(first)


def test_the_page_links_the_files_of_each_run_and_shows_its_commands(tmp_path):
    one = student(tmp_path, "a", 0, 300)
    (one.run / "report").mkdir()
    (one.run / "report" / "index.html").touch()
    write_report(tmp_path / "report", study([one], commands={"shards": ["python", "tools/shard_imagenet.py", "a b"]}))
    page = (tmp_path / "report" / "index.html").read_text()
    assert 'href="../students/a-0/report/index.html"' in page and "model card" not in page
    assert "tools/shard_imagenet.py &#39;a b&#39;" in page and f"trainer/run.py --run.out {one.run}" in page
    assert "script" not in page and "http" not in re.sub("http-equiv", "", page)
