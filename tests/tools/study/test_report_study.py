"""The report of a study: its numbers, what it warns of, and that equal files give equal bytes."""

import csv
import dataclasses
import html
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import tools.lib.study.report
from conftest import REPOSITORY, TINY
from support.sessions import ONE
from tools.lib.common import front
from tools.lib.study.graph import Graph, StudentStages, read_graph
from tools.lib.study.report import write_report
from tools.lib.study.stage import LOG
from trainer.config.paper import paper_models
from trainer.config.recipe import audit
from trainer.config.sections import parse, to_yaml
from trainer.monitor.run_files import write_summary
from trainer.monitor.telemetry import Telemetry

IMAGES = 400
DRAWING = tools.lib.study.report.draw


@pytest.fixture(autouse=True)
def without_drawings(monkeypatch):
    """Pictures are a few bytes, which say what would be drawn: a real one takes a second."""
    monkeypatch.setattr(tools.lib.study.report, "draw", lambda chart: repr(chart).encode())
    monkeypatch.setattr(front, "picture", lambda panels, title, legend: repr(panels).encode())


def trained(
    folder: Path, name: str, seed: int, *arguments: str, steps: int = 20, stop: int = 0, sessions=(), **summary
) -> Path:
    """The folder of a run as the trainer's writers leave it; it was restarted after `stop` steps.

    Args:
      sessions: further keys of the line of each session.
    """
    folder.mkdir(parents=True)
    settings = [*TINY, "--student.name", name, "--student.seed", str(seed), "--augment.fill", "[1, 2, 3]"]
    config = parse([*settings, "--run.out", str(folder), *arguments])
    (folder / "config.yaml").write_text(to_yaml(config))
    spans = ((0, stop), (stop, steps)) if stop else ((0, steps),)
    for (start, end), changes in itertools.zip_longest(spans, sessions, fillvalue={}):
        facts = {"precision": "float32", "pipeline": "torchvision", "together": False, "validation": "v" * 64}
        telemetry = Telemetry(folder, ONE, step=start, total_steps=steps, steps_per_epoch=5, facts={**facts, **changes})
        with telemetry.live():
            for step in range(start + 1, end + 1):
                telemetry.advance(step)
                record = {"epoch": (step - 1) // 5, "loss": 3 / step, "lr": 1e-3, "input_wait": 0.1}
                telemetry.train({"step": step, "images_per_s": 100.0, "teacher_top1": 40.0 + seed, **record})
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
    report["device"] = "cpu"
    path.write_text(json.dumps({**report, **changes}))
    label = np.zeros(IMAGES, np.int64)
    top = np.where(np.arange(IMAGES) < num_right, 0, 1)[:, None]
    np.savez(path.with_suffix(".npz"), sample=np.arange(IMAGES), label=label, top=top)
    return path


@dataclasses.dataclass(frozen=True)
class Made:
    """A student with a seed, and what its stages have left behind: no result where `failure` says why.

    Nothing at all is there where `begun` is False.
    """

    name: str
    seed: int
    num_right: int = 0
    settings: tuple[str, ...] = ()
    report: dict = dataclasses.field(default_factory=dict)
    run: dict = dataclasses.field(default_factory=dict)
    seconds: float = 1.0
    failure: str = ""
    begun: bool = True

    def fill(self, stages: StudentStages) -> None:
        """Write the folders of the stages."""
        if not self.begun:
            return
        if self.failure:
            stages.train.note(command=stages.train.command, failure=self.failure)
            (stages.train.folder / LOG).touch()
            return
        trained(stages.train.product, self.name, self.seed, *self.settings, **self.run)
        for stage in stages.evaluations.values():
            evaluated(stage.product, self.num_right, **self.report)
        stages.export.product.mkdir(parents=True)
        for stage in stages.stages:
            stage.note(command=stage.command, done=True, seconds=self.seconds)


def student(name: str, seed: int, num_right: int, *settings: str, report: dict | None = None, **run) -> Made:
    return Made(name, seed, num_right, settings, report or {}, run)


def study(root: Path, students: list[Made], /, **content) -> Graph:
    """A study in ROOT/report, in which the stages of these students have been carried out, and no others."""
    seeds: dict[str, list[int]] = {}
    for each in students:
        seeds.setdefault(each.name, []).append(each.seed)
    file = root / "study.yaml"
    content = {
        "dataset": str(root / "OUT"),
        "recipe": {"config": str(REPOSITORY / "configs" / "demo.yaml")},
        "students": [{"name": name, "seeds": some} for name, some in seeds.items()],
        "evaluate": {"weights": ["ema"]},
        **content,
    }
    file.write_text(yaml.safe_dump(content))
    graph = read_graph(file, root / "report")
    for made, stages in zip(students, graph.students, strict=True):
        made.fill(stages)
    return graph


def reported(graph: Graph) -> dict:
    write_report(graph)
    return json.loads((graph.out / "study.json").read_text())


def page_text(root: Path) -> str:
    page = re.sub(
        r"(?s)<style>.*?</style>|data:image/png;base64,[^\"]*", "", (root / "report" / "index.html").read_text()
    )
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


# --- numbers ---


def test_a_teacher_that_the_study_trains_is_shown_by_its_best_evaluation_and_names_the_weights(tmp_path):
    graph = study(tmp_path, [student("a", 0, 300)], teacher={"name": "test_resnet", "train": {}})
    trained(graph.common["teacher"].product, "test_resnet", 0, best={"step": 15, "weights": "raw", "top1": 95.0})
    assert reported(graph)["teacher"] == {"step": 15, "weights": "raw", "top1": 95.0}
    text = page_text(tmp_path)
    assert "one recipe (demo.yaml). The teacher is test_resnet, recorded once. " in text
    assert "The teacher's accuracy is 95.00 %, with its raw weights after step 15. The students learn from" in text
    assert "these weights (best.pt). No other evaluation of its training was better on these validation images" in text


def test_a_teacher_that_is_given_is_shown_by_what_the_runs_log_of_it(tmp_path):
    students = [student("a", seed, 300) for seed in (0, 1)]
    found = reported(study(tmp_path, students, teacher={"name": "test_resnet"}))
    assert found["teacher"] is None and found["measured"]["teacher_top1"] == {"a-s0": 40.0, "a-s1": 41.0}
    text = page_text(tmp_path)
    assert "best class is the label of 40.0 to 41.0 % of the images" in text and "best.pt" not in text


def test_a_live_teacher_is_named_as_one_that_nobody_has_recorded(tmp_path):
    students = [{"name": "a", "overrides": {"augment.flip": 0.0}}]
    teacher = {"name": "test_resnet"}
    found = reported(study(tmp_path, [student("a", 0, 300, "--augment.flip", "0")], students=students, teacher=teacher))
    text = page_text(tmp_path)
    assert "The teacher is test_resnet, live in each training." in text and "recorded once" not in text
    assert not [line for line in found["warnings"] if "live teacher" in line]


def test_a_student_that_learned_from_the_live_teacher_beside_others_is_named(tmp_path):
    students = [{"name": "a", "overrides": {"augment.flip": 0.0}}, {"name": "b"}]
    made = [student("a", 0, 300, "--augment.flip", "0"), student("b", 0, 300)]
    found = reported(study(tmp_path, made, students=students, teacher={"name": "test_resnet"}))["warnings"]
    assert found[0] == "a-s0 learned from the live teacher, because no recording fits the settings"
    assert "runs differ in augment.flip: 0.0 in a-s0; 0.5 in b-s0" in found


def test_means_spreads_and_which_students_are_distinguishable(tmp_path):
    students = [student("good", seed, right) for seed, right in enumerate((378, 380, 382))]
    students += [student("bad", 0, 300), student("tied", 0, 379)]
    found = reported(study(tmp_path, students))
    assert list(found["students"]) == ["good", "tied", "bad"]  # from the best to the worst
    good = found["students"]["good"]
    assert good["top1_ema"] == pytest.approx(95.0) and good["sd_ema"] == pytest.approx(0.5)
    assert good["top1_raw"] == 33.0  # The run's own summary says it where nobody has evaluated it.
    assert good["low"] < 95 < good["high"] and good["parameters"] == 1_500_000
    assert [row["letters"] for row in found["students"].values()] == ["a", "a", "b"]
    pairs = {(pair["a"], pair["b"]): pair["distinguishable"] for pair in found["pairs"]}
    assert pairs == {("good", "tied"): False, ("good", "bad"): True, ("tied", "bad"): True}
    text = page_text(tmp_path)
    assert "Of the 3 students that are compared, good, tied lead, and are not distinguishable, by the top-1" in text
    assert "95.00 ± 0.50" in text and "+20.00 [" in text and "44.00 (ema, step 15)" in text
    assert found["warnings"] == [] and "Before you compare" not in text and "3 students, one recipe" in text
    rows = list(csv.DictReader((tmp_path / "report" / "study.csv").open()))
    assert [row["student"] for row in rows] == ["good", "tied", "bad"] and rows[0]["seeds"] == "3"


def test_a_student_that_is_distinguishable_from_all_others_leads_alone(tmp_path):
    reported(study(tmp_path, [student("good", 0, 380), student("bad", 0, 200), student("tied", 0, 201)]))
    text = page_text(tmp_path)
    assert "Of the 3 students that are compared, good leads, and is distinguishable from each other one, by" in text


def with_speeds(graph: Graph, speeds: dict[str, tuple[int, float]]) -> dict[str, dict]:
    """Add measured speeds to a study, with a failed one. Returns what was timed of each student by the report.

    Args:
      speeds: the rank and the images/s of each student.
    """
    graph = graph.with_speed()
    rows = []
    for each in graph.students:
        rank, speed = speeds[each.student.name]
        measured = {"images_per_s": speed, "min": 0.9 * speed, "max": 1.2 * speed, "rank": rank}
        rows.append(
            {"backend": "eager", "precision": "fp32", "batch": 4, "model": str(each.export.product), **measured}
        )
    rows.append({"backend": "openvino", "model": rows[0]["model"], "failed": "no such operator"})
    stage = graph.common["speed"]
    stage.folder.mkdir(parents=True)
    stage.product.write_text(json.dumps({"rows": rows, "measured_on": "a machine of 3 cores"}))
    return reported(graph)["measured"]["students"]


def test_speed_and_accuracy_have_a_front_and_the_papers_accuracy_stands_beside_ours(tmp_path, monkeypatch):
    drawn, titles = {}, []
    monkeypatch.setattr(front, "picture", lambda panels, title, _: drawn.update(panels) or titles.append(title) or b"")
    speeds = {"resnet50": (3, 10.0), "fast": (2, 20.0), "fastest": (1, 40.0), "no": (4, 5.0)}
    rights = zip(speeds, (390, 379, 200, 90), strict=True)
    graph = study(tmp_path, [student(name, 0, right) for name, right in rights], speed={}, paper="usi")
    found = with_speeds(graph, speeds)
    fronts = {name: each["eager: fp32, batches of 4, front"] for name, each in found.items()}
    assert fronts == {"resnet50": "front", "fast": "front", "fastest": "front", "no": ""}
    (points,) = drawn.values()
    assert {point.model: (point.front, point.min, point.max) for point in points}["fast"] == ("front", 18.0, 24.0)
    text = page_text(tmp_path)
    published = next(model.top1 for model in paper_models() if model.name == "resnet50")
    assert f" {published:.1f} " in text and "nothing of them was measured here" in text
    assert "all timed runs on a machine of 3 cores (eager: fp32, batches of 4)" in text and " 18.0 to 24.0 " in text
    assert "range of the timed runs on a machine of 3 cores." in text
    assert titles == ["Accuracy and speed on a machine of 3 cores"]
    assert "student EMA weights group front images/s raw weights" in text
    assert "resnet50 97.50 a front 10.0 33.00 " in text  # A phone shows it as far as the speed without scrolling.


@pytest.mark.parametrize(
    ("rights", "speeds", "fronts"),
    [
        # The second is better as measured, but no more accurate than chance allows.
        ((378, 380), ((2, 10.0), (1, 20.0)), ("front?", "front")),
        # Each is better in one, but the accuracies may be equal: the slower one may be worse in both.
        ((380, 378), ((2, 10.0), (1, 20.0)), ("front?", "front")),
        # The speeds may be equal, so the less accurate one may be worse in both.
        ((380, 300), ((1, 19.9), (1, 20.0)), ("front", "front?")),
        ((380, 300), ((1, 20.0), (1, 19.9)), ("front", "front?")),
        ((380, 300), ((1, 20.0), (2, 10.0)), ("front", "")),
        ((380, 380), ((1, 20.0), (1, 20.0)), ("front?", "front?")),
    ],
)
def test_a_student_of_which_noise_decides_whether_it_is_on_the_front_is_marked(tmp_path, rights, speeds, fronts):
    graph = study(tmp_path, [student(name, 0, right) for name, right in zip("ab", rights, strict=True)], speed={})
    found = with_speeds(graph, dict(zip("ab", speeds, strict=True)))
    assert tuple(found[name]["eager: fp32, batches of 4, front"] for name in "ab") == fronts


def test_the_folder_of_a_study_may_be_moved(tmp_path):
    graph = study(tmp_path, [student("a", 0, 380), student("b", 0, 300)], speed={})
    before = with_speeds(graph, {"a": (2, 10.0), "b": (1, 20.0)})
    moved = read_graph(graph.file, graph.out.rename(tmp_path / "moved")).with_speed()
    assert reported(moved)["measured"]["students"] == before
    assert before["a"]["eager: fp32, batches of 4, images_per_s"] == 10.0


def test_hours_are_those_of_the_training_of_all_seeds(tmp_path):
    students = [dataclasses.replace(student("a", seed, 300), seconds=720.0) for seed in (0, 1)]
    assert reported(study(tmp_path, students))["measured"]["students"]["a"]["device_hours"] == pytest.approx(0.4)
    assert " 24 min " in page_text(tmp_path)


def test_a_training_that_failed_has_no_training_speed(tmp_path):
    graph = study(tmp_path, [student("a", 0, 300), Made("b", 0, failure="killed")])
    trained(graph.students[1].train.product, "b", 0, finished=False)
    found = reported(graph)["measured"]["students"]
    assert found["a"]["train_images_per_s"] == 100.0 and found["b"]["train_images_per_s"] is None


def test_students_that_were_trained_together_have_no_training_speed_of_their_own(tmp_path):
    together = {"together": True}
    students = [student("a", 0, 300), student("b", 0, 300, sessions=[together])]
    students.append(student("resumed", 0, 300, stop=7, sessions=[together, {}]))
    found = reported(study(tmp_path, students))["measured"]["students"]
    assert [each["train_images_per_s"] for each in found.values()] == [100.0, None, None]


def test_the_sum_of_the_stages_is_named_as_one_and_not_as_the_time_of_the_study(tmp_path):
    reported(study(tmp_path, [dataclasses.replace(student("a", 0, 300), seconds=20.0)]))
    text = page_text(tmp_path)
    assert "sum of the stages 60 s" in text and "Stages that run at once, with --jobs, take less together" in text


# --- warnings ---


def test_an_ema_far_below_the_raw_weights_is_named_with_both_numbers_and_what_to_set(tmp_path):
    raw = {"evaluation": {"raw": {"top1": 90.0}}}
    found = reported(study(tmp_path, [student("slow", seed, 300, **raw) for seed in (0, 1)]))["warnings"]
    assert len(found) == 1 and found[0].startswith(
        "EMA weights are compared, and recognise far fewer images than the raw "
    )
    assert "slow-s0 75.00 % against 90.00 %, slow-s1" in found[0] and "evaluate.weights: [raw, ema]" in found[0]
    assert "ema.warmup: true" in found[0] and "ema.decay" in found[0]


def test_an_ema_that_is_near_the_raw_weights_or_is_not_compared_is_no_warning(tmp_path):
    for name, right, weights in (("near", 345, ["ema"]), ("first", 300, ["raw", "ema"])):
        (tmp_path / name).mkdir()
        made = [student("a", seed, right, evaluation={"raw": {"top1": 90.0}}) for seed in (0, 1)]
        assert reported(study(tmp_path / name, made, evaluate={"weights": weights}))["warnings"] == []


def test_the_first_weights_of_the_file_are_compared_and_named_everywhere(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tools.lib.study.report, "draw", lambda chart: drawn.append(chart) or b"")
    reported(study(tmp_path, [student("a", 0, 300), student("b", 0, 200)], evaluate={"weights": ["raw", "ema"]}))
    assert "Validation accuracy, raw weights" in [chart.title for chart in drawn]
    text = page_text(tmp_path)
    assert "The raw weights are compared." in text and "in percentage points, raw weights." in text
    assert "student raw weights group EMA weights" in text


def test_another_augmentation_of_one_student_is_named_with_both_values(tmp_path):
    students = [student("a", seed, 300) for seed in (0, 1)]
    students += [student("b", 0, 300), student("c", 0, 300, "--augment.mix_prob", "0.5")]
    found = reported(study(tmp_path, students))["warnings"]
    assert found == ["runs differ in augment.mix_prob: 1.0 in a-s0, a-s1, b-s0; 0.5 in c-s0"]
    text = page_text(tmp_path)
    assert f"Before you compare {found[0]}" in text and "augment.mix_prob 1.0 0.5 c-s0 " in text


def test_settings_of_one_student_that_are_no_part_of_the_recipe_are_named(tmp_path):
    overrides = {"run.seed": 7, "run.tf32": False}
    students = [{"name": "a"}, {"name": "b", "overrides": overrides}]
    teacher = {"name": "test_resnet", "checkpoint": str(tmp_path / "study.yaml")}
    graph = study(tmp_path, [student("a", 0, 300), student("b", 0, 300)], students=students, teacher=teacher)
    assert reported(graph)["warnings"][:3] == [
        "b-s0 learned from the live teacher, because no recording fits the settings",
        "runs differ in run.seed: default in a-s0; 7 in b-s0",
        "runs differ in run.tf32: default in a-s0; false in b-s0",
    ]


@pytest.mark.parametrize(
    ("sessions", "warnings"),
    [
        (
            [{"device": "NVIDIA H200", "precision": "bfloat16"}],
            [
                "runs differ in device of the training: cpu in a-s0; NVIDIA H200 in b-s0",
                "runs differ in precision of the training: float32 in a-s0; bfloat16 in b-s0",
            ],
        ),
        (
            [{}, {"pipeline": "dali"}],
            ["runs differ in pipeline of the training: torchvision in a-s0; dali and torchvi"],
        ),
    ],
)
def test_another_device_precision_or_pipeline_of_any_session_is_named(tmp_path, sessions, warnings):
    students = [student("a", 0, 300), student("b", 0, 300, stop=7 * (len(sessions) - 1), sessions=sessions)]
    found = reported(study(tmp_path, students))["warnings"]
    assert len(found) == len(warnings) + 1  # Each student has one seed.
    assert all(line.startswith(warning) for line, warning in zip(found, warnings, strict=False))


def test_a_run_of_an_earlier_version_has_no_precision_to_differ_in(tmp_path):
    graph = study(tmp_path, [student("a", 0, 300), student("a", 1, 300)])
    path = graph.students[0].train.product / "metrics.jsonl"
    path.write_text(path.read_text().replace('"precision": "float32", "pipeline": "torchvision", ', ""))
    found = reported(graph)
    assert found["warnings"] == [] and found["conditions"]["precision of the training"] == {"float32": ["a-s1"]}


def test_what_changes_no_result_is_no_warning(tmp_path):
    students = [student("a", 0, 300), student("a", 1, 300, "--data.threads", "3")]
    assert reported(study(tmp_path, students))["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"dataset": "0" * 64}, "runs differ in digest of the dataset: "),
        (
            {"source": "def"},
            'runs differ in version of the code: ["1.0", "abc"] in a-s0, b-s0; ["1.0", "def"] in b-s1',
        ),
        ({"report": {"digest": "0" * 64}}, "runs differ in evaluation ema, digest: "),
        (
            {"report": {"precision": "bfloat16"}},
            "runs differ in evaluation ema, precision: float32 in a-s0, b-s0; bfl",
        ),
        (
            {
                "deviations": [
                    {"key": "run.micro_batch", "usi": "128", "here": "BatchNorm over 16 images", "meaning": "x"}
                ]
            },
            "runs differ in run.micro_batch: 128 in a-s0, b-s0; BatchNorm over 16 images in b-s1",
        ),
    ],
)
def test_other_data_code_or_length_of_a_run_is_named(tmp_path, changes, warning):
    students = [student("a", 0, 300), student("b", 0, 300), student("b", 1, 300, **changes)]
    assert [line for line in reported(study(tmp_path, students))["warnings"] if line.startswith(warning)]


def test_what_a_command_has_warned_of_is_in_the_report(tmp_path):
    graph = study(tmp_path, [student("a", seed, 300) for seed in (0, 1)])
    for each in graph.students:
        (each.train.folder / LOG).write_text(
            "step 1\nwarning: /moved/export/a-s1-0123abcd/model is slow, use more --repeats\n"
        )
    found, warning = reported(graph), "train a-s0, train a-s1: a-s1 is slow, use more speed.repeats"
    assert found["warnings"] == [] and found["measured"]["warnings"] == [warning] and warning in page_text(tmp_path)


def test_a_failed_student_and_a_missing_seed_are_reported_and_the_others_have_their_numbers(tmp_path):
    students = [student("a", 0, 300), Made("a", 1, failure="error: <no memory>"), student("b", 0, 100)]
    graph = study(tmp_path, [*students, Made("gone", 0, failure="killed")], source="digits", dataset=None)
    graph.common["shards"].note(failure="error: no images")
    found = reported(graph)
    assert found["warnings"][:3] == [
        "stage shards has failed: error: no images",
        "a-s1 is not complete: train a-s1: error: <no memory>",
        "gone-s0 is not complete: train gone-s0: killed",
    ]
    assert found["warnings"][3].startswith("each student has one seed")
    assert [row["top1_ema"] for row in found["students"].values()] == [75.0, 25.0, None]
    page = (tmp_path / "report" / "index.html").read_text()
    log = graph.students[1].train.folder.relative_to(graph.out) / LOG
    assert "&lt;no memory&gt;" in page and f'href="{log}"' in page and "<no memory>" not in page


def test_seeds_that_have_not_begun_are_not_called_failed(tmp_path):
    students = [student("a", 0, 300), Made("a", 1, failure="killed"), Made("a", 2, begun=False)]
    row = reported(study(tmp_path, [*students, Made("b", 0, begun=False)]))["students"]["a"]
    assert (row["seeds"], row["seeds_done"]) == (3, 1)
    text = page_text(tmp_path)
    assert "a (1 of 3 done) " in text and "b (0 of 1 done) " in text and "train a-s2: was not carried out" in text


def test_what_to_do_against_a_failure_is_not_cut_off(tmp_path):
    line = f"error: step 25: {'the logits of the student are not finite, ' * 9}lower optim.lr"
    graph = study(tmp_path, [Made("a", 0, failure=f"exit code 1: {line}")])
    (graph.students[0].train.folder / LOG).write_text(f"step 20\n{line}\nstopped\n")
    found = reported(graph)
    assert found["runs"]["a-s0"]["failure"] == f"train a-s0: exit code 1: {line}"
    assert found["warnings"][0] == f"a-s0 is not complete: train a-s0: exit code 1: {line}"


def test_a_run_that_has_not_ended_is_not_compared_with_others_by_its_settings(tmp_path):
    graph = study(tmp_path, [student("a", 0, 300), Made("b", 0, failure="killed")])
    trained(graph.students[1].train.product, "b", 0, "--optim.lr", "1")
    (graph.students[1].train.product / "summary.json").unlink()
    found = reported(graph)
    assert not [line for line in found["warnings"] if "optim.lr" in line]
    assert all("b-s0" not in runs for values in found["conditions"].values() for runs in values.values())


def test_a_page_has_no_empty_tables_and_legends(tmp_path):
    words = ["Students with a letter of", "front", "Curves", "Cost", "± standard"]
    pair, single = tmp_path / "pair", tmp_path / "single"
    pair.mkdir()
    single.mkdir()
    with_speeds(study(pair, [student(name, 0, 300) for name in "ab"], speed={}), dict.fromkeys("ab", (1, 9.0)))
    reported(study(single, [student("a", 0, 300)]))
    assert [[word for word in words if word in page_text(root)] for root in (pair, single)] == [words, words[2:]]


def test_a_study_without_any_result_has_a_page_that_says_so(tmp_path):
    found = reported(study(tmp_path, [Made("a", 0, failure="killed")]))
    text = page_text(tmp_path)
    assert found["pairs"] == [] and "train a-s0: killed" in text
    assert "1 student, one recipe" in text and "No student has been trained yet." in text
    assert not [word for word in ("Curves", "Cost", "± standard") if word in text]


def test_students_that_were_evaluated_on_other_images_are_not_compared(tmp_path):
    students = [student("a", 0, 300), student("b", 0, 200), student("c", 0, 100, report={"digest": "0" * 64})]
    found = reported(study(tmp_path, students))
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [("a", "b")]
    assert "letters" not in found["students"]["c"] and found["students"]["c"]["top1_ema"] == 25.0
    assert found["warnings"][0] == "c-s0 is not compared: it was evaluated on other images than a-s0"


def test_a_seed_that_was_evaluated_on_other_images_is_not_in_its_students_numbers(tmp_path):
    students = [student("a", seed, right) for seed, right in enumerate((300, 320))]
    students += [student("a", 2, 40, report={"digest": "0" * 64}), student("b", 0, 200)]
    found = reported(study(tmp_path, students))
    row = found["students"]["a"]
    assert row["top1_ema"] == 77.5 and row["low"] < 77.5 < row["high"] and row["seeds"] == 3
    assert found["warnings"][0] == "a-s2 is not compared: it was evaluated on other images than a-s0"


# --- files ---


def test_curves_of_more_runs_than_there_are_colors_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tools.lib.study.report, "draw", lambda chart: drawn.append(chart) or b"")
    students = [student(f"s{number}", 0, 300, steps=3) for number in range(9)]
    reported(study(tmp_path, [*students, student("s8", 1, 300, steps=3)]))
    draw = DRAWING
    first, last = (dataclasses.replace(drawn[0], curves=[drawn[0].curves[i]] * 2) for i in (0, 7))
    assert [curve.color for curve in drawn[0].curves] == [*range(9), 8]  # Seeds of a student have one color.
    assert draw(first) != draw(last)  # The same color of seven, with another marker.


def test_a_study_that_was_interrupted_has_the_same_results_and_curves(tmp_path, monkeypatch):
    drawn: dict[int, list[str]] = {0: [], 7: []}

    def made(root: Path, stop: int) -> dict:
        root.mkdir()
        monkeypatch.chdir(root)  # Names of files are relative and thus the same.
        monkeypatch.setattr(tools.lib.study.report, "draw", lambda chart: drawn[stop].append(repr(chart)) or b"")
        students = [student("a", seed, 300 + seed, stop=stop) for seed in (0, 1)]
        found = reported(study(Path(), [*students, student("b", 0, 200, stop=stop)], dataset=str(tmp_path)))
        del found["measured"]
        rows = csv.DictReader(Path("report/study.csv").read_text().splitlines())
        return {"results": found, "rows": [{**row, "device_hours": ""} for row in rows]}

    assert made(tmp_path / "once", stop=0) == made(tmp_path / "again", stop=7)
    assert drawn[0] == drawn[7] and len(drawn[0]) == 2


def test_the_same_files_give_the_same_bytes(tmp_path):
    graph = study(tmp_path, [student("a", 0, 300), student("b", 0, 200)])
    first, second = (
        {path.name: path.read_bytes() for path in write_report(graph)[0].parent.iterdir() if path.is_file()}
        for _ in range(2)
    )
    assert first == second and {*first} == {"index.html", "study.csv", "study.json"}


def test_the_page_links_the_files_of_each_run_and_shows_its_commands(tmp_path):
    graph = study(tmp_path, [student("a", seed, 300) for seed in (0, 1)], source="digits", dataset=None)
    train = graph.students[0].train
    (graph.students[1].export.product / "README.md").touch()
    (train.product / "report").mkdir()
    (train.product / "report" / "index.html").touch()
    write_report(graph)
    page = (tmp_path / "report" / "index.html").read_text()
    assert (
        f'href="{train.folder.relative_to(graph.out)}/run/report/index.html"' in page
        and page.count(">model card</a>") == 1
    )
    for stage in (graph.common["shards"], *graph.students[0].stages):
        assert html.escape(shlex.join(stage.command), quote=True).replace("&#x27;", "&#39;") in page
    assert re.search(r"\.wide {[^}]*local\s+no-repeat", page)  # A shadow shows where a table can be scrolled.
    assert re.search(r"pre {[^}]*pre-wrap", page)  # A phone shows whole commands.
    assert page.count("<img ") == 2 and re.search(r"img { max-width: 100%", page)  # A phone shows whole pictures.
    assert "<script" not in page and "http:" not in page and "https:" not in page
